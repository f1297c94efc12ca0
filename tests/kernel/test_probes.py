"""Health checks: real questions of an identity, by its own link and no other, and what follows when nobody answers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent import reconcile
from agent.desired import Desired
from agent.model import Probe
from agent.probes import Check, Prober, checks
from tests.kernel.admin import Admin, policy_text
from tests.kernel.conftest import Gateway
from tests.kernel.net import CHOST, INSIDE, OUTSIDE, PATIENCE, WILD, Host
from tests.kernel.test_facts_marking import both_families

PORT = 853
#: Two in a row decide; often, for the tests' sake.
EVERY, FAIL_AFTER = 0.1, 2

by_icmp_and_tcp = pytest.mark.parametrize("port", [None, PORT], ids=["icmp", "tcp"])


class Watch:
    """A prober, and who it says is down as soon as it says so."""

    def __init__(self, down: Mapping[str, str] | None = None) -> None:
        self._changed = threading.Event()
        self.prober = Prober(self._changed.set, down or {})

    def until(self, names: set[str]) -> Mapping[str, str]:
        """Wait until exactly these are down; why they are."""
        while self.prober.down.keys() != names:
            if not self._changed.wait(PATIENCE):
                raise TimeoutError(f"down are still {dict(self.prober.down)}, not {names}")
            self._changed.clear()
        return self.prober.down


@pytest.fixture
def watch(netns: Host) -> Iterator[Watch]:
    """A prober of the gateway's namespace."""
    with watching(None) as made:
        yield made


@contextlib.contextmanager
def watching(down: Mapping[str, str] | None) -> Iterator[Watch]:
    made = Watch(down)
    try:
        yield made
    finally:
        made.prober.close()


@contextlib.contextmanager
def answering(gateway: Gateway, port: int | None) -> Iterator[None]:
    """The far ends listen to the port, if there is one."""
    with contextlib.ExitStack() as stack:
        for host, addresses in ((gateway.chost, CHOST), (gateway.wild, WILD)):
            for address in addresses.values() if port else ():
                stack.enter_context(host.listen(address, port or 0))
        yield


def dead(host: Host) -> None:
    """The links of a host stay up, and nothing passes it any more."""
    judge(host, "drop")


def judge(host: Host, rule: str) -> None:
    """What a host does with what would pass it."""
    host.nft(f"""
        table inet dead {{
            chain everything {{
                type filter hook forward priority -300; policy accept;
                {rule}
            }}
        }}
    """)


def alive(host: Host) -> None:
    host.nft("delete table inet dead")


def check(family: str, port: int | None = None) -> Check:
    """I asks the company's host."""
    probe = Probe(ip_address(CHOST[family]), EVERY, FAIL_AFTER, port)
    return Check("inside", probe, ip_address(INSIDE[family]), "vpn0")


# --- the prober alone ------------------------------------------------------------------------------------------------


@both_families
@by_icmp_and_tcp
def test_a_dead_far_end_is_down_and_comes_up_again(
    gateway: Gateway, watch: Watch, family: str, port: int | None
) -> None:
    """So many unanswered in a row, on a link that is up, and the identity is down; as many answered, and it is up."""
    with answering(gateway, port):
        asked = check(family, port)
        watch.prober.watch([asked])
        dead(gateway.corp)
        assert watch.until({"inside"}) == {"inside": f"its probe {asked.probe} is not answered"}
        alive(gateway.corp)
        watch.until(set())


@both_families
def test_a_refusal_is_no_answer(gateway: Gateway, watch: Watch, family: str) -> None:
    """A far end that refuses the connection has nobody who serves there."""
    watch.prober.watch([check(family, PORT)])
    watch.until({"inside"})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        pytest.param({"source": None}, "cannot be sent: there is no address to ask from", id="no-address"),
        pytest.param(
            {"source": ip_address("192.0.2.131")},
            "cannot be sent: Cannot assign requested address",
            id="an-address-that-is-not-there",
        ),
        pytest.param({"link": "vpn1"}, "cannot be sent: No such device", id="no-link"),
        pytest.param(
            {"probe": Probe(ip_address("192.0.2.200"), EVERY, FAIL_AFTER)}, "is not answered", id="nobody-there"
        ),
    ],
)
def test_what_cannot_be_asked_is_not_answered(
    gateway: Gateway, watch: Watch, changes: dict[str, object], why: str
) -> None:
    """Without an address, a link or a neighbour to send to, nobody answers; and it is said which of these it was."""
    asked: Check = replace(check("ipv4"), **changes)  # type: ignore[arg-type]
    watch.prober.watch([asked])
    assert watch.until({"inside"}) == {"inside": f"its probe {asked.probe} {why}"}


def test_an_error_from_on_the_way_is_no_answer(gateway: Gateway, watch: Watch) -> None:
    """ICMP errors that come back for the question are none, and the next question goes out nevertheless."""
    judge(gateway.corp, 'iifname "gw" reject with icmpx admin-prohibited')
    watch.prober.watch([check("ipv4")])
    watch.until({"inside"})
    alive(gateway.corp)
    watch.until(set())


def test_each_identity_has_its_own_record(gateway: Gateway, watch: Watch) -> None:
    """Of two identities the one whose far end is dead is down, and only that one."""
    outside = Check("outside", Probe(ip_address(WILD["ipv4"]), EVERY, FAIL_AFTER), ip_address(OUTSIDE["ipv4"]), "wan")
    watch.prober.watch([check("ipv4"), outside])
    dead(gateway.corp)
    watch.until({"inside"})
    dead(gateway.isp)
    watch.until({"inside", "outside"})
    alive(gateway.corp)
    watch.until({"outside"})


