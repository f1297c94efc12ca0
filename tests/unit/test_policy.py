"""The door: good policies become values, bad ones every fault, in exactly these words."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.addresses import Prefix, Prefixes
from agent.draft import FAULTS_PER_LIST, FILE_LIMIT, Draft
from agent.model import Fwmark, Identity, Kernel, Policy, Probe
from agent.policy import Fault, PolicyError, load
from agent.schema import Document, IdentityTable, KernelTable, ProbeTable, schema

GOOD = """\
gateway = "gw1"
downstream = ["lan"]

[identity.inside]
id = 1
link = "wg0"
addresses = ["192.0.2.130", "2001:db8:4::130"]
members = ["10.9.0.0/24", "file:lists/engineering.txt"]
next_hop = "none"
when_down = "unreachable"

[identity.outside]
id = 2
link = "eth0"
addresses = "auto"
next_hop = "auto"

[kernel]
enforce = true
"""
LIST = "# engineering\r\n\r\n10.20.0.0/16   # the second floor\r\n2001:db8:20::/48\n"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a policy with its list and stand beside it, so that messages are the same everywhere."""
    monkeypatch.chdir(tmp_path)
    Path("lists").mkdir()

    def write(policy: str | bytes = GOOD, engineering: str | bytes = LIST) -> Path:
        for name, text in {"policy.toml": policy, "lists/engineering.txt": engineering}.items():
            Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
        return Path("policy.toml")

    return write


def changed(*changes: tuple[str, str]) -> str:
    """The good policy with lines of it replaced, each of which is there once."""
    policy = GOOD
    for old, new in changes:
        assert policy.count(f"{old}\n") == 1, old
        policy = policy.replace(f"{old}\n", f"{new}\n" if new else "")
    return policy


def faults(path: Path) -> list[str]:
    """What a policy is refused for, as it is printed."""
    with pytest.raises(PolicyError) as caught:
        load(path)
    assert str(caught.value) == "\n".join(map(str, caught.value.faults))
    return [str(fault) for fault in caught.value.faults]


# --- good ones -------------------------------------------------------------------------------------------------------


def test_good_policy(write: Write) -> None:
    """A policy becomes the frozen values that it stands for, with the kernel's numbers worked out."""
    policy = load(write())
    assert policy == Policy(
        gateway="gw1",
        downstream=("lan",),
        identities=(
            Identity(
                name="inside",
                id=1,
                link="wg0",
                fwmark=Fwmark(0x01000000, 0x3F000000),
                table=4001,
                priority=4001,
                addresses=(IPv4Address("192.0.2.130"), IPv6Address("2001:db8:4::130")),
                members=Prefixes.of(map(Prefix.parse, ["10.9.0.0/24", "10.20.0.0/16", "2001:db8:20::/48"])),
                next_hop="none",
            ),
            Identity(
                name="outside",
                id=2,
                link="eth0",
                fwmark=Fwmark(0x02000000, 0x3F000000),
                table=4002,
                priority=4002,
                addresses=None,
            ),
        ),
        digest=policy.digest,
    )
    assert len(bytes.fromhex(policy.digest)) == 32


def test_defaults(write: Write) -> None:
    """A policy of the fewest words: what is left out has the defaults that the values have."""
    policy = load(write('gateway = "g"\n[identity.a]\nid = 1\nlink = "wg0"\nmembers = ["10.0.0.0/8"]\n'))
    assert policy.downstream is None
    assert policy.kernel == Kernel()
    assert policy.identities[0].addresses == ()
    assert (policy.identities[0].next_hop, policy.identities[0].when_down) == ("auto", "unreachable")


ONE_LINK = changed(
    ('link = "eth0"', 'link = "wg0"'),
    ('next_hop = "none"', 'next_hop = ["192.0.2.129", "fe80::1"]'),
    ('next_hop = "auto"', 'next_hop = ["192.0.2.1", "fe80::2"]'),
)


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(changed(("id = 2", "id = 63")), id="largest-id"),
        pytest.param(changed(("enforce = true", "mark_mask = 0xff")), id="lowest-bits"),
        pytest.param(changed(("enforce = true", "table_base = 255")), id="first-table-after-the-kernels"),
        pytest.param(changed(("enforce = true", "table_base = 250")), id="last-tables-before-the-kernels"),
        pytest.param(changed(('addresses = "auto"', 'members = ["10.9.0.7"]')), id="nested-member"),
        pytest.param(changed(('addresses = "auto"', 'members = ["192.0.2.0/24"]')), id="address-inside-a-member"),
        pytest.param(changed(('addresses = "auto"', 'members = ["0.0.0.0/0", "::/0"]')), id="catch-all"),
        pytest.param(changed(('when_down = "unreachable"', 'when_down = "outside"')), id="when-down-identity"),
        pytest.param(changed(('when_down = "unreachable"', 'when_down = "main"')), id="when-down-main"),
        pytest.param(changed(('downstream = ["lan"]', "downstream = []")), id="nothing-downstream"),
        pytest.param(changed(('link = "eth0"', 'link = "wg0"')), id="one-link-none-and-auto"),
        pytest.param(ONE_LINK, id="one-link-two-next-hops"),
        pytest.param(changed(('link = "wg0"', 'link = "é*$;.-_@#{x"')), id="odd-link"),
        pytest.param(GOOD.replace("\n", "\r\n"), id="crlf"),
        pytest.param(changed(('next_hop = "none"', 'next_hop = "none"\nmasquerade = true')), id="masquerade"),
        pytest.param(changed(('next_hop = "auto"', 'next_hop = ["10.0.0.1", "fe80::1"]')), id="next-hops-of-auto"),
    ],
)
def test_fine(write: Write, policy: str) -> None:
    """What stands at the edge of a rule, on its good side, is taken without a word."""
    assert load(write(policy)).warnings == ()


@pytest.mark.parametrize(
    ("written", "every", "fail_after", "port"),
    [
        pytest.param("", 2.0, 3, None, id="defaults"),
        pytest.param('every = "100ms", fail_after = 1, port = 1', 0.1, 1, 1, id="least"),
        pytest.param('every = "1h", fail_after = 100, port = 65535', 3600.0, 100, 65535, id="most"),
        pytest.param('every = "60m"', 3600.0, 3, None, id="minutes"),
        pytest.param('every = "1500ms"', 1.5, 3, None, id="milliseconds"),
    ],
)
def test_probe(write: Write, written: str, every: float, fail_after: int, port: int | None) -> None:
    """A probe asks every so many seconds, by ICMP unless there is a port; an identity has none by default."""
    inside, outside = load(write(probing(f'target = "192.0.2.53"{written and ", "}{written}'))).identities
    assert inside.probe == Probe(IPv4Address("192.0.2.53"), every, fail_after, port)
    assert outside.probe is None


def probing(probe: str) -> str:
    """The good policy with a probe of the first identity, in line 6."""
    return changed(("id = 1", f"id = 1\nprobe = {{ {probe} }}"))


def test_probe_of_auto(write: Write) -> None:
    """An identity of "auto" addresses may get one of either family: any target will do."""
    for target in ("192.0.2.53", "2001:db8::53"):
        policy = load(write(changed(("id = 2", f'id = 2\nprobe = {{ target = "{target}" }}'))))
        assert policy.identities[1].probe


