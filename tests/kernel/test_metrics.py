"""What a scrape says of identities is what the kernel has: counters, links, routes; and counters never go backwards."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from agent import reconcile
from agent.addresses import Family
from agent.metrics import Metrics
from tests.kernel.admin import INSIDE_TABLE, MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Peers
from tests.kernel.net import INSIDE, OUTSIDE, WILD, Host

POLICY = policy_text({"members": MEMBERS}, downstream=["lan"])
ONLY_OUTSIDE = POLICY[: POLICY.index("[identity.inside]")] + POLICY[POLICY.index("[identity.outside]") :]

#: A metric's labels and their values.
Labels = dict[str, str]


@dataclass(slots=True)
class Scraped:
    """An administrator's gateway with metrics in this process; a `restart` is another daemon."""

    admin: Admin
    far: Host
    carried: Path
    registry: CollectorRegistry
    metrics: Metrics

    def keep(self, text: str = POLICY, down: Mapping[str, str] | None = None) -> None:
        """Put a policy in force, as the daemon does."""
        with reconcile.opened() as kernel:
            look = reconcile.look(self.admin.write(text), kernel)
            reconcile.apply(look.plan, kernel)
        self.metrics.keeps(look.desired, down or {})

    def restart(self, *, crash: bool = False) -> None:
        """Another daemon in the place of this one."""
        if not crash:
            self.metrics.close()
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, self.carried)

    def text(self) -> str:
        """A scrape."""
        return generate_latest(self.registry).decode()

    def samples(self, name: str) -> list[tuple[Labels, float]]:
        """A scrape's samples of one name."""
        return [
            (sample.labels, sample.value)
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
            if sample.name == name
        ]

    def value(self, name: str, **labels: str) -> float | None:
        """The value of a scrape's sample; None without it."""
        return next((value for found, value in self.samples(name) if found == labels), None)

    def sent(self, identity: str = "inside", family: Family = Family.IPV4) -> float | None:
        """Packets that left by an identity's link."""
        return self.value("idmark_identity_packets_total", identity=identity, family=family, direction="transmit")


@pytest.fixture
def scraped(netns: Host, peers: Peers, tmp_path: Path) -> Scraped:
    """With the policy in force, kept, and not scraped yet."""
    far = peers("far")
    lay_links(netns, far)
    registry, carried = CollectorRegistry(), tmp_path / "counters.json"
    scraped = Scraped(Admin(netns, tmp_path), far, carried, registry, Metrics(registry, carried))
    scraped.keep()
    return scraped


def send(host: Host, count: int = 1, identity: Mapping[str, str] = INSIDE) -> None:
    """Send datagrams to the wild side, in IPv4, as I or another."""
    for _ in range(count):
        host.send(WILD["ipv4"], identity["ipv4"])


# --- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", Family)
def test_packets_and_bytes(scraped: Scraped, family: Family) -> None:
    """Packets and bytes of each identity and family are counted once, as IP packets with their headers."""
    scraped.admin.host.send(WILD[family], INSIDE[family], data=b"x" * 100)
    labels = {"identity": "inside", "family": family.value, "direction": "transmit"}
    assert scraped.value("idmark_identity_packets_total", **labels) == 1
    size = (20 if family is Family.IPV4 else 40) + 8 + 100
    assert scraped.value("idmark_identity_bytes_total", **labels) == size


def test_every_label(scraped: Scraped) -> None:
    """Every identity has every series in both families from the start: rates begin at once."""
    families, pairs = [family.value for family in Family], {}
    for label, words in (("direction", ["transmit", "receive"]), ("action", ["dropped", "passed"])):
        pairs[label] = {(i, f, word) for i in ("inside", "outside") for f in families for word in words}
    for name, label in (("identity", "direction"), ("identity_misrouted", "action")):
        for unit in ("packets", "bytes"):
            found = scraped.samples(f"idmark_{name}_{unit}_total")
            assert {(labels["identity"], labels["family"], labels[label]) for labels, _ in found} == pairs[label]
    for unit in ("packets", "bytes"):
        found = scraped.samples(f"idmark_identity_diverted_{unit}_total")
        assert {(labels["identity"], labels["family"]) for labels, _ in found} == {
            (identity, family) for identity in ("inside", "outside") for family in families
        }


