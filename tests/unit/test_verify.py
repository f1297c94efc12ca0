"""The proof: what is rendered is proved, and of renderings that are broken on purpose each is caught, with a packet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import artefact, layers, render
from agent import desired as desired_module
from agent.addresses import Family, Prefix
from agent.cut import cut
from agent.desired import Desired, desire
from agent.model import Facts, Kernel, Policy
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
BITS_24, BITS_16 = "255.255.255.0", "255.255.0.0"
ASKED_32 = 'ip saddr vmap @sources-ipv4-32 comment "IPv4 /32"\n'
ASKED_24 = f'ip saddr & {BITS_24} vmap @sources-ipv4-24 comment "IPv4 /24"\n'
ASKED_16 = f'ip saddr & {BITS_16} vmap @sources-ipv4-16 comment "IPv4 /16"\n'
REPLIES = 'ct status dnat ct direction reply goto answering comment "a reply, by what was asked"\n'
TRANSLATED = 'ct status snat,dnat goto leaving comment "translated: not what it seems"\n'
WIPED = f'meta mark & {MASK} == 0x00000000 jump unmarked comment "no mark: by the source on the wire"\n'
FAST = f"meta mark & {MASK} == 0x01000000"
PLAIN = f'{FAST} oifname "vpn0" goto left-inside comment "by its own link"\n'

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
    pytest.param(NFT, "10.10.7.0 : goto id-outside", "10.10.7.0 : goto id-inside", "10.10.7", id="wrong-chain"),
    pytest.param(NFT, f"ip saddr & {BITS_24} ", "ip saddr & 255.255.255.128 ", "10.9.0.1", id="half-a-prefix"),
    pytest.param(NFT, f"ip saddr & {BITS_24} ", "ip saddr & 255.255.254.0 ", "10.9.1.", id="two-prefixes"),
    pytest.param(NFT, f"ip saddr & {BITS_24} ", "ip saddr ", "10.9.0.", id="mask-missing"),
    pytest.param(NFT, f"ip saddr & {BITS_24} ", f"ip daddr & {BITS_24} ", "10.9.0.", id="source-by-destination"),
    pytest.param(NFT, "            10.10.7.0 : goto id-outside,\n", "", "10.10.7.", id="element-missing"),
    pytest.param(NFT, "10.9.0.0 : goto id-inside", "10.9.0.1 : goto id-inside", "10.9.0.", id="element-that-nothing-equals"),
    pytest.param(NFT, f"{ASKED_24}        {ASKED_16}", f"{ASKED_16}        {ASKED_24}", "10.10.7.", id="shorter-prefix-first"),
    pytest.param(NFT, ASKED_16, "\n", "10.10.", id="length-forgotten"),
    pytest.param(NFT, "2001:db8:9:: : goto id-inside", "2001:db8:9:: : goto id-outside", "2001:db8:9:", id="ipv6"),
    pytest.param(
        NFT, 'ip6 saddr vmap @sources-ipv6-128 comment "IPv6 /128"\n        ip6 saddr & ffff:ffff:ffff:ffff:: vmap @sources-ipv6-64 comment "IPv6 /64"\n', "\n",
        "2001:db8", id="family-forgotten",
    ),
    pytest.param(NFT, REPLIES, "\n", "a reply of a connection made to", id="replies-forgotten"),
    pytest.param(NFT, f"{REPLIES}        ip saddr", "ip saddr", "a reply of a connection made to", id="replies-that-arrive-forgotten"),
    pytest.param(NFT, f"{REPLIES}        {ASKED_32}", REPLIES, "192.0.2.130", id="length-forgotten-as-it-arrives"),
    pytest.param(NFT, f"{REPLIES}        meta", "meta", "sent by this host, a reply of", id="replies-that-are-sent-forgotten"),
    pytest.param(NFT, "ct direction reply goto", "goto", "asked in a connection made to", id="no-direction"),
    pytest.param(NFT, 'goto source comment "it was', 'continue comment "it was', "a reply of", id="replies-of-nobodys"),
    pytest.param(NFT, f"ct original ip daddr & {BITS_16} ", f"ct original ip daddr & {BITS_24} ", "a reply of", id="reply-mask"),
    pytest.param(NFT, 'iifname "vpn0" jump arriving', 'iifname "lan" jump arriving', "arriving on", id="links"),
    pytest.param(NFT, 'iifname "vpn0" jump arriving', 'oifname "vpn0" jump arriving', "arriving on", id="no-link-to-leave-by-yet"),
    pytest.param(NFT, "        ip daddr vmap", "        ip saddr vmap", "arriving on", id="destination-by-source"),
    pytest.param(NFT, "jump destination comment", "continue comment", "arriving on", id="destination-forgotten"),
    pytest.param(NFT, '"vpn0" : goto arrived-inside', '"lan" : goto arrived-inside', "arriving on", id="arrived-elsewhere"),
    pytest.param(NFT, "goto arrived-inside", "goto arrived-outside", "counted by", id="arrived-as-another"),
    # What is spared the second lookup.
    pytest.param(NFT, '192.0.2.130 . "vpn0",', '203.0.113.2 . "vpn0",', "fwmark 0x2000000", id="home-of-another"),
    pytest.param(NFT, '192.0.2.130 . "vpn0",', '10.9.0.7 . "vpn0",', "10.9.0.7", id="home-of-a-member"),
    pytest.param(NFT, '198.51.100.77 . "dsl",', '198.51.100.77 . "wan",', "fwmark 0x3000000", id="home-by-another-link"),
    pytest.param(NFT, f"meta mark & {MASK} == 0x00000000 ip saddr .", "ip saddr .", "fwmark 0x1000000", id="home-whatever-its-mark"),
    pytest.param(NFT, f"{MASK} == 0x00000000 ip saddr .", "0x3d000000 == 0x00000000 ip saddr .", "fwmark 0x1000000", id="home-mask"),
    pytest.param(NFT, "ip saddr . oifname @home-ipv4 accept", "ip daddr . oifname @home-ipv4 accept", "fwmark", id="home-by-destination"),
    pytest.param(NFT, '            198.51.100.77 . "dsl",\n', "", None, id="a-second-lookup-is-no-fault"),
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
    pytest.param(NFT, '"vpn0" : goto left-inside', '"wan" : goto left-inside', "leaving by", id="own-link-wrong"),
    pytest.param(NFT, '            0x02000000 . "wan" : goto left-outside,\n', "", "is let out", id="own-link-missing"),
    pytest.param(NFT, f'{FAST} oifname "vpn0"', f'{FAST} oifname "wan"', "leaving by wan", id="plain-case-by-another-link"),
    pytest.param(NFT, f"{FAST} oifname", f"meta mark & {MASK} == 0x04000000 oifname", "fwmark 0x4000000", id="plain-case-of-nobodys-mark"),
    pytest.param(NFT, f"{FAST} oifname", f"meta mark & {MASK} == 0x02000000 oifname", "leaving by vpn0", id="plain-case-of-anothers-mark"),
    pytest.param(NFT, f"{FAST} oifname", "meta mark & 0x1f000000 == 0x01000000 oifname", "leaving by vpn0", id="plain-case-mask"),
    pytest.param(NFT, "goto left-inside comment", "goto left-outside comment", "counted by", id="plain-case-counts-another"),
    pytest.param(NFT, TRANSLATED, "", "leaving by", id="plain-case-though-translated"),
    pytest.param(
        NFT, f"{TRANSLATED}        {PLAIN}", f"{PLAIN}        {TRANSLATED}", "leaving by",
        id="plain-case-before-translated",
    ),
    pytest.param(NFT, WIPED, "\n", None, id="a-longer-way-is-no-fault"),
    pytest.param(NFT, f'{MASK} == 0x00000000 accept comment "nobody', f'{MASK} != 0x04000000 accept comment "nobody', "leaving by", id="unmarked-lets-all-out"),
    pytest.param(NFT, "        goto leaving comment \"not plainly on its own road\"\n", "", "is dropped", id="leaving-forgotten"),
    pytest.param(NFT, '            0x03000000 . "wan",\n', "", "is let out", id="detour-missing"),
    pytest.param(NFT, '0x03000000 . "wan",\n', '0x01000000 . "wan",\n', "leaving by wan", id="detour-of-another"),
    pytest.param(NFT, "            0x01000000,\n", "", "leaving by", id="mark-not-listed"),
    pytest.param(NFT, 'oifname "lo" accept', 'oifname "wan" accept', "leaving by wan", id="another-link-for-lo"),
    pytest.param(
        NFT, f"meta mark & {MASK} != @marks jump source", f"meta mark & {MASK} != @marks accept", "leaving by",
        id="wiped-marks-pass",
    ),
    pytest.param(NFT, "ct status snat,dnat oifname", "ct status snat oifname", "a reply of", id="dnat-forgotten"),
    pytest.param(NFT, f"{MASK} . oifname vmap @left", "0x3e000000 . oifname vmap @left", "leaving", id="mask"),
    pytest.param(NFT, "oifname @downstream accept", "oifname @links accept", "leaving by", id="links-for-downstream"),
    pytest.param(NFT, 'counter name "id-inside-ipv4-tr', 'counter name "id-outside-ipv4-tr', "counted by", id="counter"),
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
    found = told(proof(broken(FILES, file, old, new)))
    assert found == "" if word is None else word in found


def broken(files: dict[str, str], file: str, old: str, new: str) -> dict[str, str]:
    assert old in files[file]
    return {**files, file: files[file].replace(old, new)}


@pytest.mark.parametrize(
    ("file", "old", "new", "why"),
    [
        pytest.param(NFT, "10.9.0.0 : goto", "10.10.7.0 : goto", "is there twice", id="twice"),
        pytest.param(NFT, "10.9.0.0 : goto", "10.9.0.0 : jump", "there is no such chain", id="verdict"),
        pytest.param(NFT, "& 255.255.255.0 vmap", "& 255.0.255.0 vmap", "can't be followed", id="no-network's-mask"),
        pytest.param(NFT, "flush map inet idmark sources-ipv4-24\n", "", "would stay", id="not-flushed"),
        pytest.param(NFT, "policy accept", "policy accept counter", "can't be followed", id="unknown-word"),
        pytest.param(NFT, "goto id-inside", "goto id-nobody", "no such chain", id="unknown-chain"),
        pytest.param(NFT, "jump source", "jump sauce", "there is no chain sauce", id="unknown-jump"),
        pytest.param(NFT, "oifname @detour", "oifname @links", "links is no set for", id="set-of-another-type"),
        pytest.param(
            NFT, "vmap @sources-ipv4-24", "vmap @sources-ipv6-64", "is no verdict", id="map-of-another-family"
        ),
        pytest.param(IP, "protocol 73\n", "protocol 74\n", "routing.txt:7", id="protocol"),
        pytest.param(IP, "lookup 4001 protocol", "lookup 4001 suppress_prefixlength 0 protocol", "lookup", id="option"),
        pytest.param(IP, "ip route replace unreach", "ip route append unreach", "append", id="command"),
    ],
)
def test_what_is_not_known_is_refused(file: str, old: str, new: str, why: str) -> None:
    """A text with anything in it that the reader doesn't know, or that nft would refuse, is told with file and line."""
    files = broken(FILES, file, old, new)
    with pytest.raises(artefact.ArtefactError, match=why) as error:
        artefact.read(files)
    assert str(error.value).startswith(f"{file}:")


