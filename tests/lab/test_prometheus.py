"""A real Prometheus scrapes the daemon, and what it says of identities is what was really sent."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.addresses import Family
from agent.lab import net
from agent.lab.lab import Count, Lab
from tests.kernel.running import Running, eventually, running
from tests.lab.gateway import Gateway

DEPLOY = Path(__file__).parents[2] / "deploy"
TARGET = "127.0.0.1:9473"
#: How often this Prometheus scrapes, in seconds, and how far back its rates look here.
INTERVAL, WINDOW = 1, 10

#: Who of the far hosts an identity speaks to, from which address, and who sees it pass, both ways, before anybody else.
SPEAKERS = {"inside": (net.INSIDE, net.CHOST, "corp"), "outside": (net.OUTSIDE, net.WILD, "isp")}

Labels = dict[str, str]
Undo = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Watched:
    """The lab's gateway with a daemon, and a Prometheus beside it that has our scrape job and our rules."""

    gateway: Gateway
    daemon: Running
    command: list[str]

    @property
    def lab(self) -> Lab:
        return self.gateway.lab

    def get(self, port: int, path: str) -> tuple[int, str]:
        """Status and body of an answer from a server on the gateway. Raises OSError."""
        with self.gateway.host("gw") as gw, gw.inside():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            with contextlib.closing(connection):
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()

    def query(self, expr: str) -> list[tuple[Labels, float]]:
        """The series that an instant query gives. Raises ValueError with Prometheus's words."""
        status, body = self.get(9090, f"/api/v1/query?{urllib.parse.urlencode({'query': expr})}")
        answer: dict[str, Any] = json.loads(body)
        if status != 200:
            raise ValueError(f"{expr}: {answer}")
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def value(self, expr: str) -> float:
        """The value of the one series that a query gives; NaN if there is none."""
        found = self.query(expr)
        return found[0][1] if len(found) == 1 else float("nan")

    def scrapes(self) -> float:
        """How many good scrapes there were."""
        return self.value(f'sum_over_time(up{{instance="{TARGET}"}}[1h])')

    def wait_for_scrapes(self, count: int = 2) -> None:
        """Wait until there were some more: the first may have begun before."""
        before = self.scrapes()
        assert eventually(lambda: self.scrapes() >= before + count)


@contextlib.contextmanager
def watched(gateway: Gateway) -> Iterator[Watched]:
    """A daemon with its Prometheus, which has scraped it."""
    command = [sys.executable, "-m", "agent", "-c", os.fspath(gateway.policy)]
    command += ["run", "--listen", TARGET, "--netns", "gw"]
    job = (DEPLOY / "prometheus/idmark.scrape.yml").read_text().replace("interval: 15s", f"interval: {INTERVAL}s")
    config, log = gateway.directory / "prometheus.yml", gateway.directory / "prometheus.log"
    config.write_text(
        f"global:\n  evaluation_interval: {INTERVAL}s\nrule_files:\n  - {DEPLOY}/prometheus/idmark.rules.yml\n{job}"
    )
    words = [f"--config.file={config}", f"--storage.tsdb.path={gateway.directory}/data"]
    words += ["--web.listen-address=127.0.0.1:9090"]
    with running(command, gateway.directory) as daemon, log.open("w") as output:
        site = Watched(gateway, daemon, command)
        prometheus = gateway.lab.popen("gw", ["prometheus", *words], stdout=output, stderr=output)
        try:
            assert eventually(lambda: _is_up(site)), log.read_text()
            yield site
        finally:
            prometheus.terminate()
            prometheus.wait()


def _is_up(site: Watched) -> bool:
    try:
        return site.value('up{job="idmark"}') == 1
    except (OSError, ValueError):
        return False


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """With I, whose LAN is masqueraded and which has a probe, and O. One for all: what a test does amiss it undoes."""
    with Lab() as lab:
        gateway = Gateway(lab, tmp_path_factory.mktemp("prometheus"))
        # Once, and then not again while these tests last: its packets would be counted, too.
        gateway.write(**{"inside.probe": {"target": net.CHOST[Family.IPV4], "every": "1h"}})
        with watched(gateway) as site:
            yield site


