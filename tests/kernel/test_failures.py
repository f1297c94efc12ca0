"""Applies that fail, are killed or meet each other: what is in force then, and that no packet leaks."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import pytest

from agent import cli, reconcile, snapshot
from agent.addresses import Prefix
from agent.kernel import KernelError, passage
from agent.model import Facts, Hop, Route
from agent.plan import AddRoute, DeleteRoute, Load, Plan, Step, removal
from agent.reconcile import ApplyError, Seams
from tests.kernel.admin import INSIDE_TABLE, MEMBERS, OUTSIDE_TABLE, Admin, Table, lay_links, policy_text
from tests.kernel.conftest import Gateway, Peers
from tests.kernel.net import CHOST, INSIDE, ISP, LAN_HOST, OUTSIDE, WILD, Host

FIRST = policy_text({"members": MEMBERS, "masquerade": True})
#: Another table, other marks, another hook, members moved, and main's roads for one of the two.
SECOND = policy_text(
    {"id": 3, "members": ["10.9.0.0/25", "2001:db8:9::/65"], "masquerade": True, "when_down": "outside"},
    {"members": ["10.9.0.128/25", "2001:db8:9:0:8000::/65"], "masquerade": True, "when_down": "main"},
    kernel={"mark_mask": 0xFF0000, "hook_priority": -120, "enforce": False},
)
#: linux/rtnetlink.h: RTNLGRP_IPV4_ROUTE and _RULE, and IPv6's.
ROUTES_AND_RULES = (7, 8, 11, 19)
#: The methods of the seams that change the kernel.
ACTS = {
    *("add_route", "replace_route", "delete_route", "add_rule", "delete_rule"),
    *("load", "change", "set_src_valid_mark", "restore_src_valid_mark"),
}


@dataclass
class Watched:
    """The seams of a kernel, with somebody told before and after each act; `acts` counts them."""

    kernel: reconcile.Seams
    before: Callable[[int], None] = lambda number: None
    after: Callable[[int], None] = lambda number: None
    acts: int = field(default=0)

    def seams(self) -> reconcile.Seams:
        """To hand to the agent in the place of the kernel's own."""
        seams = {each.name: _Seam(getattr(self.kernel, each.name), self) for each in fields(self.kernel)}
        return reconcile.Seams(**cast("Any", seams))

    def act(self, method: Callable[..., object], *arguments: object) -> object:
        self.acts += 1
        number = self.acts
        self.before(number)
        answer = method(*arguments)
        self.after(number)
        return answer


@dataclass
class _Seam:
    real: object
    watched: Watched

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.real, name)
        return (lambda *arguments: self.watched.act(method, *arguments)) if name in ACTS else method


@pytest.fixture
def admin(netns: Host, peers: Peers, tmp_path: Path) -> Admin:
    lay_links(netns, peers("far"))
    netns.sysctl("net/ipv4/conf/all/rp_filter", 1)
    return Admin(netns, tmp_path)


def ordered(inventory: str) -> list[str]:
    """Without the order in which things were made: what is taken back stands last."""
    return sorted(inventory.splitlines())


OCCASIONS = pytest.mark.parametrize(
    ("present", "wanted"),
    [
        pytest.param("", FIRST, id="first-apply"),
        pytest.param(FIRST, SECOND, id="change"),
        pytest.param(SECOND, FIRST, id="change-back"),
        pytest.param(FIRST, "", id="remove"),
    ],
)


def planned(admin: Admin, wanted: str, kernel: reconcile.Seams) -> Plan:
    """How to get to a policy, or to none."""
    if wanted:
        return reconcile.look(admin.write(wanted), kernel).plan
    return removal(reconcile.observe(kernel, "idmark", Facts()))


def in_force(admin: Admin, present: str) -> list[str]:
    """What is in the kernel once a policy is in force, or none, and has counted."""
    if present:
        admin.apply(present)
        admin.host.send(WILD["ipv4"], INSIDE["ipv4"])
    return ordered(admin.inventory())