def test_files(write: Write) -> None:
    """A policy tells what it was read from, each file once, whoever watches it for changes."""
    members = 'addresses = "auto"\nmembers = ["file:more.txt", "file:lists/engineering.txt", "file:more.txt"]'
    Path("more.txt").write_text("")
    path = write(changed(('addresses = "auto"', members)), engineering="")
    assert load(path).files == ("policy.toml", "lists/engineering.txt", "more.txt")


@pytest.mark.parametrize(
    ("policy", "files"),
    [
        pytest.param("x", ("policy.toml",), id="not-toml"),
        pytest.param(changed(("id = 1", "id = 0")), ("policy.toml", "lists/engineering.txt"), id="sound-list"),
        pytest.param(
            GOOD.replace("engineering", "absent"), ("policy.toml", "lists/absent.txt"), id="list-that-is-not-there"
        ),
    ],
)
def test_files_of_a_faulty_policy(write: Write, policy: str, files: tuple[str, ...]) -> None:
    """What was read, or could not be, is known of a policy with faults too: a change of it may be their end."""
    with pytest.raises(PolicyError) as caught:
        load(write(policy))
    assert caught.value.files == files


def test_id_at_lowest_bit(write: Write) -> None:
    """The fwmark of identity n is n, counted from the lowest bit of the mask."""
    policy = load(write(changed(("enforce = true", "mark_mask = 0x3c"))))
    assert [str(identity.fwmark) for identity in policy.identities] == ["0x4/0x3c", "0x8/0x3c"]


def test_absolute_list(write: Write, tmp_path: Path) -> None:
    """A list may be named by an absolute path."""
    other = tmp_path / "other.txt"
    other.write_text("10.77.0.0/16\n")
    members = f'members = ["file:{other}"]'
    policy = load(write(changed(('members = ["10.9.0.0/24", "file:lists/engineering.txt"]', members))))
    assert [*policy.identities[0].members] == [Prefix.parse("10.77.0.0/16")]