# --- the shapes that sources take --------------------------------------------------------------------------------------

SHAPES = {
    "maps": (layers.MANY, layers.HASH),
    "sets": (0, layers.HASH),
    "intervals": (layers.MANY, ((1, 10_000),)),
}
#: What the text of each shape has, and no other.
SHOWS = {"maps": "vmap @sources-ipv4-16", "sets": "@id-inside-ipv4-16 goto", "intervals": "vmap @sources-ipv4 comment"}


@pytest.fixture
def shaped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], dict[str, str]]]:
    """What renders with sources in a given shape, however few they are."""

    def files(shape: str) -> dict[str, str]:
        many, cost = SHAPES[shape]
        monkeypatch.setattr(layers, "MANY", many)
        monkeypatch.setattr(layers, "HASH", cost)
        desired_module._layers.cache_clear()
        return render.files(desire(POLICY, FACTS))

    yield files
    desired_module._layers.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_proved(shape: str, shaped: Callable[[str], dict[str, str]]) -> None:
    """Whichever sets of the kernel hold the sources, of what is rendered no packet goes wrong."""
    files = shaped(shape)
    assert [name for name, words in SHOWS.items() if words in files[NFT]] == [shape]
    assert told(proof(files)) == ""


@pytest.mark.parametrize(
    ("shape", "old", "new", "word"),
    [
        pytest.param("sets", "            10.10.7.0,\n", "", "10.10.7.", id="element-missing"),
        pytest.param("sets", "            10.9.0.0,\n", "            10.9.1.0,\n", "10.9.1.", id="another-network"),
        pytest.param("sets", "ip saddr & 255.255.255.0 @id-outside-ipv4-24 goto id-outside", "ip saddr & 255.255.255.0 @id-outside-ipv4-24 goto id-inside", "10.10.7.", id="another-identity"),
        pytest.param("sets", "            10.9.0.0,\n", "            10.9.0.0,\n            10.10.7.0,\n", "10.10.7.", id="in-two-identities"),
        pytest.param("sets", "            10.10.7.0,\n", "            10.9.0.0,\n            10.10.7.0,\n", None, id="the-first-that-knows-it"),
        pytest.param("sets", "ip saddr & 255.255.0.0 @", "ip saddr & 255.254.0.0 @", "10.11.", id="mask"),
        pytest.param("intervals", "10.9.0.0/24 : goto", "10.9.0.0/25 : goto", "10.9.0.1", id="half-a-prefix"),
        pytest.param("intervals", "10.9.0.0/24 : goto", "10.9.0.0/23 : goto", "10.9.1.", id="two-prefixes"),
        pytest.param("intervals", "            10.10.7.0/24 : goto id-outside,\n", "", "10.10.7.", id="interval-missing"),
        pytest.param("intervals", "ip saddr vmap @sources-ipv4 comment", "ip saddr & 255.255.255.0 vmap @sources-ipv4 comment", "192.0.2.130", id="masked"),
    ],
)  # fmt: skip
def test_what_is_broken_in_a_shape_is_caught(
    shape: str, old: str, new: str, word: str | None, shaped: Callable[[str], dict[str, str]]
) -> None:
    """A fault in any of the shapes is refuted by a packet of the network that it is about."""
    found = told(proof(broken(shaped(shape), NFT, old, new)))
    assert found == "" if word is None else word in found


