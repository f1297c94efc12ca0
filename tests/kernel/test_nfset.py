"""Elements by netlink: the kernel has what was sent, whole or not at all, and gives it back."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence

import pytest

from agent.addresses import Addresses, Family
from agent.kernel import KernelError, nfset
from agent.kernel.known import Known
from agent.kernel.nfnl import Nfnl
from agent.kernel.nfset import Nfset
from agent.model import ElementChange
from tests.kernel.net import Host

NETLINK_NETFILTER, NFNLGRP_NFTABLES = 12, 7
NEWSETELEM, DELSETELEM, NEWGEN = 0xA0C, 0xA0E, 0xA0F
#: Enough for more than one message in a transaction, and for more than one transaction.
MANY = nfset.TRANSACTION + 1000

Pairs = Sequence[tuple[str, str]]


def following(generation: int) -> int:
    """The number of the next commit: 0 is none (net/netfilter/nf_tables_api.c, nf_tables_commit)."""
    return generation + 1 & 0xFFFFFFFF or 1


def change(name: str, gone: Pairs, new: Pairs, key: str = "ipv4_addr") -> ElementChange:
    return ElementChange(name, key, gone, new)


def held(table: str = "t") -> dict[str, dict[str, str]]:
    """What a table's sets hold, read by a reader that knows nothing of before."""
    with Nfnl() as nfnl:
        found = nfnl.table(table)
    assert found
    return {item.name: dict(item.elements) for item in found.sets}


# --- the same as by nft ----------------------------------------------------------------------------------------------

CHAINS = "chain id-inside { }\nchain id-outside { }\ncounter c-1 { }\ncounter c-2 { }\n"


@pytest.mark.parametrize(
    ("key", "value", "pairs"),
    [
        pytest.param(
            "ipv4_addr", "verdict", [("10.9.0.0", "goto id-inside"), ("203.0.113.2", "goto id-outside")], id="gotos"
        ),
        pytest.param(
            "ipv6_addr", "verdict", [("2001:db8::", "goto id-inside"), ("::1", "goto id-outside")], id="gotos-ipv6"
        ),
        pytest.param(
            "mark . ifname",
            "verdict",
            [('0x01000000 . "vpn0"', "goto id-inside"), ('0x02000000 . "fifteen-letters"', "goto id-outside")],
            id="gotos-by-mark-and-link",
        ),
        pytest.param("ipv4_addr", "verdict", [("10.9.0.1", "accept"), ("10.9.0.2", "drop")], id="verdicts-alone"),
        pytest.param("mark", "counter", [("0x01000000", '"c-1"'), ("0x02000000", '"c-2"')], id="counters"),
        pytest.param(
            "mark . ifname",
            "counter",
            [('0x01000000 . "vpn0"', '"c-1"'), ('0x02000000 . "wan"', '"c-2"')],
            id="counters-by-mark-and-link",
        ),
        pytest.param("ipv4_addr", "", [("10.9.0.5", ""), ("10.9.0.6", "")], id="addresses"),
        pytest.param("ipv6_addr", "", [("2001:db8::5", ""), ("::", "")], id="addresses-ipv6"),
        pytest.param("mark", "", [("0x01000000", ""), ("0xffffffff", "")], id="marks"),
        pytest.param("ifname", "", [('"vpn0"', ""), ('"é"', "")], id="links"),
        pytest.param("mark . ifname", "", [('0x01000000 . "vpn0"', "")], id="marks-and-links"),
        pytest.param("ipv4_addr . ifname", "", [('192.0.2.130 . "vpn0"', "")], id="addresses-and-links"),
        pytest.param("ipv6_addr . ifname", "", [('2001:db8:4::130 . "vpn0"', "")], id="addresses-and-links-ipv6"),
    ],
)
def test_as_by_nft(netns: Host, key: str, value: str, pairs: Pairs) -> None:
    """Of every kind of set that we have, what we put in is what nft puts in: to nft's eyes, and to ours."""
    keyword = "map" if value else "set"
    kind = f"type {key}{f' : {value}' if value else ''};"
    elements = ", ".join(f"{words} : {what}" if what else words for words, what in pairs)
    netns.nft(
        f"table inet t {{\n{CHAINS}"
        f"{keyword} text {{ {kind}\nelements = {{ {elements} }}\n}}\n{keyword} netlink {{ {kind}\n}}\n}}\n"
    )
    with Nfset() as sets:
        sets.commit("t", [change("netlink", (), pairs, key)])
        assert held()["netlink"] == held()["text"] == dict(pairs)
        listed = [
            netns.nft_json("list", keyword, "inet", "t", name)[0][keyword]["elem"] for name in ("text", "netlink")
        ]
        assert sorted(map(str, listed[0])) == sorted(map(str, listed[1]))
        for name in ("text", "netlink"):
            sets.commit("t", [change(name, pairs, (), key)])
        assert held() == {"text": {}, "netlink": {}}