def test_list_is_beside_the_policy(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative list lies beside the policy, wherever one stands; and it is shown by the way to there."""
    write(engineering="10.20.0.1/16\n")
    monkeypatch.chdir(tmp_path.parent)
    told = f"{tmp_path.name}/lists/engineering.txt:1: identity.inside.members: "
    told += "10.20.0.1/16 has host bits set: the network is 10.20.0.0/16"
    assert faults(Path(tmp_path.name) / "policy.toml") == [told]


# --- bad ones --------------------------------------------------------------------------------------------------------

MEMBERS = 'members = ["10.9.0.0/24", "file:lists/engineering.txt"]'
ADDRESSES = 'addresses = ["192.0.2.130", "2001:db8:4::130"]'
INSIDE = "policy.toml:5: identity.inside"


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        # TOML
        pytest.param(
            "id = 1",
            "id 1",
            ["policy.toml:5: is not TOML: Expected '=' after a key in a key/value pair, column 4"],
            id="syntax",
        ),
        pytest.param(
            "id = 1",
            "id = 1\nid = 1",
            ["policy.toml:6: is not TOML: Cannot overwrite a value, column 7"],
            id="key-twice",
        ),
        pytest.param(
            "enforce = true",
            'nft_table = """idmark',
            ["policy.toml:19: is not TOML: Unterminated string, at the end of the file"],
            id="open-string",
        ),
        # keys and kinds
        pytest.param('gateway = "gw1"', "", ["policy.toml: gateway: is missing"], id="no-gateway"),
        pytest.param(
            'downstream = ["lan"]',
            'downstram = ["lan"]',
            ['policy.toml:2: downstram: unknown key; did you mean "downstream"?'],
            id="unknown-key",
        ),
        pytest.param(
            "id = 1", "id = 1\ncolour = 1", ["policy.toml:6: identity.inside.colour: unknown key"], id="odd-key"
        ),
        pytest.param(
            'next_hop = "none"',
            'nexthop = "none"',
            ['policy.toml:9: identity.inside.nexthop: unknown key; did you mean "next_hop"?'],
            id="unknown-identity-key",
        ),
        pytest.param(
            "enforce = true",
            "enforced = true",
            ['policy.toml:19: kernel.enforced: unknown key; did you mean "enforce"?'],
            id="unknown-kernel-key",
        ),
        pytest.param("id = 1", "", ["policy.toml:4: identity.inside.id: is missing"], id="no-id"),
        pytest.param('link = "wg0"', "", ["policy.toml:4: identity.inside.link: is missing"], id="no-link"),
        pytest.param("id = 1", 'id = "1"', [f'{INSIDE}.id: "1" must be an integer, not a string'], id="id-string"),
        pytest.param("id = 1", "id = true", [f"{INSIDE}.id: true must be an integer, not a boolean"], id="id-boolean"),
        pytest.param("id = 1", "id = 1.0", [f"{INSIDE}.id: 1.0 must be an integer, not a float"], id="id-float"),
        pytest.param(
            "id = 1", "id = 1979-05-27", [f"{INSIDE}.id: 1979-05-27 must be an integer, not a date"], id="id-date"
        ),
        pytest.param("id = 1", "id = [1]", [f"{INSIDE}.id: […] must be an integer, not a list"], id="id-list"),
        pytest.param(
            'link = "wg0"',
            "link = {}",
            ["policy.toml:6: identity.inside.link: {} must be a string, not a table"],
            id="link-table",
        ),
        pytest.param(
            MEMBERS,
            'members = "10.9.0.0/24"',
            ['policy.toml:8: identity.inside.members: "10.9.0.0/24" must be a list, not a string'],
            id="members-string",
        ),
        pytest.param(
            MEMBERS,
            "members = [\n  7]",
            ["policy.toml:9: identity.inside.members: 7 must be a string, not an integer"],
            id="member-integer",
        ),
        pytest.param(
            ADDRESSES,
            'addresses = "192.0.2.130"',
            ['policy.toml:7: identity.inside.addresses: "192.0.2.130" must be "auto" or a list'],
            id="addresses-string",
        ),
        pytest.param(
            'next_hop = "none"',
            'next_hop = "192.0.2.129"',
            ['policy.toml:9: identity.inside.next_hop: "192.0.2.129" must be "none", "auto" or a list'],
            id="next-hop-string",
        ),
        pytest.param(
            'next_hop = "none"',
            "next_hop = { words = 1 }",
            ['policy.toml:9: identity.inside.next_hop: {…} must be "none", "auto" or a list'],
            id="next-hop-table",
        ),
        pytest.param(
            "enforce = true",
            "enforce = 1",
            ["policy.toml:19: kernel.enforce: 1 must be true or false, not an integer"],
            id="boolean-integer",
        ),
        pytest.param(
            "[kernel]", "[[kernel]]", ["policy.toml:18: kernel: […] must be a table, not a list"], id="tables"
        ),
        pytest.param(
            "id = 1",
            "id = 0x1" + 40 * "0",
            [f"{INSIDE}.id: 0x1{40 * '0'} does not fit 64 bits"],
            id="id-huge",
        ),
        # probes
        *(
            pytest.param(
                "id = 1",
                f"id = 1\nprobe = {{ {probe} }}",
                [f"policy.toml:6: identity.inside.probe{fault}"],
                id=f"probe-{name}",
            )
            for name, probe, fault in [
                ("empty", "", ".target: is missing"),
                ("key", 'target = "192.0.2.53", evry = "2s"', '.evry: unknown key; did you mean "every"?'),
                ("name", 'target = "dns.example.com"', ".target: dns.example.com is not an address"),
                ("number", "target = 1", ".target: 1 must be a string, not an integer"),
                ("network", 'target = "192.0.2.0/24"', '.target: 192.0.2.0/24 is not a plain address: leave out "/24"'),
                ("loopback", 'target = "127.0.0.1"', ".target: 127.0.0.1 is loopback: it cannot be probed"),
                ("link-local", 'target = "fe80::1"', ".target: fe80::1 is link-local: it cannot be probed"),
                ("multicast", 'target = "224.0.0.1"', ".target: 224.0.0.1 is multicast: it cannot be probed"),
                (
                    "own",
                    'target = "192.0.2.130"',
                    ".target: 192.0.2.130 is an address of identity.inside (line 8): this gateway itself would answer",
                ),
                ("seconds", 'target = "192.0.2.53", every = 2', ".every: 2 must be a string, not an integer"),
                (
                    "unit",
                    'target = "192.0.2.53", every = "2"',
                    '.every: 2 is no duration: "500ms", "2s" and "1m" are',
                ),
                (
                    "sign",
                    'target = "192.0.2.53", every = "-2s"',
                    '.every: -2s is no duration: "500ms", "2s" and "1m" are',
                ),
                ("often", 'target = "192.0.2.53", every = "99ms"', ".every: 99ms does not lie in 100ms..1h"),
                ("seldom", 'target = "192.0.2.53", every = "61m"', ".every: 61m does not lie in 100ms..1h"),
                ("none", 'target = "192.0.2.53", fail_after = 0', ".fail_after: 0 does not lie in 1..100"),
                ("many", 'target = "192.0.2.53", fail_after = 101', ".fail_after: 101 does not lie in 1..100"),
                ("port-0", 'target = "192.0.2.53", port = 0', ".port: 0 is no port: 1..65535 is"),
                ("port-65536", 'target = "192.0.2.53", port = 65536', ".port: 65536 is no port: 1..65535 is"),
                (
                    "port-name",
                    'target = "192.0.2.53", port = "https"',
                    '.port: "https" must be an integer, not a string',
                ),
            ]
        ),
        pytest.param(
            "id = 1",
            'id = 1\nprobe = "192.0.2.53"',
            ['policy.toml:6: identity.inside.probe: "192.0.2.53" must be a table, not a string'],
            id="probe-string",
        ),
        pytest.param(
            "id = 1",
            "id = 1\nflush_flows = 1",
            ["policy.toml:6: identity.inside.flush_flows: 1 must be true or false, not an integer"],
            id="flush-flows-integer",
        ),
        pytest.param(
            ADDRESSES,
            'addresses = ["192.0.2.130"]\nprobe = { target = "2001:db8::53" }',
            [
                "policy.toml:8: identity.inside.probe.target: 2001:db8::53 cannot be probed: "
                "the identity has no ipv6 address to ask from"
            ],
            id="probe-family",
        ),
        pytest.param(
            ADDRESSES,
            'probe = { target = "192.0.2.53" }',
            [
                "policy.toml:7: identity.inside.probe.target: 192.0.2.53 cannot be probed: "
                "the identity has no ipv4 address to ask from"
            ],
            id="probe-of-members",
        ),
        # names
        pytest.param(
            'gateway = "gw1"',
            r'gateway = "gw1\nflush ruleset"',
            [
                r'policy.toml:1: gateway: "gw1\nflush ruleset" is no name: '
                "1 to 63 letters, digits, dots, hyphens and underscores are"
            ],
            id="gateway-newline",
        ),
        pytest.param(
            "[identity.inside]",
            "[identity.Inside]",
            ["policy.toml:4: identity.Inside: Inside is no identity's name: [a-z][a-z0-9_-]{0,30} is"],
            id="name-capital",
        ),
        pytest.param(
            "[identity.inside]",
            '[identity."in side"]',
            ['policy.toml:4: identity."in side": "in side" is no identity\'s name: [a-z][a-z0-9_-]{0,30} is'],
            id="name-space",
        ),
        pytest.param(
            "[identity.inside]",
            f"[identity.{32 * 'a'}]",
            [f"policy.toml:4: identity.{32 * 'a'}: {32 * 'a'} is no identity's name: [a-z][a-z0-9_-]{{0,30}} is"],
            id="name-long",
        ),
        pytest.param(
            "[identity.inside]",
            "[identity.main]",
            ["policy.toml:4: identity.main: main is no identity's name: the policy has another meaning for it"],
            id="name-reserved",
        ),
        # ids, tables, priorities, mask
        pytest.param("id = 1", "id = 0", [f"{INSIDE}.id: 0 does not fit mask 0x3f000000 (1..63)"], id="id-zero"),
        pytest.param(
            "id = 1",
            "id = 64",
            [f"{INSIDE}.id: 64 does not fit mask 0x3f000000 (1..63): kernel.mark_mask = 0x3f800000 would do"],
            id="id-large",
        ),
        pytest.param("id = 1", "id = -1", [f"{INSIDE}.id: -1 does not fit mask 0x3f000000 (1..63)"], id="id-negative"),
        pytest.param(
            "id = 2",
            "id = 1",
            ["policy.toml:13: identity.outside.id: 1 is also the id of identity.inside (line 5)"],
            id="id-twice",
        ),
        pytest.param(
            "enforce = true",
            "table_base = 252",
            [
                f"{INSIDE}.id: 1 gives table 253 (kernel.table_base 252 + 1): "
                "the kernel keeps 0 and 253..255 for itself",
                "policy.toml:13: identity.outside.id: 2 gives table 254 (kernel.table_base 252 + 2): "
                "the kernel keeps 0 and 253..255 for itself",
            ],
            id="table-main",
        ),
        pytest.param(
            "enforce = true",
            "table_base = -1",
            [f"{INSIDE}.id: 1 gives table 0 (kernel.table_base -1 + 1): the kernel keeps 0 and 253..255 for itself"],
            id="table-zero",
        ),
        pytest.param(
            "enforce = true",
            "table_base = 0xfffffffe",
            [
                "policy.toml:13: identity.outside.id: 2 gives table 4294967296 (kernel.table_base 4294967294 + 2): "
                "the kernel has tables 1..4294967295"
            ],
            id="table-large",
        ),
        pytest.param(
            "enforce = true",
            "rule_priority = 32764",
            [
                "policy.toml:13: identity.outside.id: 2 gives rule priority 32766 (kernel.rule_priority 32764 + 2): "
                "the kernel's rule for table main has 32766, ours come before it"
            ],
            id="priority-main",
        ),
        pytest.param(
            "enforce = true",
            "rule_priority = -1",
            [
                f"{INSIDE}.id: 1 gives rule priority 0 (kernel.rule_priority -1 + 1): "
                "the kernel's rule for table local has 0, ours come after it"
            ],
            id="priority-zero",
        ),
        pytest.param(
            "enforce = true",
            "mark_mask = 0",
            ["policy.toml:19: kernel.mark_mask: 0 is no mask: 1 to 0xffffffff is"],
            id="mask-zero",
        ),
        pytest.param(
            "enforce = true",
            "mark_mask = 0x100000000",
            ["policy.toml:19: kernel.mark_mask: 4294967296 is no mask: 1 to 0xffffffff is"],
            id="mask-large",
        ),
        pytest.param(
            "enforce = true",
            "mark_mask = 0x30300000",
            ["policy.toml:19: kernel.mark_mask: 808452096 (0x30300000) is no mask: its bits must stand side by side"],
            id="mask-gap",
        ),
        pytest.param(
            "enforce = true",
            'nft_table = "filter"',
            [
                "policy.toml:19: kernel.nft_table: filter is no name of ours: "
                '"idmark" and up to 25 letters, digits or underscores are'
            ],
            id="nft-table",
        ),
        pytest.param(
            "enforce = true",
            "hook_priority = -100",
            [
                "policy.toml:19: kernel.hook_priority: -100 does not lie in -199..-101: "
                "after conntrack (-200), before dstnat (-100)"
            ],
            id="hook-late",
        ),
        pytest.param(
            "enforce = true",
            "hook_priority = -200",
            [
                "policy.toml:19: kernel.hook_priority: -200 does not lie in -199..-101: "
                "after conntrack (-200), before dstnat (-100)"
            ],
            id="hook-early",
        ),
        # links
        *(
            pytest.param(
                'link = "wg0"',
                f"link = {link}",
                [f"policy.toml:6: identity.inside.link: {shown} {rule}"],
                id=f"link-{name}",
            )
            for name, link, shown, rule in [
                ("empty", '""', '""', "is no link name: the kernel takes 1 to 15 bytes"),
                ("long", '"wg0123456789abcd"', "wg0123456789abcd", "is no link name: the kernel takes 1 to 15 bytes"),
                ("bytes", '"éééééééé"', json.dumps("éééééééé"), "is no link name: the kernel takes 1 to 15 bytes"),
                ("slash", '"wg/0"', "wg/0", 'is no link name: it holds "/"'),
                ("colon", '"eth0:1"', "eth0:1", 'is no link name: it holds ":"'),
                ("space", '"wg 0"', '"wg 0"', 'is no link name: it holds " "'),
                ("percent", '"wg%d"', "wg%d", 'is no link name: it holds "%"'),
                ("quote", "'wg\"0'", r'"wg\"0"', r'is no link name: it holds "\""'),
                ("backslash", r"'wg\0'", r'"wg\\0"', r'is no link name: it holds "\\"'),
                ("control", r'"wg\u001b"', r'"wg\u001b"', r'is no link name: it holds "\u001b"'),
                ("wildcard", '"wg*"', "wg*", "is no link name: nft takes the last * for a wildcard"),
                ("dots", '".."', "..", "is no link name: the kernel keeps it for itself"),
                ("all", '"all"', "all", "is no link name: the kernel keeps it for itself"),
                ("loopback", '"lo"', "lo", "is the loopback: nothing leaves the host by it"),
            ]
        ),
        pytest.param(
            'link = "eth0"',
            'link = "lan"',
            ["policy.toml:2: downstream: lan is the link of identity.outside (line 14)"],
            id="downstream-is-a-link",
        ),
        pytest.param(
            'downstream = ["lan"]',
            'downstream = [\n  "lan",\n  "lan",\n]',
            ["policy.toml:4: downstream: lan stands there twice (line 3)"],
            id="downstream-twice",
        ),
        pytest.param(
            'downstream = ["lan"]',
            'downstream = ["lan:1"]',
            ['policy.toml:2: downstream: lan:1 is no link name: it holds ":"'],
            id="downstream-name",
        ),
        pytest.param(
            'downstream = ["lan"]',
            'downstream = "lan"',
            ['policy.toml:2: downstream: "lan" must be "auto" or a list'],
            id="downstream-string",
        ),
        # addresses
        *(
            pytest.param(
                ADDRESSES,
                f'addresses = ["{address}"]',
                [f"policy.toml:7: identity.inside.addresses: {address} {rule}"],
                id=f"address-{name}",
            )
            for name, address, rule in [
                ("length", "192.0.2.130/24", 'is not a plain address: leave out "/24"'),
                ("zone", "2001:db8::1%wg0", 'is not a plain address: leave out "%wg0"'),
                ("word", "gw.example.com", "is not an address"),
                ("octet", "192.0.2.256", "is not an address"),
                ("multicast", "ff02::1", "is multicast: it cannot be a source"),
                ("loopback", "127.0.0.1", "is loopback: it cannot be a source"),
                ("link-local", "fe80::1", "is link-local: it cannot be a source"),
                ("unspecified", "::", "is unspecified: it cannot be a source"),
                ("broadcast", "255.255.255.255", "is limited broadcast: it cannot be a source"),
                ("mapped", "::ffff:192.0.2.1", "is IPv4-mapped: it cannot be a source"),
            ]
        ),
        pytest.param(
            ADDRESSES,
            'addresses = [\n  "192.0.2.130",\n  "192.0.2.130",\n]',
            ["policy.toml:9: identity.inside.addresses: 192.0.2.130 is also an address of identity.inside (line 8)"],
            id="address-twice",
        ),
        pytest.param(
            'addresses = "auto"',
            'addresses = ["2001:db8:4:0::130"]',
            [
                "policy.toml:15: identity.outside.addresses: "
                "2001:db8:4::130 is also an address of identity.inside (line 7)"
            ],
            id="address-of-two",
        ),
        pytest.param(
            'addresses = "auto"',
            'members = ["192.0.2.130/32"]',
            ["policy.toml:15: identity.outside.members: 192.0.2.130 is also an address of identity.inside (line 7)"],
            id="address-is-a-member",
        ),
        pytest.param(
            "id = 1",
            'id = 1\nclamp_mss = true\naddress = "192.0.2.1"',
            ['policy.toml:7: identity.inside.address: unknown key; did you mean "addresses"?'],
            id="address-singular",
        ),
        # members
        *(
            pytest.param(
                MEMBERS,
                f'members = ["10.0.0.0/8",\n  "{member}"]',
                [f"policy.toml:9: identity.inside.members: {member} {rule}"],
                id=f"member-{name}",
            )
            for name, member, rule in [
                ("host-bits", "10.0.1.7/24", "has host bits set: the network is 10.0.1.0/24"),
                ("length", "10.0.1.0/33", "is not a network"),
                ("range", "10.0.0.1-10.0.0.9", "is not a network"),
                ("netmask", "10.0.0.0/255.0.0.0", "is not a network"),
                ("multicast", "224.0.0.0/24", "is multicast: it cannot be a source"),
                ("loopback", "127.1.0.0/16", "is loopback: it cannot be a source"),
                ("link-local", "169.254.0.0/16", "is link-local: it cannot be a source"),
                ("link-local-6", "fe80::/64", "is link-local: it cannot be a source"),
                ("unspecified", "0.0.0.0", "is unspecified: it cannot be a source"),
                ("mapped", "::ffff:10.0.0.0/104", "is IPv4-mapped: it cannot be a source"),
                ("no-file", "file:", "names no file"),
            ]
        ),
        pytest.param(
            MEMBERS,
            'members = [\n  "10.9.0.0/24",\n  # again\n  "10.9.0.0/24",\n]',
            ["policy.toml:11: identity.inside.members: 10.9.0.0/24 is also a member of identity.inside (line 9)"],
            id="member-twice",
        ),
        pytest.param(
            'addresses = "auto"',
            'members = ["10.9.0.0/24"]',
            ["policy.toml:15: identity.outside.members: 10.9.0.0/24 is also a member of identity.inside (line 8)"],
            id="member-of-two",
        ),
        pytest.param(
            'addresses = "auto"',
            'members = ["10.20.0.0/16"]',
            [
                "policy.toml:15: identity.outside.members: "
                "10.20.0.0/16 is also a member of identity.inside (lists/engineering.txt:3)"
            ],
            id="member-in-a-list",
        ),
        pytest.param(
            'addresses = "auto"',
            'members = ["file:lists/engineering.txt"]',
            [
                "lists/engineering.txt:3: identity.outside.members: "
                "10.20.0.0/16 is also a member of identity.inside (line 3)",
                "lists/engineering.txt:4: identity.outside.members: "
                "2001:db8:20::/48 is also a member of identity.inside (line 4)",
            ],
            id="list-of-two",
        ),
        pytest.param(
            'addresses = "auto"',
            "",
            ["policy.toml:12: identity.outside: has neither an address nor a member"],
            id="nothing-to-route",
        ),
        # lists
        pytest.param(
            MEMBERS,
            'members = ["10.9.0.0/24",\n  "file:lists/sales.txt"]',
            ["policy.toml:9: identity.inside.members: lists/sales.txt cannot be read: No such file or directory"],
            id="list-missing",
        ),
        pytest.param(
            MEMBERS,
            'members = ["file:lists"]',
            ["policy.toml:8: identity.inside.members: lists is a directory"],
            id="list-dir",
        ),
        pytest.param(
            MEMBERS,
            'members = ["file:/dev/zero"]',
            ["policy.toml:8: identity.inside.members: /dev/zero is not a regular file"],
            id="list-device",
        ),
        pytest.param(
            MEMBERS,
            r'members = ["file:a\u0000b"]',
            [r'policy.toml:8: identity.inside.members: "a\u0000b" cannot be read: a NUL is in its name'],
            id="list-nul",
        ),
        # next hops
        pytest.param(
            'next_hop = "none"',
            'next_hop = ["192.0.2.129", "192.0.2.1"]',
            ["policy.toml:9: identity.inside.next_hop: 192.0.2.1 is a second ipv4 next hop, beside 192.0.2.129"],
            id="next-hop-second",
        ),
        pytest.param(
            'next_hop = "none"',
            'next_hop = ["192.0.2.130"]',
            ["policy.toml:9: identity.inside.next_hop: 192.0.2.130 is the identity's own address"],
            id="next-hop-own",
        ),
        pytest.param(
            'next_hop = "none"',
            "next_hop = []",
            ['policy.toml:9: identity.inside.next_hop: [] holds no next hop: write "none" for a point-to-point link'],
            id="next-hop-empty",
        ),
        pytest.param(
            'next_hop = "none"',
            'next_hop = ["192.0.2.129/25"]',
            ['policy.toml:9: identity.inside.next_hop: 192.0.2.129/25 is not a plain address: leave out "/25"'],
            id="next-hop-length",
        ),
        pytest.param(
            'next_hop = "none"',
            'next_hop = ["fe80::1%wg0"]',
            ['policy.toml:9: identity.inside.next_hop: fe80::1%wg0 is not a plain address: leave out "%wg0"'],
            id="next-hop-zone",
        ),
        pytest.param(
            'next_hop = "none"',
            'next_hop = ["224.0.0.1"]',
            ["policy.toml:9: identity.inside.next_hop: 224.0.0.1 is multicast: it cannot be a next hop"],
            id="next-hop-multicast",
        ),
        pytest.param(
            'addresses = "auto"\nnext_hop = "auto"',
            'addresses = ["203.0.113.2"]\nnext_hop = ["203.0.113.1",\n  "fe80::1"]',
            [
                "policy.toml:17: identity.outside.next_hop: fe80::1 leads nowhere: "
                "the identity has no ipv6 address or member"
            ],
            id="next-hop-family",
        ),
        pytest.param(
            'link = "eth0"\naddresses = "auto"\nnext_hop = "auto"',
            'link = "wg0"\naddresses = "auto"\nnext_hop = "none"',
            [
                "policy.toml:14: identity.outside.link: wg0 is also the link of identity.inside (line 6): "
                'their next hops must differ, and both are "none" for ipv4'
            ],
            id="shared-link",
        ),
        # when_down and masquerade
        pytest.param(
            'when_down = "unreachable"',
            'when_down = "outsde"',
            [
                "policy.toml:10: identity.inside.when_down: "
                'outsde is neither "unreachable", "main" nor an identity; did you mean "outside"?'
            ],
            id="when-down-unknown",
        ),
        pytest.param(
            'when_down = "unreachable"',
            'when_down = "inside"',
            ["policy.toml:10: identity.inside.when_down: inside closes a cycle: inside -> inside"],
            id="when-down-itself",
        ),
        pytest.param(
            'when_down = "unreachable"',
            "when_down = false",
            ["policy.toml:10: identity.inside.when_down: false must be a string, not a boolean"],
            id="when-down-boolean",
        ),
        pytest.param(
            ADDRESSES,
            'addresses = ["192.0.2.130"]\nmasquerade = true',
            [
                "policy.toml:8: identity.inside.masquerade: true cannot work: "
                "the identity has ipv6 members, and no ipv6 address to translate them to"
            ],
            id="masquerade-family",
        ),
    ],
)
def test_bad_policy(write: Write, old: str, new: str, messages: list[str]) -> None:
    """One thing wrong in a good policy gives exactly these messages, and no other."""
    assert faults(write(changed((old, new)))) == messages


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        pytest.param("", ["policy.toml: gateway: is missing", "policy.toml: identity: is missing"], id="empty"),
        pytest.param('gateway = "g"\n[identity]\n', ["policy.toml:2: identity: holds no identity"], id="no-identity"),
        pytest.param(
            'gateway = "g"\nidentity = 7\n',
            ["policy.toml:2: identity: 7 must be a table, not an integer"],
            id="identity-integer",
        ),
        pytest.param(
            'gateway = "g"\n[identity]\na = 7\n',
            ["policy.toml:3: identity.a: 7 must be a table, not an integer"],
            id="table-integer",
        ),
        pytest.param(
            b'\xef\xbb\xbfgateway = "g"\n',
            ["policy.toml:1: begins with a byte order mark: save it as UTF-8 without one"],
            id="byte-order-mark",
        ),
        pytest.param(b'\n# caf\xe9\ngateway = "g"\n', ["policy.toml:2: is not UTF-8"], id="latin-1"),
        pytest.param(
            f"gateway = {10_000 * '['}", ["policy.toml: is not TOML: nested too deeply"], id="nested-too-deeply"
        ),
    ],
)
def test_bad_file(write: Write, text: str | bytes, messages: list[str]) -> None:
    """What is wrong with a policy as a whole is told like any other fault."""
    assert faults(write(text)) == messages