@OCCASIONS
def test_whatever_step_fails_nothing_has_changed(admin: Admin, present: str, wanted: str) -> None:
    """When the kernel refuses the n-th step, for every n, all is as it was, and the error says so."""
    before = in_force(admin, present)
    for refused in itertools.count(1):
        with reconcile.opened() as kernel:
            plan = planned(admin, wanted, kernel)
            if refused > len(plan.steps):
                break

            def refuse(number: int, refused: int = refused) -> None:
                if number == refused:
                    raise KernelError(f"step {number}", "refused")

            with pytest.raises(ApplyError, match=f"^step {refused}: refused; what was in force before still is$"):
                reconcile.apply(plan, Watched(kernel, before=refuse).seams())
        assert ordered(admin.inventory()) == before, plan.steps[refused - 1]
    assert refused > 1


@pytest.mark.parametrize(
    ("present", "wanted", "number"),
    [
        pytest.param("", FIRST, signal.SIGTERM, id="first-apply"),
        pytest.param(SECOND, FIRST, signal.SIGINT, id="change"),
        pytest.param(FIRST, SECOND, signal.SIGHUP, id="change-back"),
        pytest.param(FIRST, "", signal.SIGINT, id="remove"),
    ],
)
def test_interrupted_at_any_step_nothing_has_changed(
    admin: Admin, present: str, wanted: str, number: signal.Signals
) -> None:
    """A signal that comes when the kernel has just taken the n-th step, for every n, leaves all as it was."""
    before = in_force(admin, present)
    handler = signal.signal(number, signal.default_int_handler)
    try:
        for last in itertools.count(1):
            with reconcile.opened() as kernel:
                plan = planned(admin, wanted, kernel)
                if last > len(plan.steps):
                    break

                def interrupt(step: int, last: int = last) -> None:
                    if step == last:
                        signal.raise_signal(number)

                with pytest.raises(KeyboardInterrupt):
                    reconcile.apply(plan, Watched(kernel, after=interrupt).seams())
            assert ordered(admin.inventory()) == before, plan.steps[last - 1]
    finally:
        signal.signal(number, handler)
    assert last > 1


def test_what_cannot_be_taken_back_is_told(admin: Admin) -> None:
    """When taking back fails as well, the error names both; the next apply puts all right."""

    def refuse(number: int) -> None:
        if number >= 6:
            raise KernelError(f"step {number}", "refused")

    with reconcile.opened() as kernel, pytest.raises(ApplyError) as error:
        reconcile.apply(planned(admin, FIRST, kernel), Watched(kernel, before=refuse).seams())
    both = "step 6: refused; and what was done could not all be taken back: step 7: refused; "
    assert str(error.value).startswith(both)
    admin.apply(FIRST)
    assert admin.plan(FIRST).text == ""


# --- with packets under way ------------------------------------------------------------------------------------------


@pytest.fixture
def gateway_admin(gateway: Gateway, tmp_path: Path) -> Admin:
    return Admin(gateway.gw, tmp_path)


EVERYBODY = ("I", "O", "member")


def send_from_everybody(gateway: Gateway, senders: tuple[str, ...] = EVERYBODY) -> None:
    """One datagram from each of them to both worlds, in both families. Those that are refused are fine."""
    ends = {"I": (gateway.gw, INSIDE), "O": (gateway.gw, OUTSIDE), "member": (gateway.lan, LAN_HOST)}
    for family in ("ipv4", "ipv6"):
        for far in (WILD[family], CHOST[family]):
            for host, source in (ends[name] for name in senders):
                with contextlib.suppress(OSError):
                    host.send(far, source[family])


def foreign_sources(gateway: Gateway) -> dict[str, int]:
    """The packets that a far end saw of an identity that is not its customer."""
    return {
        f"{host.name} {counter}": host.counter(counter, "bcp38")
        for host in (gateway.isp, gateway.corp)
        for counter in ("foreign4", "foreign6")
    }


def sent(gateway: Gateway) -> int:
    """UDP datagrams that arrived at either far end."""
    return sum(host.counter("datagrams", "seen") for host in (gateway.isp, gateway.corp))