def test_info(scraped: Scraped) -> None:
    """What an identity is: its link, its mark with its mask, its table."""
    labels = {"identity": "inside", "link": "vpn0", "fwmark": "0x1000000/0x3f000000", "table": "4001"}
    assert scraped.value("idmark_identity_info", **labels) == 1


def test_policy_digest(scraped: Scraped) -> None:
    """Which policy is kept, by its digest."""
    assert scraped.value("idmark_policy_info", digest=scraped.admin.write(POLICY).digest) == 1


def test_success(scraped: Scraped) -> None:
    """A scrape that could read the kernel is a success, and says how long that took."""
    assert scraped.value("idmark_scrape_success") == 1
    assert scraped.value("idmark_scrape_duration_seconds")


@pytest.mark.parametrize("form", [generate_latest, openmetrics.generate_latest])
def test_promtool(scraped: Scraped, form: Callable[[CollectorRegistry], bytes]) -> None:
    """promtool has no complaint; in OpenMetrics every line has to be right, or Prometheus takes none."""
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(scraped.registry), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert form(scraped.registry).count(b"\nidmark_identity_packets_total{") == 8


# --- links, routes, probes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "up"),
    [
        pytest.param("link set dev vpn0 up", 1, id="up"),
        pytest.param("link set dev vpn0 down", 0, id="down"),
        pytest.param("-n far link set dev vpn0 down", 0, id="no-carrier"),
        pytest.param("link delete dev vpn0", 0, id="absent"),
    ],
)
def test_link_up(scraped: Scraped, change: str, up: int) -> None:
    """A link counts as up if it is there, up and with carrier, whatever the last pass has seen."""
    scraped.admin.host.ip(*change.split())
    assert scraped.value("idmark_identity_link_up", identity="inside") == up


def route_ok(scraped: Scraped) -> dict[tuple[str, str], float]:
    """Of each identity and family."""
    found = scraped.samples("idmark_identity_route_ok")
    return {(labels["identity"], labels["family"]): value for labels, value in found}


ALL_OK = {(identity, family.value): 1 for identity in ("inside", "outside") for family in Family}


def test_route_ok(scraped: Scraped) -> None:
    """With the policy in force the kernel's own lookup agrees, for every identity and family."""
    assert route_ok(scraped) == ALL_OK


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("rule delete priority 4001 fwmark 0x1000000/0x3f000000 protocol 73", id="mark-rule-gone"),
        pytest.param("rule delete priority 4001 from 192.0.2.130 protocol 73", id="source-rule-gone"),
        pytest.param("rule add priority 100 from 192.0.2.130 lookup main", id="foreign-rule-first"),
        pytest.param("route delete default table 4001 metric 1024", id="default-gone"),
        pytest.param("route add default dev wan table 4001", id="foreign-default"),
    ],
)
def test_route_wrong(scraped: Scraped, change: str) -> None:
    """One thing altered, and the lookup of that identity and family disagrees, before any pass has seen it."""
    scraped.admin.host.ip(*change.split())
    assert route_ok(scraped) == {**ALL_OK, ("inside", "ipv4"): 0}


@pytest.mark.parametrize("when_down", ["unreachable", "main", "outside"])
def test_route_while_down(scraped: Scraped, when_down: str) -> None:
    """While the link is down the kernel agrees with what when_down wants: nowhere, main's road, or another's."""
    scraped.admin.host.ip("link", "set", "vpn0", "down")
    scraped.keep(policy_text({"members": MEMBERS, "when_down": when_down}, downstream=["lan"]))
    assert route_ok(scraped) == ALL_OK