def test_number_of_thousands_of_digits(write: Write) -> None:
    """A number that Python itself won't read is a fault of the file, not a traceback."""
    assert len(told := faults(write(changed(("id = 1", f"id = {5000 * '9'}"))))) == 1
    assert told[0].startswith("policy.toml: is not TOML: ")


def test_policy_missing(tmp_path: Path) -> None:
    """A policy that isn't there is told by the name that the reader gave it."""
    assert faults(tmp_path / "policy.toml") == [f"{tmp_path}/policy.toml: cannot be read: No such file or directory"]
    assert faults(tmp_path) == [f"{tmp_path}: is a directory"]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        pytest.param(
            "10.1.0.0/16\n\n10.2.0.1/16\nfoo bar\n10.1.0.0/16\n",
            [
                "lists/engineering.txt:3: identity.inside.members: "
                "10.2.0.1/16 has host bits set: the network is 10.2.0.0/16",
                'lists/engineering.txt:4: identity.inside.members: "foo bar" is not a network',
                "lists/engineering.txt:5: identity.inside.members: "
                "10.1.0.0/16 is also a member of identity.inside (line 1)",
            ],
            id="lines",
        ),
        pytest.param(
            "10.9.0.0/24 # there already\n192.0.2.130\n",
            [
                "lists/engineering.txt:1: identity.inside.members: "
                "10.9.0.0/24 is also a member of identity.inside (policy.toml:8)",
                "lists/engineering.txt:2: identity.inside.members: "
                "192.0.2.130 is also an address of identity.inside (policy.toml:7)",
            ],
            id="also-in-the-policy",
        ),
        pytest.param(
            "file:other.txt\n",
            ["lists/engineering.txt:1: identity.inside.members: file:other.txt is not a network"],
            id="list-in-a-list",
        ),
        pytest.param(
            "root:$6$salt$hash:19000:0:::\n",
            ["lists/engineering.txt:1: identity.inside.members: this line is not a network"],
            id="a-secret",
        ),
        pytest.param(
            "10.1.0.0/16\x0b10.2.0.0/16\n",
            [r'lists/engineering.txt:1: identity.inside.members: "10.1.0.0/16\u000b10.2.0.0/16" is not a network'],
            id="no-line-end",
        ),
        pytest.param(
            b"10.1.0.0/16\n\xff\n",
            ["policy.toml:8: identity.inside.members: lists/engineering.txt is not UTF-8 (line 2)"],
            id="not-utf-8",
        ),
        pytest.param(
            b"\xef\xbb\xbf10.1.0.0/16\n",
            [
                "policy.toml:8: identity.inside.members: lists/engineering.txt begins with a byte order mark: "
                "save it as UTF-8 without one (line 1)"
            ],
            id="byte-order-mark",
        ),
    ],
)
def test_bad_list(write: Write, text: str | bytes, messages: list[str]) -> None:
    """What is wrong in a list is told by the list's own file and line."""
    assert faults(write(engineering=text)) == messages