def totals(site: Watched, unit: str) -> dict[tuple[str, Family, str], int]:
    """What Prometheus has of each identity, family and direction."""
    return {
        (labels["identity"], Family(labels["family"]), labels["direction"]): round(value)
        for labels, value in site.query(f"idmark_identity_{unit}_total")
    }


@contextlib.contextmanager
def counted(lab: Lab) -> Iterator[dict[tuple[str, Family, str], Callable[[], Count]]]:
    """Count at the other ends of the gateway's links what comes from each identity's address, and goes to it."""
    with contextlib.ExitStack() as stack:
        yield {
            (identity, family, direction): stack.enter_context(lab.counting(host, f'{match} "gw" {words}', hook))
            for identity, (own, _, host) in SPEAKERS.items()
            for family in Family
            for direction, match, hook, words in (
                ("transmit", "iifname", "prerouting", f"{family.nft} saddr {own[family]}"),
                ("receive", "oifname", "postrouting", f"{family.nft} daddr {own[family]}"),
            )
        }


def test_totals(site: Watched) -> None:
    """Packets and bytes of each identity, family and direction are what passed at the other end."""
    with counted(site.lab) as counters:
        site.wait_for_scrapes()
        before = {unit: totals(site, unit) for unit in ("packets", "bytes")}
        seen_before = {key: seen() for key, seen in counters.items()}
        for number, (own, far, _) in enumerate(SPEAKERS.values(), start=2):
            for family in Family:
                assert site.lab.ping("gw", far[family], own[family], count=10 * number + len(family)).ok
        seen = {key: seen() for key, seen in counters.items()}
        site.wait_for_scrapes()
        after = {unit: totals(site, unit) for unit in ("packets", "bytes")}
    for key in counters:
        packets = after["packets"][key] - before["packets"][key]
        size = after["bytes"][key] - before["bytes"][key]
        assert packets >= 20, key
        # The tunnel's own packets go by O's link, and it speaks unasked: one may pass between the two looks.
        spare = Count(2, 2 * 200) if key[:2] == ("outside", Family.IPV4) else Count(0, 0)
        assert abs(packets - (seen[key].packets - seen_before[key].packets)) <= spare.packets, key
        assert abs(size - (seen[key].bytes - seen_before[key].bytes)) <= spare.bytes, key


def test_rates(site: Watched) -> None:
    """The rate of each identity is that of the packets which pass at the other end meanwhile."""
    with counted(site.lab) as counters:
        for (own, far, _), pause in zip(SPEAKERS.values(), ("0.01", "0.04"), strict=True):
            words = ["ping", "-q", "-i", pause, "-I", own[Family.IPV4], far[Family.IPV4]]
            site.lab.popen("gw", words, stdout=subprocess.DEVNULL)
        site.wait_for_scrapes()
        began, had = time.monotonic(), {key: seen().packets for key, seen in counters.items()}
        site.wait_for_scrapes(WINDOW + 1)
        rates = site.query(f'rate(idmark_identity_packets_total{{family="ipv4"}}[{WINDOW}s])')
        took, has = time.monotonic() - began, {key: seen().packets for key, seen in counters.items()}
    assert len(rates) == 4
    for labels, rate in rates:
        key = (labels["identity"], Family.IPV4, labels["direction"])
        assert rate == pytest.approx((has[key] - had[key]) / took, rel=0.1), key


def test_promtool(site: Watched) -> None:
    """promtool has no complaint about what the daemon serves."""
    status, text = site.get(9473, "/metrics")
    assert status == 200
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_sample(site: Watched) -> None:
    """Prometheus takes every sample that the daemon serves, and none twice."""
    _, text = site.get(9473, "/metrics")
    served = [line for line in text.splitlines() if not line.startswith("#")]
    site.wait_for_scrapes()
    assert site.value("scrape_samples_scraped") == len(served)
    assert site.value("scrape_samples_post_metric_relabeling") == len(served)