def test_a_check_that_is_given_up(gateway: Gateway, watch: Watch) -> None:
    """Who has no probe any more is not down by one."""
    dead(gateway.corp)
    watch.prober.watch([check("ipv4")])
    watch.until({"inside"})
    watch.prober.watch([])
    watch.until(set())


def test_another_probe_begins_anew(gateway: Gateway, watch: Watch) -> None:
    """Of a probe that has just been made nothing is known, and who is not known to be down is up."""
    dead(gateway.corp)
    watch.prober.watch([check("ipv4")])
    watch.until({"inside"})
    watch.prober.watch([replace(check("ipv4"), probe=Probe(ip_address(CHOST["ipv4"]), EVERY, 100))])
    watch.until(set())


def test_another_address_keeps_the_record(gateway: Gateway, watch: Watch) -> None:
    """An identity that is down, and gets another address, stays down until it is answered there."""
    gateway.gw.ip("address", "add", "192.0.2.131/25", "dev", "vpn0")
    dead(gateway.corp)
    watch.prober.watch([check("ipv4")])
    watch.until({"inside"})
    with gateway.corp.sniff("gw") as link:
        watch.prober.watch([replace(check("ipv4"), source=ip_address("192.0.2.131"))])
        while not link.packets("192.0.2.131"):
            assert "inside" in watch.prober.down
    assert "inside" in watch.prober.down
    gateway.corp.nft("add element inet bcp38 own4 { 192.0.2.131 }")
    alive(gateway.corp)
    watch.until(set())


def test_who_was_down_before(gateway: Gateway) -> None:
    """Who was down when the last prober ended is down until answers say otherwise: a restart opens nobody."""
    with watching({"inside": "its probe is not answered", "gone": "an identity of an older policy"}) as watch:
        assert "inside" in watch.prober.down
        dead(gateway.corp)
        watch.prober.watch([check("ipv4")])
        watch.until({"inside"})
        alive(gateway.corp)
        watch.until(set())


def test_no_connection_stays_behind(gateway: Gateway, watch: Watch) -> None:
    """A connection that was made is gone again at both ends, TIME_WAIT included."""
    with answering(gateway, PORT):
        dead(gateway.corp)
        watch.prober.watch([check("ipv4", PORT)])
        watch.until({"inside"})
        alive(gateway.corp)
        watch.until(set())
        watch.prober.close()
        for host in (gateway.gw, gateway.chost):
            assert host.run(["ss", "-Htan", "state", "all", "exclude", "listening"]) == ""


# --- with a policy in force ------------------------------------------------------------------------------------------


@pytest.fixture
def admin(gateway: Gateway, tmp_path: Path) -> Admin:
    return Admin(gateway.gw, tmp_path)


def probing(family: str, port: int | None, when_down: str) -> str:
    """A policy whose I asks the far wild host, through the company's net."""
    text = policy_text({"when_down": when_down})
    probe = (
        f'probe = {{ target = "{WILD[family]}", every = "100ms", fail_after = 2{f", port = {port}" if port else ""} }}'
    )
    return text.replace("[identity.inside]", f"[identity.inside]\n{probe}")


def follow(admin: Admin, watch: Watch, text: str) -> Desired:
    """One pass of the daemon: what it wants. A second look finds nothing more to do."""
    policy = admin.write(text)
    with reconcile.opened() as kernel:
        reconcile.apply(reconcile.look(policy, kernel, watch.prober.down).plan, kernel)
        seen = reconcile.look(policy, kernel, watch.prober.down)
    assert seen.plan.text == ""
    watch.prober.watch(checks(seen.desired))
    return seen.desired


@pytest.mark.parametrize(
    ("family", "port"),
    [
        pytest.param("ipv4", None, id="ipv4-icmp"),
        pytest.param("ipv4", PORT, id="ipv4-tcp"),
        pytest.param("ipv6", None, id="ipv6-icmp"),
        pytest.param("ipv6", PORT, id="ipv6-tcp"),
    ],
)
@pytest.mark.parametrize("when_down", ["unreachable", "outside", "main"])
def test_down_and_up_with_a_policy(
    admin: Admin, gateway: Gateway, when_down: str, family: str, port: int | None
) -> None:
    """While its far end is dead an identity goes by the road of `when_down`; its probe asks on by its own link, and no
    packet of it is seen elsewhere; when it is answered, the identity has its own road again.
    """
    text = probing(family, port, when_down)
    question = (INSIDE[family], WILD[family])
    with answering(gateway, port), watching(None) as watch, gateway.isp.sniff("gw") as other_link:
        follow(admin, watch, text)
        assert admin.host.ping(WILD[family], INSIDE[family])
        dead(gateway.corp)
        why = watch.until({"inside"})["inside"]
        desired = follow(admin, watch, text)
        assert [way.closed for way in desired.standings[0].ways] == [why, why]
        with gateway.corp.sniff("gw") as own_link:
            assert own_link.packets(*question)
        assert other_link.packets(*question) == []
        assert [*leaves_by(family)] == ([] if when_down == "unreachable" else ["wan"])
        alive(gateway.corp)
        watch.until(set())
        follow(admin, watch, text)
        assert admin.host.ping(WILD[family], INSIDE[family])
        assert [*leaves_by(family)] == ["vpn0"]


def leaves_by(family: str) -> Iterator[str]:
    """The link by which I would reach another wild host, if any."""
    other = ip_address(WILD[family]) + 1
    with reconcile.opened() as kernel:
        found = kernel.rtnl.lookup(other, source=ip_address(INSIDE[family])).link
    if found:
        yield found