def test_unreadable_list(write: Write) -> None:
    """A list that may not be read is a fault of the member that names it."""
    path = write()
    Path("lists/engineering.txt").unlink()
    Path("lists/engineering.txt").symlink_to("engineering.txt")  # root may read anything but this
    told = "policy.toml:8: identity.inside.members: lists/engineering.txt cannot be read: "
    assert faults(path) == [told + "Too many levels of symbolic links"]


def test_endless_list(write: Write) -> None:
    """A list is read up to a size that no list of prefixes has."""
    path = write()
    os.truncate("lists/engineering.txt", FILE_LIMIT + 1)
    told = "policy.toml:8: identity.inside.members: lists/engineering.txt is larger than 64 MiB"
    assert faults(path) == [told]


def test_empty_list_alone(write: Write) -> None:
    """An identity whose only list is empty has no member: likely the list was cut off."""
    policy = changed((ADDRESSES, ""), (MEMBERS, 'members = ["file:lists/engineering.txt"]'))
    told = "policy.toml:4: identity.inside: has neither an address nor a member"
    assert faults(write(policy, engineering="# none\n")) == [told]


# --- many at once ----------------------------------------------------------------------------------------------------


def test_every_fault_in_one_run(write: Write) -> None:
    """Faults of keys, kinds, values, lists and of what values are to each other are all told in one run, in order."""
    policy = """\
gateway = "gw 1"
downstram = ["lan"]
[identity.inside]
id = "1"
addresses = ["192.0.2.130", "2001:db8:4::130/64", 5]
members = ["10.9.0.0/24", "file:lists/engineering.txt",
  "10.0.0.1/24",
  "10.9.0.0/24"]
when_down = "elsewhere"

[identity.alice]
id = 64
link = "eth0"
addresses = ["192.0.2.130"]

[identity.bob]
id = 64
link = "eth0"
members = [
  "10.9.0.0/24",
  "file:lists/nowhere.txt",
]
"""
    assert faults(write(policy, engineering="10.1.0.0/16\nfoo\n")) == [
        "lists/engineering.txt:2: identity.inside.members: foo is not a network",
        'policy.toml:1: gateway: "gw 1" is no name: 1 to 63 letters, digits, dots, hyphens and underscores are',
        'policy.toml:2: downstram: unknown key; did you mean "downstream"?',
        "policy.toml:3: identity.inside.link: is missing",
        'policy.toml:4: identity.inside.id: "1" must be an integer, not a string',
        'policy.toml:5: identity.inside.addresses: 2001:db8:4::130/64 is not a plain address: leave out "/64"',
        "policy.toml:5: identity.inside.addresses: 5 must be a string, not an integer",
        "policy.toml:7: identity.inside.members: 10.0.0.1/24 has host bits set: the network is 10.0.0.0/24",
        "policy.toml:8: identity.inside.members: 10.9.0.0/24 is also a member of identity.inside (line 6)",
        'policy.toml:9: identity.inside.when_down: elsewhere is neither "unreachable", "main" nor an identity',
        "policy.toml:12: identity.alice.id: 64 does not fit mask 0x3f000000 (1..63): "
        "kernel.mark_mask = 0x3f800000 would do",
        "policy.toml:14: identity.alice.addresses: 192.0.2.130 is also an address of identity.inside (line 5)",
        "policy.toml:17: identity.bob.id: 64 does not fit mask 0x3f000000 (1..63): "
        "kernel.mark_mask = 0x3f800000 would do",
        "policy.toml:17: identity.bob.id: 64 is also the id of identity.alice (line 12)",
        "policy.toml:20: identity.bob.members: 10.9.0.0/24 is also a member of identity.inside (line 6)",
        "policy.toml:21: identity.bob.members: lists/nowhere.txt cannot be read: No such file or directory",
    ]


