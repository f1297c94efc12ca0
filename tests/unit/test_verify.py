"""The proof: what is rendered is proved, and of renderings that are broken on purpose each is caught, with a packet."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import artefact, render
from agent.cut import cut
from agent.desired import Desired, desire
from agent.model import Facts, Family, Policy, Prefix
from agent.verify import Proof, prove
from tests.unit.values import DEFAULTS, LAN, LO, VPN, WAN, host, hosts, identity, link, policies, policy

INSIDE = identity(
    "inside",
    1,
    "vpn0",
    addresses=["192.0.2.130", "2001:db8:4::130"],
    members=["10.9.0.0/24", "10.10.0.0/16", "2001:db8:9::/64"],
    masquerade=True,
    clamp_mss=True,
)
OUTSIDE = identity(
    "outside",
    2,
    "wan",
    addresses=["203.0.113.2", "2001:db8:203::2"],
    members=["10.10.7.0/24"],
    next_hop=["203.0.113.1", "2001:db8:203::1"],
)
SPARE = identity("spare", 3, "dsl", addresses=["198.51.100.77"], when_down="outside")
DSL = link("dsl", "198.51.100.77/24")
FACTS = host(LO, WAN, VPN, LAN, DSL, routes=DEFAULTS)
POLICY = policy(INSIDE, OUTSIDE, SPARE, downstream=["lan"])
DESIRED = desire(POLICY, FACTS)
FILES = render.files(DESIRED)
NFT, IP = render.RULESET, render.ROUTING


def proof(files: dict[str, str] = FILES, desired: Desired = DESIRED, facts: Facts | None = FACTS) -> Proof:
    return prove(desired, facts, artefact.read(files))


def told(found: Proof) -> str:
    return "\n".join("\n".join(each.lines) for each in found.counterexamples)


def test_what_is_rendered_is_proved() -> None:
    """Of what the renderer makes no packet goes wrong."""
    found = proof()
    assert told(found) == ""
    assert found.ways > 500


@settings(max_examples=60, deadline=None)
@given(written=policies(), facts=st.none() | hosts())
def test_every_rendering_is_proved(written: Policy, facts: Facts | None) -> None:
    """Whatever the policy and the host, of what the renderer makes no packet goes wrong."""
    desired = desire(written, facts)
    assert told(proof(render.files(desired), desired, facts)) == ""


def test_many_identities() -> None:
    """What is rendered of forty identities, each with a link, addresses and members of its own, is proved; the ways grow
    with their number, and not with what all of them could have to do with each other.
    """
    found = {count: proof(*crowd(count)) for count in (20, 40)}
    assert [told(each) for each in found.values()] == ["", ""]
    assert found[40].ways < 2.2 * found[20].ways


def test_a_swap_among_many() -> None:
    """Among forty identities, two of which have each other's mark, a packet tells it."""
    files, desired, facts = crowd(40)
    chain = "chain id-n17 {{\n        meta mark set meta mark & 0xc0ffffff | 0x{:02x}000000 "
    broken = files[NFT].replace(chain.format(17), chain.format(18))
    assert broken != files[NFT]
    assert "fwmark 0x11000000/0x3f000000" in told(proof({**files, NFT: broken}, desired, facts))


def crowd(count: int) -> tuple[dict[str, str], Desired, Facts]:
    """Identities, each with what is its own, some of which stand in for others or translate, and their gateway."""
    links = [link(f"up{n}", f"198.51.{n}.2/24", f"2001:db8:{n:x}::2/64") for n in range(1, count + 1)]
    identities = [
        identity(
            f"n{n}",
            n,
            f"up{n}",
            addresses=[f"198.51.{n}.2", f"2001:db8:{n:x}::2"],
            members=[f"10.9.{n}.0/24", f"2001:db8:9:{n:x}::/64"],
            next_hop=[f"198.51.{n}.1", f"2001:db8:{n:x}::1"],
            when_down=f"n{n - 1}" if n % 5 == 0 else "unreachable",
            masquerade=n % 7 == 0,
        )
        for n in range(1, count + 1)
    ]
    facts = host(LO, LAN, *links)
    desired = desire(policy(*identities, downstream=["lan"]), facts)
    return render.files(desired), desired, facts


# --- broken on purpose -----------------------------------------------------------------------------------------------

KEEP, MASK = "0xc0ffffff", "0x3f000000"
LAST = "unreachable default table 4001 metric 4294967295"