def test_no_alert(site: Watched) -> None:
    """Where all is well no alert is even pending."""
    site.wait_for_scrapes()
    assert site.query("ALERTS") == []


def link_down(lab: Lab) -> Undo:
    """The VPN's link goes down, and comes back with its addresses as a client brings it up."""
    lab.link_down("gw", "vpn0")
    return lambda: lab.link_up("gw", "vpn0")


def foreign_rule(lab: Lab) -> Undo:
    """Somebody's rule comes first, and refuses what O sends."""
    lab.run("gw", ["ip", "rule", "add", "priority", "100", "from", net.OUTSIDE[Family.IPV4], "unreachable"])
    return lambda: lab.run("gw", ["ip", "rule", "delete", "priority", "100"])


@pytest.mark.parametrize(
    ("harm", "alert", "identity"),
    [(foreign_rule, "IdmarkRouteWrong", "outside"), (link_down, "IdmarkIdentityDown", "inside")],
)
def test_alert(site: Watched, harm: Callable[[Lab], Undo], alert: str, identity: str) -> None:
    """Harm on the gateway sets off the alert of the identity that it is done to, until it is undone."""

    def is_set_off() -> bool:
        return bool(site.query(f'ALERTS{{alertname="{alert}", identity="{identity}"}}'))

    undo = harm(site.lab)
    try:
        assert eventually(is_set_off)
    finally:
        undo()
    assert eventually(lambda: not is_set_off())


def panels() -> dict[str, list[str]]:
    """The queries of the dashboard's panels by title, with everything chosen."""
    board = json.loads((DEPLOY / "grafana/idmark.json").read_text())
    values = {"instance": ".*", "identity": ".*", "__rate_interval": f"{WINDOW}s", "__range": "1h"}
    return {
        panel["title"]: [re.sub(r"\$(\w+)", lambda name: values[name[1]], target["expr"]) for target in targets]
        for panel in board["panels"]
        if (targets := panel.get("targets"))
    }


def test_dashboard(site: Watched) -> None:
    """Every query of the dashboard gives something on a real Prometheus, and no query gives something that is NaN."""
    own, far, _ = SPEAKERS["inside"]
    assert site.lab.ping("gw", far[Family.IPV4], own[Family.IPV4], count=20).ok
    site.wait_for_scrapes()
    site.lab.run("gw", ["ip", "rule", "delete", "priority", "4001", "from", own[Family.IPV4]])
    site.wait_for_scrapes(3)
    found = {(title, query): site.query(query) for title, queries in panels().items() for query in queries}
    assert [key for key, series in found.items() if not series] == []
    assert [key for key, series in found.items() for _, value in series if math.isnan(value)] == []
    assert site.value("sum(idmark_repairs_total)") >= 1


# The last one: it ends the daemon.


def test_never_backwards(site: Watched) -> None:
    """Prometheus sees no counter reset, though the ruleset is flushed and the daemon restarted, with and without -9."""
    own, far, _ = SPEAKERS["inside"]
    family = Family.IPV4
    sent = 0

    def send() -> None:
        nonlocal sent
        assert site.lab.ping("gw", far[family], own[family], count=20).ok
        sent += 20
        site.wait_for_scrapes()

    send()
    site.lab.nft("gw", "flush ruleset\n")
    assert eventually(lambda: site.gateway.idmark("plan", check=False).returncode == 0)
    send()
    site.daemon.stop()
    for _ in range(2):  # a daemon is killed where its block ends
        with running(site.command, site.gateway.directory):
            send()
    assert site.value("sum(resets(idmark_identity_packets_total[1h]))") == 0
    labels = 'identity="inside", family="ipv4", direction="transmit"'
    assert site.value(f"max_over_time(idmark_identity_packets_total{{{labels}}}[1h])") >= sent