def test_intervals_that_overlap_are_refused(shaped: Callable[[str], dict[str, str]]) -> None:
    """nft refuses intervals that overlap, and so does the reader."""
    files = broken(shaped("intervals"), NFT, "10.9.0.0/24 : goto", "10.8.0.0/14 : goto")
    with pytest.raises(artefact.ArtefactError, match="conflicting intervals"):
        artefact.read(files)


# --- without translations ----------------------------------------------------------------------------------------------

PLAIN_POLICY = policy(replace(INSIDE, masquerade=False), OUTSIDE, SPARE, downstream=["lan"], kernel=Kernel(nat=False))


def test_without_translations() -> None:
    """On a host that translates nothing, nothing asks for connections, it is proved, and what that rests on is told."""
    desired = desire(PLAIN_POLICY, FACTS)
    files = render.files(desired)
    found = proof(files, desired)
    assert not [line for line in files[NFT].splitlines() if line.strip().startswith("ct ")]
    assert told(found) == ""
    assert any("translates addresses" in limit for limit in found.limits)


def test_translations_that_nothing_asks_for() -> None:
    """The ruleset of a host that translates nothing is refuted for one that may: by a reply."""
    assert "a reply of a connection made to" in told(proof(render.files(desire(PLAIN_POLICY, FACTS))))


OWN_SOURCES = desire(replace(PLAIN_POLICY, kernel=Kernel(nat=False, drop_own_sources=True)), FACTS)


def test_own_sources_dropped() -> None:
    """That nobody may claim to be this host leads no packet astray."""
    files = render.files(OWN_SOURCES)
    assert "fib saddr type local" in files[NFT]
    assert told(proof(files, OWN_SOURCES)) == ""


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(('iifname != "lo" meta pkttype', "meta pkttype"), id="what-the-host-says-to-itself"),
        pytest.param(("pkttype host drop", "pkttype host accept"), id="accept"),
        pytest.param(("type local", "type unicast"), id="everybody-else"),
    ],
)
def test_own_sources_in_other_words(changed: tuple[str, str]) -> None:
    """Nothing else is known about the addresses of this host: it is refused."""
    files = render.files(OWN_SOURCES)
    with pytest.raises(artefact.ArtefactError, match="fib saddr type"):
        artefact.read({**files, NFT: files[NFT].replace(*changed)})


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
