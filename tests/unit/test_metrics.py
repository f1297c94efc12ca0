"""What Prometheus is told that needs no kernel: names, first values, and whether a route is as wanted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from agent.addresses import Family
from agent.desired import desire
from agent.given import Given
from agent.lookups import ANYWHERE, agrees
from agent.metrics import Metrics
from agent.model import MAIN as FOLLOWS_MAIN
from agent.model import Facts, Identity, Lookup
from agent.plan import KINDS
from agent.walk import MAIN, OUT, REFUSED, Fate
from agent.wanted import Wanted
from tests.unit import values


@pytest.fixture
def registry() -> CollectorRegistry:
    """The registry of the test's metrics."""
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry, tmp_path: Path) -> Metrics:
    """Metrics of a daemon that has just been started."""
    return Metrics(registry, tmp_path / "counters.json")


@pytest.mark.parametrize("name", ["idmark_repairs_total", "idmark_fights_total"])
@pytest.mark.parametrize("kind", sorted(set(KINDS.values())))
@pytest.mark.usefixtures("metrics")
def test_from_the_start(registry: CollectorRegistry, name: str, kind: str) -> None:
    """Every kind of repair and fight is there from the start, at 0: increase() doesn't see a first value."""
    assert registry.get_sample_value(name, {"kind": kind}) == 0


@pytest.mark.usefixtures("metrics")
def test_before_the_first_pass(registry: CollectorRegistry) -> None:
    """Before the first pass nothing is said of identities, and the scrape is no success."""
    text = generate_latest(registry).decode()
    assert "\nidmark_scrape_success 0.0\n" in text
    assert "idmark_identity" not in text
    assert "idmark_policy_info{" not in text


@pytest.mark.usefixtures("metrics")
def test_no_samples_of_when(registry: CollectorRegistry) -> None:
    """No series says when another one was made."""
    assert "_created" not in generate_latest(registry).decode()


def test_pass(metrics: Metrics, registry: CollectorRegistry) -> None:
    """A pass counts with its duration, and says whether the policy is in force."""
    metrics.passed(0.004, in_sync=True)
    assert registry.get_sample_value("idmark_in_sync") == 1
    assert registry.get_sample_value("idmark_reconcile_duration_seconds_bucket", {"le": "0.005"}) == 1
    assert registry.get_sample_value("idmark_reconcile_duration_seconds_bucket", {"le": "0.0025"}) == 0


def test_failed_pass(metrics: Metrics, registry: CollectorRegistry) -> None:
    """After a pass that failed nobody knows whether the policy is in force: it isn't said to be."""
    metrics.passed(0.004, in_sync=True)
    metrics.failed()
    assert registry.get_sample_value("idmark_in_sync") == 0
    assert registry.get_sample_value("idmark_reconcile_errors_total") == 1


def test_repairs_and_fights(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Repairs and fights count under their kind."""
    for _ in range(3):
        metrics.repaired("rule")
    metrics.fought("route")
    metrics.fighting({"route": 1})
    assert registry.get_sample_value("idmark_repairs_total", {"kind": "rule"}) == 3
    assert registry.get_sample_value("idmark_fights_total", {"kind": "route"}) == 1
    assert registry.get_sample_value("idmark_fighting", {"kind": "route"}) == 1
    metrics.fighting({})
    assert registry.get_sample_value("idmark_fighting", {"kind": "route"}) == 0


def test_reload(metrics: Metrics, registry: CollectorRegistry) -> None:
    """A reload that fails says so, and keeps the time of the last one that didn't."""
    metrics.reloaded(1_800_000_000.0)
    assert registry.get_sample_value("idmark_policy_last_reload_successful") == 1
    metrics.not_reloaded()
    assert registry.get_sample_value("idmark_policy_last_reload_successful") == 0
    assert registry.get_sample_value("idmark_policy_last_reload_success_timestamp_seconds") == 1_800_000_000


def test_unreadable_record(tmp_path: Path) -> None:
    """A record of counters that can't be read stops nothing, and the daemon has it to tell."""
    (tmp_path / "counters.json").write_text("{")
    (note,) = Metrics(CollectorRegistry(), tmp_path / "counters.json").notes
    assert "counters.json" in note


# --- is the route as wanted ------------------------------------------------------------------------------------------


def road(*identities: Identity, down: str = "") -> Fate:
    """Which way the first identity's IPv4 packets go to anywhere, on the lab's gateway; the link `down` has lost its
    carrier.
    """
    links = [dataclasses.replace(link, carrier=link.name != down) for link in values.GATEWAY.links]
    facts = dataclasses.replace(values.GATEWAY, links=tuple(links))
    wanted = Wanted(Family.IPV4, desire(values.policy(*identities), facts), Facts())
    (found,) = wanted.way(identities[0], Given.of(destination=int(ANYWHERE[Family.IPV4])))
    return found


def diverted(when_down: str) -> Identity:
    """I with another when_down."""
    return dataclasses.replace(values.INSIDE, when_down=when_down)


def test_road_by_own_link() -> None:
    """An identity's road is its own default, while its link is there."""
    assert [link for link, _ in road(values.INSIDE, values.OUTSIDE).hops] == ["vpn0"]


def test_road_by_detour() -> None:
    """While its link is down an identity's road is that of the identity which stands in for it."""
    assert [link for link, _ in road(diverted("outside"), values.OUTSIDE, down="vpn0").hops] == ["wan"]


def test_road_closed() -> None:
    """Without a road of its own or another's an identity's packets are to be refused."""
    assert road(dataclasses.replace(values.INSIDE, link="vpn9"), values.OUTSIDE).what == REFUSED


def test_road_of_main() -> None:
    """An identity that follows main has no road in its own table."""
    assert road(diverted(FOLLOWS_MAIN), values.OUTSIDE, down="vpn0").what == MAIN


BY_VPN = Fate(OUT, frozenset({("vpn0", None)}))
SPREAD = Fate(OUT, frozenset({("vpn0", None), ("vpn1", None)}))
CLOSED = Fate(REFUSED)
OPEN = Fate(MAIN)


@pytest.mark.parametrize(
    ("wanted", "answer", "ok"),
    [
        pytest.param(BY_VPN, Lookup(4001, "vpn0"), True, id="own-link"),
        pytest.param(BY_VPN, Lookup(4001, "wan"), False, id="other-link"),
        pytest.param(BY_VPN, Lookup(254, "vpn0"), False, id="other-table"),
        pytest.param(BY_VPN, Lookup(error="No route to host"), False, id="refused"),
        pytest.param(BY_VPN, Lookup(4001, "vpn0", values.GATEWAY.links[1].addresses[0].address), False, id="other-hop"),
        pytest.param(SPREAD, Lookup(4001, "vpn1"), True, id="one-of-several"),
        pytest.param(CLOSED, Lookup(error="No route to host"), True, id="closed"),
        pytest.param(CLOSED, Lookup(4001, error="unreachable"), True, id="closed-ipv6"),
        pytest.param(CLOSED, Lookup(254, "wan"), False, id="open-that-is-to-be-closed"),
        pytest.param(OPEN, Lookup(254, "wan"), True, id="follows-main"),
        pytest.param(OPEN, Lookup(error="Network is unreachable"), True, id="follows-main-that-has-none"),
        pytest.param(OPEN, Lookup(4001, "vpn0"), False, id="own-table-that-is-to-be-passed"),
    ],
)
def test_agrees(wanted: Fate, answer: Lookup, ok: bool) -> None:
    """The kernel's answer agrees with what is wanted by its table, link and next hop, or by having none."""
    assert agrees(wanted, 4001, answer) is ok