def test_route_open_that_is_to_be_closed(scraped: Scraped) -> None:
    """A closed identity whose last route is gone follows main: that is wrong."""
    scraped.admin.host.ip("link", "set", "vpn0", "down")
    scraped.keep()
    scraped.admin.host.ip("route", "delete", "unreachable", "default", "table", "4001", "metric", "4294967295")
    assert route_ok(scraped) == {**ALL_OK, ("inside", "ipv4"): 0}


def test_route_of_an_address_that_is_not_there(scraped: Scraped) -> None:
    """An own address that is on no link can't be asked for: the mark's lookup alone says how the route is."""
    scraped.admin.host.ip("address", "delete", f"{INSIDE['ipv4']}/25", "dev", "vpn0")
    scraped.keep(policy_text({**INSIDE_TABLE, "next_hop": "none"}, downstream=["lan"]))
    assert route_ok(scraped) == ALL_OK


def test_one_family(scraped: Scraped) -> None:
    """An identity of one family has no series of the other."""
    scraped.keep(policy_text({"addresses": [INSIDE["ipv4"]], "next_hop": "none"}, downstream=["lan"]))
    assert [family for identity, family in route_ok(scraped) if identity == "inside"] == ["ipv4"]
    assert scraped.sent(family=Family.IPV6) is None


def test_probe(scraped: Scraped) -> None:
    """An identity with a probe says whether it is answered; one without says nothing."""
    text = policy_text(downstream=["lan"], **{"inside.probe": {"target": "192.0.2.53"}})
    scraped.keep(text)
    assert scraped.samples("idmark_identity_probe_success") == [({"identity": "inside"}, 1)]
    scraped.keep(text, down={"inside": "its probe 192.0.2.53 is not answered"})
    assert scraped.samples("idmark_identity_probe_success") == [({"identity": "inside"}, 0)]


def test_martians(scraped: Scraped) -> None:
    """A packet that rp_filter drops is counted; others on this machine may be at the same time."""
    gw = scraped.admin.host
    gw.sysctl("net/ipv4/conf/wan/rp_filter", 1)
    (wan,) = gw.ip_json("link", "show", "dev", "wan")
    scraped.far.ip_batch(f"""
        address add 10.9.0.77/32 dev wan
        route add {OUTSIDE["ipv4"]} dev wan
        neighbour add {OUTSIDE["ipv4"]} lladdr {wan["address"]} dev wan
    """)
    before = scraped.value("idmark_martian_source_packets_total")
    scraped.far.send(OUTSIDE["ipv4"], "10.9.0.77")
    after = scraped.value("idmark_martian_source_packets_total")
    assert before is not None
    assert after is not None
    assert after > before


# --- failed readings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("flush ruleset", id="no-table"),
        pytest.param("add table inet idmark; delete table inet idmark; add table inet idmark", id="no-counters"),
    ],
)
def test_failed_reading(scraped: Scraped, command: str) -> None:
    """A failed read is no zero: the scrape is no success and says nothing of identities, but all that it knows."""
    scraped.text()
    scraped.admin.host.nft(command)
    text = scraped.text()
    assert "\nidmark_scrape_success 0.0\n" in text
    assert "idmark_identity" not in text
    assert "\nidmark_in_sync 0.0\n" in text
    scraped.keep()
    assert scraped.value("idmark_scrape_success") == 1


def test_failed_reading_is_logged_once(scraped: Scraped, caplog: pytest.LogCaptureFixture) -> None:
    """Why scrapes fail is in the log once, and when they succeed again."""
    caplog.set_level("INFO", logger="agent")
    scraped.admin.host.nft("flush ruleset")
    for _ in range(3):
        scraped.text()
    scraped.keep()
    scraped.text()
    first, second = caplog.messages
    assert first.startswith("scrapes fail: read the counters of nft table inet idmark: there is no id-inside-")
    assert second == "scrapes succeed again"


# --- never backwards -------------------------------------------------------------------------------------------------