# ruff: noqa: E501 - a fault a line, however long
BROKEN = [
    # The marks.
    pytest.param(NFT, f"mark & {KEEP} | 0x01000000 ", f"mark & {KEEP} | 0x02000000 ", "fwmark", id="marks-the-same"),
    pytest.param(NFT, "| 0x01000000 comment", "| 0x04000000 comment", "fwmark 0x1000000", id="mark-of-nobody"),
    pytest.param(
        NFT, f"mark & {KEEP} | 0x01000000 ", "mark & 0xc0fffffe | 0x01000000 ", "other bits", id="keeps-a-bit-too-few"
    ),
    pytest.param(
        NFT, f"mark & {KEEP} | 0x01000000 ", "mark & 0xc2ffffff | 0x01000000 ", "fwmark", id="keeps-a-bit-too-many"
    ),
    pytest.param(
        NFT, f'meta mark set meta mark & {KEEP} comment "no trust', 'meta mark set meta mark & 0xffffffff comment "no',
        "fwmark", id="trusts-a-mark-that-arrives",
    ),
    pytest.param(
        NFT, f'meta mark set meta mark & {KEEP} comment "it is not', 'meta mark set meta mark & 0xc1ffffff comment "it',
        "fwmark", id="undecided-but-for-a-bit",
    ),
    pytest.param(NFT, "10.10.7.0/24 : goto id-outside", "10.10.7.0/24 : goto id-inside", "10.10.7", id="wrong-chain"),
    pytest.param(NFT, "10.9.0.0/24 : goto id-inside,", "10.9.0.0/25 : goto id-inside,", "10.9.0.1", id="half-a-prefix"),
    pytest.param(NFT, "10.9.0.0/24 : goto id-inside,", "10.9.0.0/23 : goto id-inside,", "10.9.1.", id="two-prefixes"),
    pytest.param(NFT, "            10.10.7.0/24 : goto id-outside,\n", "", "10.10.7.", id="element-missing"),
    pytest.param(NFT, "2001:db8:9::/64 : goto id-inside", "2001:db8:9::/64 : goto id-outside", "2001:db8:9:", id="ipv6"),
    pytest.param(NFT, 'ip6 saddr vmap @sources-ipv6 comment "IPv6 source"\n', "\n", "2001:db8", id="family-forgotten"),
    pytest.param(
        NFT, 'ct status dnat ct direction reply ct original ip daddr vmap @sources-ipv4 comment "IPv4 reply, by what was asked"\n', "\n",
        "a reply of a connection made to", id="replies-forgotten",
    ),
    pytest.param(NFT, "ct direction reply ct original ip ", "ct original ip ", None, id="no-direction-is-no-fault"),
    pytest.param(NFT, "iifname @links jump arriving", "iifname @downstream jump arriving", "arriving on", id="links"),
    pytest.param(NFT, "        ip daddr vmap", "        ip saddr vmap", "arriving on", id="destination-by-source"),
    # Where the chains are called.
    pytest.param(NFT, "type route hook output", "type filter hook output", "sent by this host", id="hook-type"),
    pytest.param(NFT, "hook prerouting priority -145", "hook prerouting priority -150", "fwmark", id="at-mangle"),
    pytest.param(NFT, "hook prerouting priority -145", "hook prerouting priority -100", "fwmark", id="at-dstnat"),
    pytest.param(NFT, "hook prerouting priority -145", "hook prerouting priority -210", "fwmark", id="before-conntrack"),
    pytest.param(NFT, "hook output priority -145", "hook output priority -160", "sent by this host", id="output-early"),
    pytest.param(
        NFT, "hook postrouting priority 300", "hook postrouting priority 50", "leaving by", id="before-translation"
    ),
    pytest.param(NFT, "hook postrouting priority 95", "hook postrouting priority 110", "leaves as", id="srcnat-late"),
    # What is let out.
    pytest.param(NFT, 'drop comment "misrouted', 'accept comment "misrouted', "is dropped", id="drop-missing"),
    pytest.param(NFT, '0x01000000 . "vpn0",\n', '0x01000000 . "wan",\n', "leaving by", id="own-link-wrong"),
    pytest.param(NFT, '            0x02000000 . "wan",\n', "", "is let out", id="own-link-missing"),
    pytest.param(NFT, '            0x03000000 . "wan",\n', "", "is let out", id="detour-missing"),
    pytest.param(NFT, '0x03000000 . "wan",\n', '0x01000000 . "wan",\n', "leaving by wan", id="detour-of-another"),
    pytest.param(NFT, "            0x01000000,\n", "", "leaving by", id="mark-not-listed"),
    pytest.param(NFT, 'oifname "lo" accept', 'oifname "wan" accept', "leaving by wan", id="another-link-for-lo"),
    pytest.param(
        NFT, f"meta mark & {MASK} != @marks jump source", f"meta mark & {MASK} != @marks accept", "leaving by",
        id="wiped-marks-pass",
    ),
    pytest.param(NFT, "ct status snat,dnat oifname", "ct status snat oifname", "a reply of", id="dnat-forgotten"),
    pytest.param(NFT, f"{MASK} . oifname @own-link accept", "0x3e000000 . oifname @own-link accept", "leaving", id="mask"),
    pytest.param(NFT, "oifname @downstream accept", "oifname @links accept", "leaving by", id="links-for-downstream"),
    pytest.param(NFT, '"id-inside-ipv4-transmit",', '"id-outside-ipv4-transmit",', "counted by", id="counter"),
    pytest.param(NFT, '0x01000000 : "id-inside-ipv4-mis', '0x01000000 : "id-spare-ipv4-mis', "counted", id="misrouted"),
    pytest.param(NFT, "snat ip to 192.0.2.130", "snat ip to 203.0.113.2", "leaves as", id="snat-as-another"),
    pytest.param(NFT, "ip saddr != 192.0.2.130 snat", "ip saddr != 203.0.113.2 snat", "leaves as", id="snat-exception"),
    # Routes and rules.
    pytest.param(IP, f"ip route replace {LAST} protocol 73\n", "", "refused", id="unreachable-missing"),
    pytest.param(IP, f"ip -6 route replace {LAST} protocol 73\n", "", "refused", id="unreachable-missing-ipv6"),
    pytest.param(IP, LAST, LAST.replace("4294967295", "10"), "dev vpn0", id="unreachable-first"),
    pytest.param(IP, "fwmark 0x1000000/0x3f000000 lookup 4001", "fwmark 0x2000000/0x3f000000 lookup 4001", "dev vpn0", id="fwmarks-swapped"),
    pytest.param(IP, "0x1000000/0x3f000000 lookup", "0x1000000/0x1000000 lookup", "fwmark 0x3000000", id="overlapping-mask"),
    pytest.param(IP, "0x1000000/0x3f000000 lookup", "0x1000000/0xff000000 lookup", "fwmark", id="mask-too-wide"),
    pytest.param(IP, "0x2000000/0x3f000000 lookup 4002", "0x2000000/0x3f000000 lookup 4001", "dev wan", id="wrong-table"),
    pytest.param(IP, "ip -6 rule add priority 4002 fwmark 0x2000000/0x3f000000 lookup 4002 protocol 73\n", "", "2001:db8", id="rule-family-forgotten"),
    pytest.param(IP, "ip rule add priority 4001 from 192.0.2.130 lookup 4001 protocol 73\n", "", "before it has a mark", id="from-rule-missing"),
    pytest.param(IP, "from 192.0.2.130 lookup 4001", "from 192.0.2.0/24 lookup 4001", "192.0.2.", id="from-rule-wide"),
    pytest.param(IP, "from 203.0.113.2 lookup 4002", "from 203.0.113.2 lookup 4003", "203.0.113.2", id="from-rule-wrong-table"),
    pytest.param(IP, "priority 4006 from 10.9.0.0/24", "priority 400 from 10.9.0.0/24", "sent by this host", id="guard-before-its-way-around"),
    pytest.param(IP, "ip rule add priority 4005 iif lo goto 4007 protocol 73\n", "", "sent by this host", id="guard-without-goto"),
    pytest.param(IP, "goto 4007", "goto 4006", "sent by this host", id="goto-to-the-guard"),
    pytest.param(IP, "from 10.10.0.0/16 fwmark 0/0x3f000000 unreachable", "from 10.10.0.0/17 fwmark 0/0x3f000000 unreachable", "while nothing marks it", id="guard-too-narrow"),
    pytest.param(IP, "from 10.9.0.0/24 fwmark 0/0x3f000000 unreachable", "from 10.9.0.0/24 fwmark 0/0xffffffff unreachable", "while nothing marks it", id="guard-mask"),
    pytest.param(IP, "default dev vpn0 table 4001", "default dev wan table 4001", "dev vpn0", id="wrong-link"),
    pytest.param(IP, "via 203.0.113.1 dev wan table 4002", "via 203.0.113.9 dev wan table 4002", "203.0.113.1 dev", id="wrong-next-hop"),
    pytest.param(IP, "table 4003 metric 1025", "table 4003 metric 1023", "dev dsl", id="detour-first"),
    pytest.param(IP, "ip route replace 10.9.0.0/24 dev lan table 4001 src 10.9.0.1 protocol 73\n", "", "dev lan", id="downstream-missing"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "word"), BROKEN)