@pytest.mark.parametrize("family", Family)
def test_many(netns: Host, family: Family) -> None:
    """More than fits one transaction, in whatever order, is what nft loads from text: to nft's eyes, and to ours."""
    order = random.Random(5)  # noqa: S311
    addresses = Addresses.of(family, (order.getrandbits(family.bits) for _ in range(MANY)))
    words = [key for key, _ in addresses]
    netns.nft(
        f"table inet t {{\nset text {{ type {family}_addr; elements = {{ {', '.join(words)} }}; }}\n"
        f"set netlink {{ type {family}_addr; }}\n}}\n"
    )
    with Nfset() as sets, Nfnl() as nfnl:
        before = nfnl.generation()
        sets.change("t", [change("netlink", (), addresses, f"{family}_addr")])
        assert nfnl.generation() > before + 1
        table = nfnl.table("t")
    assert table
    assert [item.elements for item in table.sets] == [addresses, addresses]
    listed = [netns.nft_json("list", "set", "inet", "t", name)[0]["set"]["elem"] for name in ("text", "netlink")]
    assert sorted(listed[0]) == sorted(listed[1])


# --- one transaction -------------------------------------------------------------------------------------------------

#: Two keys, and room for one more.
MAP = """
table inet t {
    chain a { }
    chain b { }
    chain c { }
    map m {
        type ipv4_addr : verdict
        size 3
        elements = { 10.9.0.5 : goto a, 10.9.0.6 : goto b }
    }
    set s {
        type ipv4_addr
        size 8
    }
}
"""
HELD = (("10.9.0.5", "goto a"), ("10.9.0.6", "goto b"))
NEW = (("10.9.0.7", "goto a"),)


@pytest.fixture
def two(netns: Host) -> Host:
    """A map with two keys and room for one more, and an empty set."""
    netns.nft(MAP)
    return netns