def test_over_a_flush(scraped: Scraped) -> None:
    """Counters go on where they were when somebody flushes the ruleset and the policy is put in force again."""
    send(scraped.admin.host, 5)
    assert scraped.sent() == 5
    scraped.admin.host.nft("flush ruleset")
    scraped.keep()
    assert scraped.sent() == 5
    send(scraped.admin.host, 2)
    assert scraped.sent() == 7


def test_over_a_flush_that_no_scrape_saw(scraped: Scraped) -> None:
    """A new counter that has counted more than the old one had is another one all the same."""
    send(scraped.admin.host, 5)
    assert scraped.sent() == 5
    scraped.admin.host.nft("flush ruleset")
    scraped.keep()
    send(scraped.admin.host, 9)
    assert scraped.sent() == 14


def test_over_a_reset(scraped: Scraped) -> None:
    """`nft reset counters` takes nothing away."""
    send(scraped.admin.host, 5)
    assert scraped.sent() == 5
    scraped.admin.host.run(["nft", "reset", "counters", "table", "inet", "idmark"])
    send(scraped.admin.host, 2)
    assert scraped.sent() == 7


def test_over_a_reload(scraped: Scraped) -> None:
    """Another policy with the same identity takes nothing away."""
    send(scraped.admin.host, 5)
    scraped.keep(policy_text({"members": MEMBERS, "clamp_mss": True}, downstream=["lan"]))
    assert scraped.sent() == 5


def test_over_another_table(scraped: Scraped) -> None:
    """Neither does another name of the nft table."""
    send(scraped.admin.host, 5)
    assert scraped.sent() == 5
    scraped.keep(policy_text(kernel={"nft_table": "idmark_2"}))
    send(scraped.admin.host, 2)
    assert scraped.sent() == 7


def test_removed_and_there_again(scraped: Scraped) -> None:
    """An identity that is taken away says nothing, and goes on when it is there again."""
    send(scraped.admin.host, 5)
    assert scraped.sent() == 5
    scraped.keep(ONLY_OUTSIDE)
    assert scraped.sent() is None
    scraped.keep()
    send(scraped.admin.host, 2)
    assert scraped.sent() == 7


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("flush", [False, True])
def test_over_a_restart(scraped: Scraped, crash: bool, flush: bool) -> None:
    """Counters go on over a restart and a crash, also where the ruleset was flushed before that."""
    send(scraped.admin.host, 5)
    assert scraped.sent() == 5
    if flush:
        scraped.admin.host.nft("flush ruleset")
        scraped.keep()
        send(scraped.admin.host, 2)
        assert scraped.sent() == 7
    scraped.restart(crash=crash)
    scraped.keep()
    assert scraped.sent() == (7 if flush else 5)


def test_flushed_while_stopped(scraped: Scraped) -> None:
    """What a daemon that ended had counted is not lost when the ruleset is flushed before the next one starts."""
    send(scraped.admin.host, 5)
    scraped.restart()
    scraped.admin.host.nft("flush ruleset")
    scraped.keep()
    send(scraped.admin.host, 2)
    assert scraped.sent() == 7


def test_no_room_for_the_record(scraped: Scraped, caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing can be written scrapes go on, and it is in the log."""
    scraped.carried.mkdir()
    send(scraped.admin.host, 5)
    assert scraped.sent() == 5
    assert "counters will not go on after a restart" in caplog.text


def test_many_scrapes_at_once(scraped: Scraped) -> None:
    """Of scrapes in many threads none sees a counter go backwards, also while the ruleset is flushed time and again."""
    falls: list[tuple[float, float]] = []
    done = threading.Event()

    def scrape() -> None:
        last = 0.0
        while not done.is_set():
            now = scraped.sent() or last
            if now < last:
                falls.append((last, now))
            last = now

    threads = [threading.Thread(target=scrape) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        send(scraped.admin.host, 20)
        scraped.admin.host.nft("flush ruleset")
        scraped.keep()
    done.set()
    for thread in threads:
        thread.join()
    assert falls == []