def test_what_is_broken_is_caught(file: str, old: str, new: str, word: str | None) -> None:
    """A rendering with one fault in it is refuted by a packet, and what is said of it tells the fault."""
    assert old in FILES[file]
    found = told(proof({**FILES, file: FILES[file].replace(old, new)}))
    if word is None:
        assert found == ""
    else:
        assert word in found


@pytest.mark.parametrize(
    ("file", "old", "new", "why"),
    [
        pytest.param(NFT, "10.9.0.0/24 : goto", "10.8.0.0/14 : goto", "conflicting intervals", id="overlap"),
        pytest.param(NFT, "10.9.0.0/24 : goto", "10.9.0.0/24 : jump", "there is no such chain", id="verdict"),
        pytest.param(NFT, "flush map inet idmark sources-ipv4\n", "", "would stay", id="not-flushed"),
        pytest.param(NFT, "policy accept", "policy accept counter", "can't be followed", id="unknown-word"),
        pytest.param(NFT, "goto id-inside", "goto id-nobody", "no such chain", id="unknown-chain"),
        pytest.param(NFT, "jump source", "jump sauce", "there is no chain sauce", id="unknown-jump"),
        pytest.param(NFT, "iifname @own-link", "iifname @links", "links is no set for", id="set-of-another-type"),
        pytest.param(IP, "protocol 73\n", "protocol 74\n", "routing.txt:7", id="protocol"),
        pytest.param(IP, "lookup 4001 protocol", "lookup 4001 suppress_prefixlength 0 protocol", "lookup", id="option"),
        pytest.param(IP, "ip route replace unreach", "ip route append unreach", "append", id="command"),
    ],
)
def test_what_is_not_known_is_refused(file: str, old: str, new: str, why: str) -> None:
    """A text with anything in it that the reader doesn't know, or that nft would refuse, is told with file and line."""
    assert old in FILES[file]
    with pytest.raises(artefact.ArtefactError, match=why) as error:
        artefact.read({**FILES, file: FILES[file].replace(old, new)})
    assert str(error.value).startswith(f"{file}:")