def count_datagrams(gateway: Gateway) -> None:
    for host in (gateway.isp, gateway.corp):
        host.nft("""
            table inet seen {
                counter datagrams { }
                chain arriving {
                    type filter hook prerouting priority -310; policy accept;
                    iifname "gw" udp dport 9 counter name datagrams
                }
            }
        """)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(policy_text({"members": MEMBERS, "masquerade": True, "id": 7}), id="id"),
        pytest.param(policy_text({"members": MEMBERS, "masquerade": True, "id": 2}, {"id": 1}), id="ids-exchanged"),
        pytest.param(
            policy_text(
                {"members": MEMBERS, "masquerade": True},
                kernel={"table_base": 5000, "rule_priority": 3000, "mark_mask": 0xFF0000, "hook_priority": -120},
            ),
            id="kernel",
        ),
        pytest.param(
            policy_text({"members": MEMBERS, "masquerade": True}, kernel={"nft_table": "idmark_2"}), id="table"
        ),
        pytest.param(policy_text({}, {"members": MEMBERS, "masquerade": True}), id="member-of-another"),
    ],
)
def test_no_packet_leaks_between_the_steps_of_a_change(gateway: Gateway, gateway_admin: Admin, change: str) -> None:
    """With packets between every two steps of a change there and back, the far ends see no foreign source."""
    admin = gateway_admin
    count_datagrams(gateway)
    admin.apply(FIRST)
    with reconcile.opened() as kernel:
        for text in (change, FIRST):
            plan = reconcile.look(admin.write(text), kernel).plan
            watched = Watched(kernel, after=lambda number: send_from_everybody(gateway))
            reconcile.apply(plan, watched.seams())
            assert watched.acts == len(plan.steps)
    assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0)
    assert sent(gateway) > 0


def test_no_packet_leaks_while_a_change_is_taken_back(gateway: Gateway, gateway_admin: Admin) -> None:
    """The same when the last step fails and all others are taken back one by one."""
    admin = gateway_admin
    admin.apply(FIRST)
    with reconcile.opened() as kernel:
        plan = reconcile.look(admin.write(SECOND), kernel).plan

        def refuse(number: int) -> None:
            if number == len(plan.steps):
                raise KernelError("the last step", "refused")

        watched = Watched(kernel, before=refuse, after=lambda number: send_from_everybody(gateway))
        with pytest.raises(ApplyError, match="what was in force before still is"):
            reconcile.apply(plan, watched.seams())
    assert watched.acts > len(plan.steps) + 1
    assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0)


@pytest.mark.parametrize(
    ("ends", "begins"),
    [
        pytest.param("address flush dev vpn0 scope global", "", id="addresses"),
        pytest.param("link set vpn0 down\naddress flush dev vpn0 scope global", "link set vpn0 up", id="link"),
    ],
)
def test_no_member_leaves_untranslated_as_a_road_ends_and_begins(
    gateway: Gateway, gateway_admin: Admin, ends: str, begins: str
) -> None:
    """I's address or link goes and comes: no member leaves under its own name between any two steps that follow.

    The company drops and counts it. Its connection would stay untranslated: the kernel asks for the first packet only.
    """
    admin = gateway_admin
    count_datagrams(gateway)
    policy = policy_text({**I_TABLE, "addresses": "auto", "next_hop": "none"}, kernel={"enforce": False})
    admin.apply(policy)
    neighbours = {far: gateway.corp.ip_json("link", "show", "gw")[0]["address"] for far in CHOST.values()}
    addresses = [f"address add {INSIDE['ipv4']}/25 dev vpn0", f"address add {INSIDE['ipv6']}/64 dev vpn0 nodad"]
    reached = [f"neighbour replace {far} lladdr {lladdr} dev vpn0" for far, lladdr in neighbours.items()]
    with reconcile.opened() as kernel:
        for lines in ([ends], [begins, *addresses, *reached]):
            gateway.gw.ip_batch("\n".join(lines))
            plan = reconcile.look(admin.write(policy), kernel).plan
            watched = Watched(kernel, after=lambda number: send_from_everybody(gateway, ("member",)))
            reconcile.apply(plan, watched.seams())
            assert watched.acts == len(plan.steps) > 0
        before = sent(gateway)
        send_from_everybody(gateway, ("member",))
    assert sent(gateway) - before == 2, "members get out again, in both families"
    assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0)