def test_change(two: Host) -> None:
    """In one commit a key goes, one comes and one gets another value; a set of the same table changes with it."""
    changes = [
        change("m", HELD, (("10.9.0.7", "goto c"), ("10.9.0.6", "goto a"))),
        change("s", (), Addresses.of(Family.IPV4, [0x0A090001])),
    ]
    with Nfset() as sets, Nfnl() as nfnl:
        before = nfnl.generation()
        sets.commit("t", changes)
        assert nfnl.generation() == following(before)
        assert held() == {"m": {"10.9.0.7": "goto c", "10.9.0.6": "goto a"}, "s": {"10.9.0.1": ""}}
        sets.commit("t", [change("m", (("10.9.0.7", "goto c"),), NEW)])
        assert held()["m"] == {"10.9.0.7": "goto a", "10.9.0.6": "goto a"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        pytest.param(
            [change("m", (("10.9.0.6", ""), ("10.9.0.8", "")), NEW)],
            "the table, the set or an element is not there (No such file or directory)",
            id="delete-what-is-not-there",
        ),
        pytest.param(
            [change("m", (), NEW), change("other", (), NEW)],
            "the table, the set or an element is not there (No such file or directory)",
            id="no-such-set",
        ),
        pytest.param(
            [change("m", (), (("10.9.0.7", "goto d"),))],
            "the table, the set or an element is not there (No such file or directory)",
            id="no-such-chain",
        ),
        pytest.param([change("m", (), HELD)], "an element is there already (File exists)", id="add-what-is-there"),
        pytest.param(
            [change("m", (), (("10.9.0.5", "goto c"),))],
            "an element is there already (File exists)",
            id="another-value-without-delete",
        ),
        pytest.param(
            [change("m", (), (*NEW, ("10.9.0.8", "goto a")))],
            "the set is full (Too many open files in system)",
            id="full",
        ),
        pytest.param([change("m", (), NEW), change("s", (), HELD)], "Invalid argument", id="values-for-a-set"),
        pytest.param(
            [change("s", (), Addresses(Family.IPV4, bytes(4 * 2_000_000)))],
            "Message too long",
            id="too-much-for-one-send",
        ),
        pytest.param(
            [change("m", ((f"10.8.{place >> 8}.{place & 255}", ""),), ()) for place in range(2000)],
            "the table, the set or an element is not there (No such file or directory)",
            id="more-errors-than-there-is-room-for",
        ),
    ],
)
def test_refused(two: Host, changes: list[ElementChange], why: str) -> None:
    """A change of which any part is refused changes nothing, says why, and the next one is taken."""
    with Nfset() as sets, Nfnl() as nfnl:
        before = nfnl.generation()
        with pytest.raises(KernelError) as raised:
            sets.commit("t", changes)
        assert raised.value.why == why
        assert raised.value.doing == "change elements in nft table inet t"
        assert held() == {"m": dict(HELD), "s": {}}
        assert nfnl.generation() == before
        sets.commit("t", [change("m", (), NEW)])
        assert held()["m"] == dict((*HELD, *NEW))


def test_change_in_a_full_set(two: Host) -> None:
    """What goes makes room for what comes in the same commit, so that a set is full by what it will hold."""
    after = (("10.9.0.5", "goto b"), ("10.9.0.6", "goto b"), ("10.9.0.8", "goto c"))
    with Nfset() as sets:
        sets.commit("t", [change("m", (), NEW)])
        sets.commit("t", [change("m", (*HELD, *NEW), after)])
    assert held()["m"] == dict(after)


def test_monitored(two: Host) -> None:
    """Who listens is told of a change whole, with one new generation behind it, and nothing of a refused one."""
    half = [change("s", (), (("10.9.0.1", ""),)), change("m", (("10.9.0.8", ""),), ())]
    whole = [change("m", HELD[:1], (("10.9.0.5", "goto b"),))]
    with Nfset() as sets, two.events(NETLINK_NETFILTER, NFNLGRP_NFTABLES) as events:
        with pytest.raises(KernelError):
            sets.commit("t", half)
        assert events.kinds() == []
        sets.commit("t", whole)
        assert events.kinds() == [DELSETELEM, NEWSETELEM, NEWGEN]


def test_nothing_to_change(two: Host) -> None:
    """A change of nothing is no commit, so that the generation stays."""
    with Nfset() as sets, Nfnl() as nfnl:
        before = nfnl.generation()
        sets.commit("t", [change("m", (), ())])
        sets.change("t", [change("s", Addresses(Family.IPV4), Addresses(Family.IPV4))])
        sets.change("t", [])
        assert nfnl.generation() == before


def test_change_twice(two: Host) -> None:
    """To put in what is there already is an error, not a silent success."""
    with Nfset() as sets, pytest.raises(KernelError, match="in nft table inet t: an element is there already"):
        sets.change("t", [change("m", (), HELD)])