def test_cycle_of_three(write: Write) -> None:
    """A cycle of when_down is told once, with the way around; who only leads into it is not at fault."""
    tables = "".join(
        f'[identity.{name}]\nid = {number}\nlink = "{name}"\naddresses = "auto"\nwhen_down = "{road}"\n'
        for number, (name, road) in enumerate([("d", "a"), ("a", "b"), ("b", "c"), ("c", "a")], 1)
    )
    told = "policy.toml:11: identity.a.when_down: b closes a cycle: a -> b -> c -> a"
    assert faults(write(f'gateway = "g"\n{tables}')) == [told]


def test_one_links_own_addresses(write: Write) -> None:
    """Of the identities on one link only one can have the link's own addresses."""
    policy = ONE_LINK.replace(ADDRESSES, 'addresses = "auto"')
    told = 'policy.toml:15: identity.outside.addresses: "auto" also stands in identity.inside (line 7): '
    assert faults(write(policy)) == [told + "the addresses of wg0 can be one identity's"]


def test_families_apart_on_one_link(write: Write) -> None:
    """Two identities with no family in common may share a link and the way out of it."""
    policy = changed(
        ('link = "eth0"', 'link = "wg0"'),
        (ADDRESSES, 'addresses = ["192.0.2.130"]'),
        (MEMBERS, "members = []"),
        ('addresses = "auto"', 'addresses = ["2001:db8:4::130"]'),
        ('next_hop = "auto"', 'next_hop = "none"'),
    )
    assert len(load(write(policy)).identities) == 2