def test_a_road_that_is_taken_back_ends_before_its_rules(
    gateway: Gateway, gateway_admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken back, a road that had been opened closes, all packets on it get through, and then the rules go."""
    admin = gateway_admin
    policy = policy_text({**I_TABLE, "addresses": "auto", "next_hop": "none"})
    gateway.gw.ip("address", "flush", "dev", "vpn0", "scope", "global")
    admin.apply(policy)
    gateway.gw.ip("address", "add", f"{INSIDE['ipv4']}/25", "dev", "vpn0")
    acts = list[Step | None]()
    take = reconcile._take

    def taken(step: Step, kernel: Seams) -> None:
        acts.append(step)
        take(step, kernel)

    monkeypatch.setattr(reconcile, "_take", taken)
    monkeypatch.setattr(passage, "wait", lambda: acts.append(None))
    impossible = AddRoute(Route(Prefix.parse("198.18.0.0/15"), 4001, (Hop("nowhere"),)))
    with reconcile.opened() as kernel:
        steps = reconcile.look(admin.write(policy), kernel).plan.steps
        with pytest.raises(ApplyError, match="what was in force before still is"):
            reconcile.apply(Plan((*steps, impossible)), kernel)
    assert any(isinstance(step, AddRoute) and step.opening for step in acts)
    closed = max(number for number, step in enumerate(acts) if isinstance(step, DeleteRoute) and step.closing)
    rules = min(number for number, step in enumerate(acts) if isinstance(step, Load) and number > closed)
    assert None in acts[closed:rules]


def test_rules_stay_where_a_road_does(gateway: Gateway, gateway_admin: Admin) -> None:
    """When the kernel refuses to end a road, a pass leaves the rules that belong to it, and members are translated."""
    admin = gateway_admin
    policy = policy_text({**I_TABLE, "addresses": "auto", "next_hop": "none"}, kernel={"enforce": False})
    admin.apply(policy)
    gateway.gw.ip("-6", "address", "flush", "dev", "vpn0", "scope", "global")
    with reconcile.opened() as kernel:
        plan = reconcile.look(admin.write(policy), kernel).plan
        ends = [isinstance(step, DeleteRoute) and step.closing for step in plan.steps]

        def refuse(number: int) -> None:
            if ends[number - 1]:
                raise KernelError("a road's end", "refused")

        watched = Watched(kernel, before=refuse, after=lambda number: send_from_everybody(gateway, ("member",)))
        mended = reconcile.mend(plan, watched.seams())
    assert mended.failure
    assert len(mended.taken) == ends.index(True)
    assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0)


# --- numbers and links that change hands -----------------------------------------------------------------------------

I_TABLE: Table = {**INSIDE_TABLE, "members": MEMBERS, "masquerade": True}
O_TABLE: Table = {**OUTSIDE_TABLE, "addresses": [*OUTSIDE.values()], "next_hop": [*ISP.values()]}


def renumbered(enforce: object, inside: Table = I_TABLE, outside: Table = O_TABLE, **kernel: object) -> str:
    """I and O, with what they go by in the kernel."""
    return policy_text(inside, outside, kernel={"enforce": enforce, **kernel})


EXCHANGED: tuple[Table, Table] = ({**I_TABLE, "id": 2}, {**O_TABLE, "id": 1})
#: Each gives an old mark or table to another identity.
HANDOVERS: dict[str, Callable[[bool], str]] = {
    "ids": lambda enforce: renumbered(enforce, *EXCHANGED),
    "ids-and-name": lambda enforce: renumbered(enforce, *EXCHANGED, nft_table="idmark_2"),
    "table_base": lambda enforce: renumbered(enforce, table_base=4001),
    "mark_mask": lambda enforce: renumbered(enforce, mark_mask=0x7E000000),
    "links": lambda enforce: renumbered(enforce, {**O_TABLE, "id": 1}, {**I_TABLE, "id": 2}),
    "all": lambda enforce: renumbered(
        enforce, table_base=4001, mark_mask=0x7E000000, rule_priority=4001, hook_priority=-120
    ),
}
handovers = pytest.mark.parametrize("change", [pytest.param(each, id=name) for name, each in HANDOVERS.items()])
enforcement = pytest.mark.parametrize("enforce", [True, False], ids=["enforced", "counted-only"])


@handovers
@enforcement
def test_no_packet_leaks_while_roads_change_hands(
    gateway: Gateway, gateway_admin: Admin, change: Callable[[bool], str], *, enforce: bool
) -> None:
    """When marks, tables or links become another identity's, there and back, no step leaks, enforced or not."""
    gateway_admin.apply(renumbered(enforce))
    leaks = []
    with reconcile.opened() as kernel:
        for text in (change(enforce), renumbered(enforce)):
            plan = reconcile.look(gateway_admin.write(text), kernel).plan
            assert "closed while roads change" in plan.text

            def after(number: int, plan: Plan = plan) -> None:
                before = foreign_sources(gateway)
                send_from_everybody(gateway)
                if foreign_sources(gateway) != before:
                    leaks.append(f"behind step {number} of {len(plan.steps)}: {plan.steps[number - 1]}")

            reconcile.apply(plan, Watched(kernel, after=after).seams())
    assert leaks == []
    assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0)