# --- what a reader knows ---------------------------------------------------------------------------------------------

LARGE = Addresses.of(Family.IPV4, range(10 << 24, (10 << 24) + MANY))


@pytest.fixture
def large(netns: Host) -> Host:
    """An empty set with room for many."""
    netns.nft("add table inet t\nadd set inet t s { type ipv4_addr; }\n")
    return netns


def elements(nfnl: Nfnl) -> Sequence[tuple[str, str]]:
    table = nfnl.table("t")
    assert table
    (found,) = table.sets
    return found.elements


def test_what_was_changed_is_known(large: Host) -> None:
    """A reader who was told of changes says what a reader says who wasn't."""
    one, other = (Addresses.of(Family.IPV4, [number]) for number in (10 << 24, 11 << 24))
    with Nfset() as sets, Nfnl() as told:
        for each in (change("s", (), LARGE), change("s", one, other), change("s", other, one)):
            with told.changing("t", [each]):
                sets.change("t", [each])
            with Nfnl() as fresh:
                assert elements(told) == elements(fresh)
        assert elements(told) == LARGE


def test_what_failed_is_read_anew(large: Host) -> None:
    """After a change that failed on its way as many elements may be there as before, and others."""
    there, nowhere = (Addresses.of(Family.IPV4, [number]) for number in (11 << 24, 12 << 24))
    with Nfset() as sets, Nfnl() as told:
        sets.change("t", [change("s", (), LARGE)])
        assert elements(told) == LARGE
        sets.commit("t", [change("s", LARGE[:1], there)])
        with pytest.raises(KernelError), told.changing("t", [change("s", LARGE[:1], there)]):
            sets.change("t", [change("s", nowhere, ())])
        with Nfnl() as fresh:
            assert elements(told) == elements(fresh) != LARGE


def test_what_nft_loaded_is_read_anew(large: Host) -> None:
    """Of sets that nft changed nothing is known, though they hold as many elements as before."""
    with Nfset() as sets, Nfnl() as told:
        sets.change("t", [change("s", (), LARGE)])
        assert elements(told) == LARGE
        text = "delete element inet t s { 10.0.0.0 }\nadd element inet t s { 11.0.0.0 }\n"
        with told.loading("t", text):
            large.nft(text)
        assert dict(elements(told)).keys() ^ dict(LARGE).keys() == {"10.0.0.0", "11.0.0.0"}


FILL = """
import os
from agent.kernel.known import Known
from agent.kernel.nfnl import Nfnl
from agent.kernel.nfset import Nfset
from agent.addresses import Addresses, Family
from agent.model import ElementChange
addresses = Addresses.sorted(Family.IPV6, os.urandom(16 * {many}))
with Nfset() as sets, Nfnl() as nfnl:
    sets.change("t", [ElementChange("s", "ipv6_addr", (), addresses)])
    assert nfnl.table("t").sets[0].elements == addresses
"""


def test_in_a_user_namespace(netns: Host) -> None:
    """Where the kernel refuses a large buffer, large sets are filled all the same."""
    script = "add table inet t\nadd set inet t s { type ipv6_addr; }\n"
    load = f"import subprocess\nsubprocess.run(['nft', '-f', '-'], input={script!r}, text=True, check=True)\n"
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", load + FILL.format(many=MANY)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- known from one process to the next ------------------------------------------------------------------------------

NONE = Addresses(Family.IPV4)
ONE, OTHER = (Addresses.of(Family.IPV4, [number]) for number in (11 << 24, 12 << 24))


def looked_and_changed(nfnl: Nfnl, sets: Nfset, *changes: ElementChange) -> None:
    """As an apply does: a look, and what there is to do."""
    assert nfnl.table("t")
    with nfnl.changing("t", changes) as tell:
        tell(sets.change("t", changes))