def test_absent_next_hops_on_one_link(write: Write) -> None:
    """A family for which neither of two identities on one link names a next hop is a family they can't share."""
    policy = ONE_LINK.replace(', "fe80::1"', "").replace(', "fe80::2"', "")
    told = "policy.toml:14: identity.outside.link: wg0 is also the link of identity.inside (line 6): "
    assert faults(write(policy)) == [told + "their next hops must differ, and both are absent for ipv6"]


def test_wholly_wrong_list(write: Write) -> None:
    """A list that is wrong in every line is told by its first lines and the number of the others."""
    told = faults(write(engineering="a,b,c\n" * 500))
    assert told[:2] == [
        f"lists/engineering.txt:{line}: identity.inside.members: a,b,c is not a network" for line in (1, 2)
    ]
    more = f"lists/engineering.txt:{FAULTS_PER_LIST + 1}: identity.inside.members: … and {500 - FAULTS_PER_LIST} more"
    assert told[FAULTS_PER_LIST:] == [more]


def test_long_list_twice(write: Write) -> None:
    """A hundred thousand repeated prefixes are found, and told as a few lines."""
    network = "".join(f"10.{i >> 12 & 255}.{i >> 4 & 255}.{(i & 15) * 16}/28\n" for i in range(50_000))
    told = faults(write(engineering=network * 3))
    assert len(told) == FAULTS_PER_LIST + 1
    assert told[0] == (
        "lists/engineering.txt:50001: identity.inside.members: 10.0.0.0/28 is also a member of identity.inside (line 1)"
    )
    assert told[-1].endswith(f"… and {100_000 - FAULTS_PER_LIST} more")


def test_long_list(write: Write) -> None:
    """A list of a hundred thousand prefixes is all there, sorted."""
    lines = [f"2001:db8:{i >> 8:x}:{i & 255:x}::/64" for i in range(100_000)]
    members = load(write(engineering="\n".join(reversed(lines)))).identities[0].members
    assert [*members][1:] == [*map(Prefix.parse, lines)]


@pytest.mark.parametrize("line", ["10.77.0.0/16", "nothing"])
def test_nothing_is_kept_of_what_was_read(write: Write, line: str) -> None:
    """A daemon reads its policy again and again: no draft, with all its lists, is left to the collector of cycles."""
    path = write(engineering=f"{line}\n")
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(PolicyError):
            load(path)
        assert not [each for each in gc.get_objects() if isinstance(each, Draft)]
    finally:
        gc.enable()


def test_fault_of_an_unprintable_file() -> None:
    """A file's name cannot write on the reader's terminal what isn't there."""
    assert str(Fault("a\x1b[2J\n", 3, "gateway", "is missing")) == r'"a\u001b[2J\n":3: gateway: is missing'


# --- warnings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "warnings"),
    [
        pytest.param("rule_priority = 5207", [], id="priority-below-tailscale"),
        pytest.param(
            "rule_priority = 5208",
            [
                "policy.toml:13: identity.outside.id: 2 gives rule priority 5210 (kernel.rule_priority 5208 + 2): "
                "where there are Tailscale's rules, 5210..5270, they come first"
            ],
            id="priority-of-tailscale",
        ),
        pytest.param("hook_priority = -149", [], id="hook-after-mangle"),
        pytest.param(
            "hook_priority = -150",
            [
                "policy.toml:19: kernel.hook_priority: -150 is not after mangle (-150): "
                "a table there that restores marks takes ours away"
            ],
            id="hook-with-mangle",
        ),
    ],
)
def test_warnings(write: Write, kernel: str, warnings: list[str]) -> None:
    """What works but hurts is told like a fault, and refuses nothing."""
    assert list(load(write(changed(("enforce = true", kernel)))).warnings) == warnings


def test_empty_list(write: Write) -> None:
    """A list that holds nothing, as an export does that was cut short, is told: it opens whoever was on it."""
    path = write(engineering="# nobody any more\n")
    assert load(path).warnings == ("lists/engineering.txt: identity.inside.members: holds no prefix",)


# --- the digest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "engineering"),
    [
        pytest.param("# a comment\n" + GOOD, LIST, id="comment"),
        pytest.param(changed(("[kernel]", ""), ("enforce = true", "")), LIST, id="defaults-left-out"),
        pytest.param(changed(("enforce = true", "mark_mask = 1_056_964_608")), LIST, id="defaults-spelled-out"),
        pytest.param(GOOD, "2001:DB8:20:0::/48\n10.20.0.0/16", id="list-spelling"),
        pytest.param(
            changed((MEMBERS, 'members = ["2001:db8:20::/48", "10.20.0.0/16", "10.9.0.0/24"]')), "", id="list-inlined"
        ),
        pytest.param(changed((ADDRESSES, 'addresses = ["2001:db8:4::130", "192.0.2.130"]')), LIST, id="address-order"),
    ],
)
def test_digest_keeps(write: Write, policy: str, engineering: str) -> None:
    """Comments, order and spelling don't change the digest."""
    digest = load(write()).digest
    assert load(write(policy, engineering)).digest == digest


MEANINGS = {
    "as-it-is": GOOD,
    "gateway": changed(('gateway = "gw1"', 'gateway = "gw2"')),
    "downstream": changed(('downstream = ["lan"]', 'downstream = ["lan", "dmz"]')),
    "downstream-auto": changed(('downstream = ["lan"]', "")),
    "downstream-none": changed(('downstream = ["lan"]', "downstream = []")),
    "name": changed(("[identity.inside]", "[identity.corp]")),
    "id": changed(("id = 1", "id = 3")),
    "link": changed(('link = "wg0"', 'link = "wg1"')),
    "address": changed((ADDRESSES, 'addresses = ["192.0.2.130"]')),
    "address-auto": changed((ADDRESSES, 'addresses = "auto"')),
    "no-address": changed((ADDRESSES, "")),
    "member": changed((MEMBERS, 'members = ["10.9.0.0/24"]')),
    "member-length": changed((MEMBERS, 'members = ["10.9.0.0/25"]')),
    "member-family": changed((MEMBERS, 'members = ["::a09:0/120"]')),
    "next-hop-auto": changed(('next_hop = "none"', "")),
    "next-hop": changed(('next_hop = "none"', 'next_hop = ["192.0.2.129"]')),
    "when-down": changed(('when_down = "unreachable"', 'when_down = "main"')),
    "masquerade": changed(("id = 1", "id = 1\nmasquerade = true")),
    "clamp-mss": changed(("id = 1", "id = 1\nclamp_mss = true")),
    "flush-flows": changed(("id = 1", "id = 1\nflush_flows = true")),
    "probe": changed(("id = 1", 'id = 1\nprobe = { target = "192.0.2.53" }')),
    "probe-target": changed(("id = 1", 'id = 1\nprobe = { target = "192.0.2.54" }')),
    "probe-every": changed(("id = 1", 'id = 1\nprobe = { target = "192.0.2.53", every = "500ms" }')),
    "probe-fail-after": changed(("id = 1", 'id = 1\nprobe = { target = "192.0.2.53", fail_after = 4 }')),
    "probe-port": changed(("id = 1", 'id = 1\nprobe = { target = "192.0.2.53", port = 443 }')),
    "mark-mask": changed(("enforce = true", "mark_mask = 0x3f0000")),
    "table-base": changed(("enforce = true", "table_base = 5000")),
    "rule-priority": changed(("enforce = true", "rule_priority = 5000")),
    "nft-table": changed(("enforce = true", 'nft_table = "idmark2"')),
    "hook-priority": changed(("enforce = true", "hook_priority = -144")),
    "enforce": changed(("enforce = true", "enforce = false")),
}


