"""What an apply loads is what was reviewed, whichever way it goes into the kernel; and what of it hangs on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest

from agent import facts, reconcile, render, ruleset, source
from agent.desired import Desired, desire
from agent.kernel import known, runtime
from agent.kernel.nfnl import TRUSTED, Nfnl
from agent.kernel.nft import Nft
from agent.model import Table
from agent.plan import Change, Load
from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Peers
from tests.kernel.net import Host


@pytest.fixture
def admin(netns: Host, peers: Peers, tmp_path: Path) -> Admin:
    """On the test net's gateway, with nothing in force."""
    lay_links(netns, peers("far"))
    return Admin(netns, tmp_path)


def networks(lengths: Sequence[int], count: int, base: str = "10.0.0.0") -> list[str]:
    """That many networks in all, of these lengths in turn, apart from each other within a length."""
    first = int(ip_network(base)[0])
    found = []
    for place in range(count):
        length = lengths[place % len(lengths)]
        found.append(str(ip_network((first + (place // len(lengths) << 32 - length), length))))
    return found


def contents(host: Host, name: str) -> Table:
    """A table as netlink tells it, without the order in which things were made."""
    with host.inside(), reconcile.opened() as kernel:
        table = kernel.nfnl.table(name)
    assert table
    sets = (replace(item, elements=tuple(sorted(item.elements))) for item in table.sets)
    return replace(
        table,
        counters=tuple(sorted(table.counters)),
        sets=tuple(sorted(sets, key=lambda item: item.name)),
        chains=tuple(sorted(table.chains, key=lambda item: item.name)),
    )


#: Policies by the shape that their sources take: members of I and of O.
SHAPES = {
    "maps": (networks([32, 24, 20, 16], 200), networks([32, 26], 200, "172.16.0.0")),
    "sets": (networks([32, 30, 29, 28], 4_000), networks([32, 30, 29, 28], 4_000, "172.16.0.0")),
    "intervals": (networks(range(16, 33), 1_000), networks(range(16, 33), 1_000, "172.16.0.0")),
}
#: A set that there is only in that shape.
MARKS = {"maps": "sources-ipv4-24", "sets": "id-inside-ipv4-28", "intervals": "sources-ipv4"}


@pytest.mark.parametrize("shape", SHAPES)
def test_loaded_is_what_was_reviewed(admin: Admin, peers: Peers, shape: str) -> None:
    """After an apply the kernel holds what `nft -f` of the rendered text puts there; and so it does the second time."""
    reader = peers("reader")
    inside, outside = SHAPES[shape]
    text = policy_text({"members": inside}, {"members": outside})
    admin.apply(text)
    reader.nft(render.files(wanted(admin, text))[render.RULESET])
    assert MARKS[shape] in {item.name for item in contents(admin.host, "idmark").sets}
    assert contents(admin.host, "idmark") == contents(reader, "idmark")
    assert admin.plan(text).steps == ()
    # And over what is there already.
    fewer = policy_text({"members": inside[1:]}, {"members": [*outside, inside[0]]})
    admin.apply(fewer)
    reader.nft(render.files(wanted(admin, fewer))[render.RULESET])
    assert contents(admin.host, "idmark") == contents(reader, "idmark")
    assert admin.plan(fewer).steps == ()


def test_many_loaded(admin: Admin) -> None:
    """Of twenty thousand sources in four lengths each one is in the set that the review shows it in, and no other."""
    inside, outside = (networks([32, 30, 29, 28], 10_000, base) for base in ("10.0.0.0", "172.16.0.0"))
    text = policy_text({"members": inside}, {"members": outside})
    admin.apply(text)
    reviewed = {item.name: item.elements for item in ruleset.table(wanted(admin, text)).sets if item.name[:3] == "id-"}
    assert len(reviewed) == 8
    loaded = {item.name: item.elements for item in contents(admin.host, "idmark").sets if item.name in reviewed}
    assert loaded == {name: tuple(sorted(elements)) for name, elements in reviewed.items()}


def wanted(admin: Admin, text: str) -> Desired:
    """What a policy makes of this host."""
    policy = admin.write(text)
    with reconcile.opened() as kernel:
        return desire(policy, facts.take(policy, kernel.rtnl, kernel.nfnl, kernel.sysctls))


def test_from_shape_to_shape(admin: Admin) -> None:
    """From any shape to any other one apply gets, and there is nothing left to do."""
    for shape in ("maps", "sets", "intervals", "sets", "maps", "intervals", "maps"):
        inside, outside = SHAPES[shape]
        text = policy_text({"members": inside}, {"members": outside})
        admin.apply(text)
        assert MARKS[shape] in {item.name for item in contents(admin.host, "idmark").sets}
        assert admin.plan(text).steps == ()


LARGE = policy_text({"members": networks([32], 5_000)}, {"members": networks([32], 5_000, "172.16.0.0")})


def truth() -> dict[str, Sequence[tuple[str, str]]]:
    """What large sets hold, by one who has not been told."""
    with Nfnl() as nfnl:
        table = nfnl.table("idmark")
    assert table
    return {item.name: item.elements for item in table.sets if len(item.elements) > TRUSTED}


def test_known_to_the_next_process(admin: Admin) -> None:
    """What an apply leaves to the next process of large sets is what the kernel has of them."""
    admin.write(LARGE)
    assert admin.idmark("apply", "--yes").returncode == 0
    left = known.left()
    assert left
    assert left.sets == truth()
    assert {name: len(elements) for name, elements in left.sets.items()}.keys() == {
        "id-inside-ipv4-32",
        "id-outside-ipv4-32",
    }


def test_nothing_is_left_after_remove(admin: Admin) -> None:
    """remove takes along what apply has left to others: what large sets hold, and the policy for a daemon."""
    admin.write(LARGE)
    assert admin.idmark("apply", "--yes").returncode == 0
    assert known.left()
    assert source.handed_over()
    assert admin.idmark("remove").returncode == 0
    assert (known.left(), source.handed_over()) == (None, None)


@pytest.mark.parametrize("damage", [None, b"", b"nothing of ours"])
def test_an_element_that_somebody_exchanged(admin: Admin, damage: bytes | None) -> None:
    """Another element in the place of one is seen by the next process, and put right, whatever was left to it."""
    admin.write(LARGE)
    assert admin.idmark("apply", "--yes").returncode == 0
    if damage is not None:
        (runtime.directory() / known.NAME).write_bytes(damage)
    alteration = "delete element inet idmark id-inside-ipv4-32 { 10.0.0.1 }\n"
    admin.host.nft(alteration + "add element inet idmark id-inside-ipv4-32 { 10.99.0.1 }\n")
    assert admin.idmark("plan").stdout.splitlines()[:2] == [
        "- nft delete element inet idmark id-inside-ipv4-32 { 10.99.0.1 }",
        "+ nft add element inet idmark id-inside-ipv4-32 { 10.0.0.1 }",
    ]
    assert admin.idmark("apply", "--yes").returncode == 0
    left = known.left()
    assert left
    assert left.sets == truth()


def test_a_table_is_listed_once(admin: Admin) -> None:
    """For the way back our table is listed before the first of the transactions on it that follow one another."""
    admin.apply(policy_text({"members": MEMBERS}))
    seen: list[str] = []

    class Counting(Nft):
        def text(self, name: str) -> str | None:
            seen.append(name)
            return super().text(name)

    with reconcile.opened() as kernel:
        plan = reconcile.look(admin.write(policy_text({"clamp_mss": True}, kernel={"enforce": False})), kernel).plan
        assert len([step for step in plan.steps if isinstance(step, Load)]) > 1
        reconcile.apply(plan, replace(kernel, nft=Counting()))
    assert seen == ["idmark"]


def test_many_fail_and_nothing_is_left(admin: Admin) -> None:
    """When the last step of an apply with large sets fails, the table that it made is gone, sets and all."""
    before = admin.inventory()
    inside, outside = SHAPES["sets"]
    policy = admin.write(policy_text({"members": inside}, {"members": outside}))
    with reconcile.opened() as kernel:
        plan = reconcile.look(policy, kernel).plan
        assert [type(step) for step in plan.steps if isinstance(step, Load | Change)] == [Load, Change, Load]
        last = next(step for step in reversed(plan.steps) if isinstance(step, Load))
        # What check lets pass, and the kernel no longer takes when it is there twice.
        twice = replace(last, commands=("create chain inet idmark source", *last.commands))
        steps = tuple(twice if step is last else step for step in plan.steps)
        with pytest.raises(reconcile.ApplyError):
            reconcile.apply(replace(plan, steps=(*steps, twice)), kernel)
    assert admin.inventory() == before


NAT = "table ip theirs {\nchain srcnat { type nat hook postrouting priority 100;\n}\n}\n"


def test_nat_as_the_host_shows(admin: Admin) -> None:
    """A neighbour's chain that translates makes the chain appear that decides replies; with it that one goes too."""
    text = policy_text()

    def answering() -> bool:
        admin.apply(text)
        assert admin.plan(text).steps == ()
        return "answering" in {chain.name for chain in contents(admin.host, "idmark").chains}

    found = [answering()]
    admin.host.nft(NAT)
    found.append(answering())
    admin.host.nft("delete table ip theirs\n")
    found.append(answering())
    assert found == [False, True, False]


def chains(kind: str, hook: str, family: str, flags: str = "") -> str:
    """A neighbour's table with one chain."""
    return f"table {family} theirs {{\n{flags}\nchain c {{ type {kind} hook {hook} priority 0;\n}}\n}}\n"


@pytest.mark.parametrize(
    ("nat", "theirs", "answers"),
    [
        pytest.param(True, "", True, id="said-and-not-there"),
        pytest.param(False, NAT, False, id="denied-and-there"),
        pytest.param("auto", chains("filter", "input", "inet"), False, id="filter"),
        pytest.param("auto", chains("nat", "prerouting", "ip6"), True, id="ipv6"),
        pytest.param("auto", chains("nat", "output", "inet", "flags dormant;"), True, id="dormant"),
    ],
)
def test_nat(admin: Admin, nat: bool | str, theirs: str, answers: bool) -> None:
    """What the policy says of translation counts; else whether any neighbour's chain of any family is for it."""
    if theirs:
        admin.host.nft(theirs)
    admin.apply(policy_text(kernel={"nat": nat}))
    assert ("answering" in {chain.name for chain in contents(admin.host, "idmark").chains}) == answers


def test_masquerading_of_our_own_counts(admin: Admin) -> None:
    """Where an identity masquerades there are translated connections, though nobody else's chain makes any."""
    admin.apply(policy_text({"members": ["10.9.0.0/24"], "masquerade": True}))
    assert "answering" in {chain.name for chain in contents(admin.host, "idmark").chains}