def test_certain_of_what_we_did_alone(large: Host) -> None:
    """Who has made all the commits since his look knows for certain what large sets hold, without reading them back."""
    with Nfset() as sets, Nfnl() as told:
        looked_and_changed(told, sets, change("s", NONE, LARGE))
        looked_and_changed(told, sets, change("s", LARGE[:1], ONE))
        with told.loading("t", "add counter inet t c\n"):
            large.nft("add counter inet t c\n")
        known = told.certain("t")
        assert known
        assert known.generation == told.generation()
        with Nfnl() as fresh:
            assert known.sets == {"s": elements(fresh)}
        assert told.certain("t") is None  # nothing that was not told


def test_certain_of_a_set_of_our_own(large: Host) -> None:
    """A set that we have made since our look held nothing before."""
    text = "add set inet t new { type ipv4_addr; }\n"
    with Nfset() as sets, Nfnl() as told:
        assert told.table("t")
        with told.loading("t", text):
            large.nft(text)
        with told.changing("t", [change("new", NONE, LARGE)]) as tell:
            tell(sets.change("t", [change("new", NONE, LARGE)]))
        known = told.certain("t")
    assert known
    assert known.sets == {"new": LARGE}


def test_not_certain_beside_others(large: Host) -> None:
    """When somebody else has committed anything meanwhile nothing is certain."""
    with Nfset() as sets, Nfnl() as told:
        assert told.table("t")
        with told.changing("t", [change("s", NONE, LARGE)]) as tell:
            count = sets.change("t", [change("s", NONE, LARGE)])
            large.nft("add table inet theirs\n")
            tell(count)
        assert told.certain("t") is None
        assert elements(told) == LARGE


def test_not_certain_after_a_failure(large: Host) -> None:
    """What failed on its way leaves nothing certain."""
    with Nfset() as sets, Nfnl() as told:
        looked_and_changed(told, sets, change("s", NONE, LARGE))
        with pytest.raises(KernelError):
            looked_and_changed(told, sets, change("s", OTHER, ONE))
        assert told.certain("t") is None


def test_recalled_while_nobody_commits(large: Host) -> None:
    """What another process knew is believed, and not read back, while the generation is the same; and then no more."""
    with Nfset() as sets:
        sets.change("t", [change("s", NONE, LARGE)])
        with Nfnl() as nfnl:
            generation = nfnl.generation()
        # As many elements, and not those that are there.
        believed = Addresses.sorted(Family.IPV4, LARGE.packed[4:] + OTHER.packed)
        with Nfnl(lambda: Known("t", generation, {"s": believed})) as told:
            assert elements(told) == believed
            large.nft("add table inet theirs\n")
            assert elements(told) == LARGE
        with Nfnl(lambda: Known("t", generation, {"s": believed})) as told:
            assert elements(told) == LARGE


def test_recalled_is_less_than_what_is_there(large: Host) -> None:
    """Where the kernel has more or fewer elements than another process knew of, they are read back."""
    with Nfset() as sets, Nfnl() as nfnl:
        sets.change("t", [change("s", NONE, LARGE)])
        generation = nfnl.generation()
    with Nfnl(lambda: Known("t", generation, {"s": LARGE[1:]})) as told:
        assert elements(told) == LARGE


@pytest.mark.parametrize("words", ["counter packets 1 bytes 1", "accept"])
def test_packets_do_not_move_the_generation(large: Host, words: str) -> None:
    """A packet that is counted, or asked of a set, is no commit; a counter that is reset is none either."""
    large.nft(
        "add counter inet t c\nadd chain inet t out { type filter hook output priority 0; }\n"
        f"add rule inet t out ip daddr != @s counter name c {words}\n"
    )
    large.run(["ip", "link", "set", "lo", "up"])
    with Nfnl() as nfnl:
        before = nfnl.generation()
        large.send("127.0.0.1", "127.0.0.1")
        large.run(["nft", "reset", "counter", "inet", "t", "c"])
        assert nfnl.generation() == before