@handovers
def test_killed_while_roads_change_hands(gateway: Gateway, gateway_admin: Admin, change: Callable[[bool], str]) -> None:
    """After kill -9 behind any step nothing leaks: not then, and not while it is taken back or done again."""
    admin, former, wanted = gateway_admin, renumbered(enforce=False), change(False)
    for last in itertools.count(1):
        admin.apply(former)
        if last > len(admin.plan(wanted).steps):
            break
        killed = multiprocessing.get_context("fork").Process(target=apply_until_killed, args=(admin, wanted, last))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        send_from_everybody(gateway)
        assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0), f"killed behind step {last}"
        text = former if last % 2 else wanted
        with reconcile.opened() as kernel:
            plan = reconcile.look(admin.write(text), kernel).plan
            reconcile.apply(plan, Watched(kernel, after=lambda number: send_from_everybody(gateway)).seams())
        assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0), f"after step {last}, to {text}"
        assert admin.plan(text).text == ""
    assert last > 1


def apply_until_killed(admin: Admin, text: str, last: int) -> None:
    """In a process of its own: end without a word when so many steps are taken."""

    def kill(number: int) -> None:
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)

    with reconcile.opened() as kernel:
        reconcile.apply(reconcile.look(admin.write(text), kernel).plan, Watched(kernel, after=kill).seams())


@pytest.mark.parametrize(
    "damage",
    [
        "delete chain inet idmark postrouting",
        "flush set inet idmark own-link",
        'delete element inet idmark own-link { 0x01000000 . "vpn0" }',
    ],
)
def test_roads_change_hands_of_marks_that_the_table_knows_nothing_of(
    gateway: Gateway, gateway_admin: Admin, damage: str
) -> None:
    """What is left of a damaged table may mark still; the rules' marks are closed, too, before they lead elsewhere."""
    gateway_admin.apply(renumbered(enforce=False))
    gateway.gw.nft(damage)
    with reconcile.opened() as kernel:
        plan = reconcile.look(gateway_admin.write(renumbered(False, *EXCHANGED)), kernel).plan
        reconcile.apply(plan, Watched(kernel, after=lambda number: send_from_everybody(gateway)).seams())
    assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0)


def test_nothing_is_opened_behind_a_refused_step(gateway: Gateway, gateway_admin: Admin) -> None:
    """The daemon goes on where the kernel refuses a step; not where roads change hands: who is closed stays so."""
    former, wanted = renumbered(enforce=False), renumbered(False, *EXCHANGED)
    for refused in itertools.count(1):
        gateway_admin.apply(former)
        with reconcile.opened() as kernel:
            plan = reconcile.look(gateway_admin.write(wanted), kernel).plan
            if refused > len(plan.steps):
                break

            def refuse(number: int, refused: int = refused) -> None:
                if number == refused:
                    raise KernelError(f"step {number}", "refused")

            watched = Watched(kernel, before=refuse, after=lambda number: send_from_everybody(gateway))
            assert reconcile.mend(plan, watched.seams()).failure
        assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0), plan.steps[refused - 1]
    assert refused > 1


@pytest.mark.parametrize("last", [9, 15])
def test_back_to_where_roads_were_changing_hands(gateway: Gateway, gateway_admin: Admin, last: int) -> None:
    """A trial that begins where a plan was cut short ends there: who was closed is closed again."""
    admin, former = gateway_admin, renumbered(enforce=False)
    admin.apply(former)
    cut = (admin, renumbered(False, *EXCHANGED), last)
    killed = multiprocessing.get_context("fork").Process(target=apply_until_killed, args=cut)
    killed.start()
    killed.join()
    with reconcile.opened() as kernel:
        before = snapshot.take(kernel, admin.write(former))
        assert "idmark-closed" in before.tables
        other = admin.write(renumbered(False, {**I_TABLE, "id": 7}))
        reconcile.apply(reconcile.look(other, kernel).plan, kernel)
        assert snapshot.restore(before, kernel) == []
    send_from_everybody(gateway)
    assert "idmark-closed" in admin.host.run(["nft", "list", "tables"])
    assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0)