def test_digest_changes(write: Write) -> None:
    """Every change of meaning changes the digest: no two of these policies have one in common."""
    digests = {load(write(policy)).digest: name for name, policy in MEANINGS.items()}
    assert sorted(digests.values()) == sorted(MEANINGS)


TABLES = [
    '[identity.a]\nid = 1\nlink = "wg0"\naddresses = ["192.0.2.1"]\nmembers = [{}]\n',
    '[identity.b]\nid = 2\nlink = "wg1"\naddresses = "auto"\n',
    '[identity.c]\nid = 3\nlink = "wg2"\nmembers = ["10.0.0.0/8"]\n',
    "[kernel]\nenforce = false\n",
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables=st.permutations(TABLES), members=st.permutations(["10.1.0.0/16", "10.1.2.0/24", "::/0", "2001:db8::/32"]))
def test_order_means_nothing(write: Write, tables: list[str], members: list[str]) -> None:
    """Whatever the order of tables and members, the policy is the same value."""

    def policy(tables: list[str], members: list[str]) -> Policy:
        listed = ", ".join(f'"{member}"' for member in members)
        return load(write('gateway = "g"\n' + "".join(tables).replace("{}", listed)))

    assert policy(tables, members) == policy(TABLES, sorted(members))


# --- any document ----------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        *Document.model_fields,
        *IdentityTable.model_fields,
        *KernelTable.model_fields,
        *ProbeTable.model_fields,
        "words",
        "list",
    ]
)
KEYS |= st.text(max_size=3)
SCALARS = st.one_of(
    st.integers(),
    st.booleans(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8"), max_size=4),
    st.dates(),
    st.sampled_from(["auto", "none", "main", "a", "b", "10.0.0.0/8", "10.0.0.1", "::1", "2001:db8::1", "file:x", "lo"]),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))
IDENTITIES = st.dictionaries(
    st.sampled_from("ab") | KEYS, st.dictionaries(KEYS, VALUES, max_size=8) | VALUES, max_size=3
)


def inline(value: Any) -> str:
    """A value as TOML, all on one line."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return (
                json.dumps(value).replace("\x7f", r"\u007f")
                if value.isascii()
                else json.dumps(value, ensure_ascii=False)
            )
        case list():
            return f"[{', '.join(map(inline, value))}]"
        case dict():
            return f"{{{', '.join(f'{inline(key)} = {inline(element)}' for key, element in value.items())}}}"
    return str(value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=5), IDENTITIES)
def test_any_document(write: Write, document: dict[str, Any], identities: dict[str, Any]) -> None:
    """Whatever else stands in a document with a bad name, it is a list of faults, each with a place and a message."""
    document |= {"gateway": "", "identity": identities}
    text = "".join(f"{inline(key)} = {inline(value)}\n" for key, value in document.items())
    with pytest.raises(PolicyError) as caught:
        load(write(text))
    for fault in caught.value.faults:
        assert fault.file == "policy.toml"
        assert fault.message.isprintable()
        assert fault.line is None or 1 <= fault.line <= len(document)


# --- the schema ------------------------------------------------------------------------------------------------------


def test_schema_is_strict() -> None:
    """The schema names every key, what each is for, and allows no other."""
    tables = [schema(), *schema()["$defs"].values()]
    assert len(tables) == 4
    for table in tables:
        assert table["additionalProperties"] is False
        assert all(key["description"] for key in table["properties"].values())


def test_schema_has_no_null() -> None:
    """TOML has no null, and the schema neither."""
    assert "null" not in json.dumps(schema())


def test_schema_requires() -> None:
    """The schema requires what the door requires."""
    assert schema()["required"] == ["gateway", "identity"]
    assert schema()["$defs"]["IdentityTable"]["required"] == ["id", "link"]
    assert "required" not in schema()["$defs"]["KernelTable"]


@pytest.mark.parametrize(
    ("words", "nat"),
    [
        pytest.param("", None, id="default"),
        pytest.param('nat = "auto"', None, id="auto"),
        pytest.param("nat = true", True, id="true"),
        pytest.param("nat = false", False, id="false"),
    ],
)
def test_nat(write: Write, words: str, nat: bool | None) -> None:
    """Whether anything translates is said, or left to the host to show; the digest of what says nothing stays."""
    found = load(write(changed(("enforce = true", f"enforce = true\n{words}"))))
    assert found.kernel.nat is nat
    assert (found.digest == load(write()).digest) == (nat is None)


def test_drop_own_sources(write: Write) -> None:
    """The digest of a policy that doesn't say it is what it was before there was the key."""
    digests = [
        load(write(changed(("enforce = true", f"enforce = true\n{words}")))).digest
        for words in ("", "drop_own_sources = false", "drop_own_sources = true")
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("value", ["1", '"no"', "[]", "0"])
def test_bad_nat(write: Write, value: str) -> None:
    """Anything but "auto", true and false is refused with these words, a number too."""
    (fault,) = faults(write(changed(("enforce = true", f"enforce = true\nnat = {value}"))))
    assert fault.startswith("policy.toml:20: kernel.nat: ")
    assert fault.endswith('must be "auto", true or false')


def test_nat_denied_while_masquerading(write: Write) -> None:
    """A policy that masquerades and says that nothing translates contradicts itself."""
    hop = 'next_hop = "none"'
    (fault,) = faults(write(changed((hop, f"{hop}\nmasquerade = true"), ("enforce = true", "nat = false"))))
    assert "identity.inside.masquerade: true cannot work: kernel.nat = false says that nothing" in fault


def test_schema_has_the_defaults_of_the_values() -> None:
    """The schema's defaults are those of the values that everybody shares."""
    keys = schema()["$defs"]["KernelTable"]["properties"]
    defaults = {name: key["default"] for name, key in keys.items()}
    assert defaults.pop("nat") == "auto"
    assert Kernel(**defaults) == Kernel()


def test_schema_of_words_or_lists() -> None:
    """Where a word or a list may stand, the schema offers the words."""
    identity = schema()["$defs"]["IdentityTable"]["properties"]
    assert identity["addresses"]["oneOf"][0] == {"const": "auto", "type": "string"}
    assert identity["next_hop"]["oneOf"][0] == {"enum": ["none", "auto"], "type": "string"}
    assert identity["next_hop"]["oneOf"][1] == {"items": {"type": "string"}, "type": "array"}