# --- classes ---------------------------------------------------------------------------------------------------------


class Trie:
    """The longest prefix, bit by bit."""

    def __init__(self) -> None:
        self.below: dict[int, Trie] = {}
        self.owner: str | None = None

    def add(self, prefix: Prefix, owner: str) -> None:
        node = self
        for bit in range(prefix.length):
            node = node.below.setdefault(prefix.address >> prefix.family.bits - 1 - bit & 1, Trie())
        node.owner = owner

    def find(self, family: Family, address: int) -> str | None:
        node, owner = self, self.owner
        for bit in range(family.bits):
            after = node.below.get(address >> family.bits - 1 - bit & 1)
            if after is None:
                break
            node, owner = after, after.owner or owner
        return owner


_prefixes = st.builds(
    lambda address, length: Prefix(Family.IPV4, address >> 32 - length << 32 - length, length),
    st.integers(0, 2**32 - 1) | st.integers(0x0A000000, 0x0A00001F),
    st.integers(0, 32),
)


@given(owners=st.dictionaries(_prefixes, st.sampled_from("abc"), max_size=12), others=st.lists(_prefixes, max_size=4))
def test_the_longest_prefix(owners: dict[Prefix, str], others: list[Prefix]) -> None:
    """Every address is in exactly one class, whose owner is the one that a plain trie finds, at both of its ends."""
    trie = Trie()
    for prefix, owner in owners.items():
        trie.add(prefix, owner)
    kinds = cut(Family.IPV4, owners.items(), (), dict.fromkeys(others, "said"))
    starts = sorted((first, kind.owner) for kind in kinds for first in kind.firsts)
    assert starts[0][0] == 0
    assert len({first for first, _ in starts}) == len(starts)
    ends = [first for first, _ in starts[1:]] + [1 << 32]
    for (first, held_by), after in zip(starts, ends, strict=True):
        assert trie.find(Family.IPV4, first) == trie.find(Family.IPV4, after - 1) == held_by
    for kind in kinds:
        assert trie.find(Family.IPV4, kind.example) == kind.owner
        assert sum(kind.example in prefix_range(other) for other in set(others)) == len(kind.labels)


def prefix_range(prefix: Prefix) -> range:
    return range(prefix.address, prefix.last + 1)