@enforcement
@pytest.mark.parametrize("when_down", ["unreachable", "outside", "main"])
@pytest.mark.parametrize(
    ("down_before", "changed"),
    [
        pytest.param(True, {}, id="link-came-back"),
        pytest.param(False, {"members": [*MEMBERS, "10.10.0.0/16"]}, id="new-member"),
        pytest.param(False, {"next_hop": ["192.0.2.200", "2001:db8:4::200"]}, id="next-hop"),
        pytest.param(False, {"id": 9}, id="unused-id"),
        pytest.param(False, {"masquerade": False, "clamp_mss": True}, id="translation"),
        pytest.param(False, {"when_down": "outside", "masquerade": False}, id="new-detour"),
        pytest.param(False, {"when_down": "unreachable", "masquerade": False}, id="no-detour"),
    ],
)
def test_nothing_is_closed_where_no_road_changes_hands(
    admin: Admin, changed: Table, when_down: str, *, down_before: bool, enforce: bool
) -> None:
    """A plan for what changes nobody's road closes nothing on its way."""
    inside = {**I_TABLE, "when_down": when_down}
    if down_before:
        admin.host.ip("link", "set", "vpn0", "down")
    admin.apply(renumbered(enforce, inside))
    if down_before:
        admin.host.ip("link", "set", "vpn0", "up")
        admin.host.ip("address", "add", f"{INSIDE['ipv6']}/64", "dev", "vpn0")
    plan = admin.plan(renumbered(enforce, {**inside, **changed})).text
    assert plan
    assert "closed while roads change" not in plan


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "senders"),
    [
        pytest.param("nft flush ruleset", ("I", "O"), id="ruleset"),
        pytest.param("ip rule flush protocol 73", EVERYBODY, id="rules"),
        pytest.param("ip route flush table 4001", EVERYBODY, id="routes"),
        pytest.param("ip link set vpn0 down", EVERYBODY, id="link"),
    ],
)
def test_what_is_left_of_it_keeps_the_packets_in(
    gateway: Gateway, gateway_admin: Admin, damage: str, senders: tuple[str, ...]
) -> None:
    """Rules hold the host's own packets without the marks; enforcement holds all of them without rules or routes."""
    gateway_admin.apply(FIRST)
    gateway.gw.run(damage.split())
    if "rule " in damage or "route " in damage:
        gateway.gw.run(["ip", "-6", *damage.split()[1:]])
    send_from_everybody(gateway, senders)
    assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0)


def test_killed_at_any_moment_it_neither_leaks_nor_sticks(gateway: Gateway, gateway_admin: Admin) -> None:
    """After kill -9 of `idmark apply` at 20 moments of a change: no leak, and the next apply has all in force."""
    admin = gateway_admin
    admin.apply(FIRST)
    chance = random.Random(4001)  # noqa: S311
    with reconcile.opened() as kernel:
        steps = len(planned(admin, SECOND, kernel).steps)
    halves = 0
    for turn in range(20):
        text = FIRST if turn % 2 else SECOND
        admin.write(text)
        moment = chance.randrange(steps)
        # Forked: what is killed has no interpreter to start first.
        process = multiprocessing.get_context("fork").Process(target=cli.main, args=(admin.words("apply"),))
        with admin.host.events(socket.NETLINK_ROUTE, *ROUTES_AND_RULES) as events:
            process.start()
            seen = 0
            while seen <= moment and process.is_alive():
                seen += len(events.kinds())
            process.kill()
            process.join()
        send_from_everybody(gateway)
        halves += bool(admin.plan(text).steps)
    assert foreign_sources(gateway) == dict.fromkeys(foreign_sources(gateway), 0)
    assert halves > 5
    admin.apply(FIRST)
    assert admin.plan(FIRST).text == ""


def test_two_applies_at_once(admin: Admin) -> None:
    """Of two applies at the same time one waits for the other: both end well, and the policy is in force."""
    admin.write(FIRST)
    both = [subprocess.Popen(admin.command("apply"), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = sorted(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert re.match(r"in force: \d+ changes, plan [0-9a-f]{64}\n", answers[0])
    assert answers[1] == "in force: nothing to do\n"
    assert admin.plan(FIRST).text == ""
