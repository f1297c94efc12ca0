"""What nft and its transactions do: what survives a load, what is refused, and what packets see meanwhile."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.kernel.conftest import Gateway
from tests.kernel.net import CHOST, Host, fresh_namespace

NETLINK_NETFILTER = 12  # linux/netlink.h
NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h


def count_one(netns: Host) -> None:
    """A table with a counter that has seen one packet, and a map with one element."""
    netns.nft("""
        table inet t {
            counter sent { }
            map source4 {
                type ipv4_addr : verdict; flags interval
                elements = { 127.0.0.0/8 : accept }
            }
            chain output {
                type filter hook output priority 0; policy accept;
                meta l4proto udp counter name sent
            }
        }
    """)
    netns.send("127.0.0.1")
    assert netns.counter("sent") == 1


@pytest.mark.parametrize(
    ("text", "packets", "elements"),
    [
        pytest.param("delete table inet t\ntable inet t {\ncounter sent { }\n}", 0, None, id="delete-table"),
        pytest.param("flush table inet t", 1, 1, id="flush-table"),
        pytest.param("flush chain inet t output", 1, 1, id="flush-chain"),
        pytest.param("add counter inet t sent", 1, 1, id="add-counter"),
        pytest.param("table inet t {\ncounter sent { }\n}", 1, 1, id="declare-again"),
        pytest.param("flush map inet t source4", 1, 0, id="flush-map"),
    ],
)
def test_n1_what_a_load_keeps(netns: Host, text: str, packets: int, elements: int | None) -> None:
    """Only deleting the table zeroes a named counter; flushing a table or chain keeps counters and map elements."""
    count_one(netns)
    netns.nft(text)
    assert netns.counter("sent") == packets
    maps = [item["map"] for item in netns.nft_json("list", "table", "inet", "t") if "map" in item]
    assert [len(item.get("elem", ())) for item in maps] == ([] if elements is None else [elements])


CHAIN = "add chain inet t id-inside"
MAP = "add map inet t m { type ipv4_addr : verdict; }"
ELEMENT = "add element inet t m { 192.0.2.1 : goto id-inside }"


@pytest.mark.parametrize("lines", [(CHAIN, MAP, ELEMENT), (MAP, CHAIN, ELEMENT)])
def test_n2_chains_come_before_the_elements_that_go_to_them(netns: Host, lines: tuple[str, ...]) -> None:
    """In one transaction an element may go to a chain that was declared before it."""
    netns.nft("add table inet t\n" + "\n".join(lines))
    assert "goto id-inside" in netns.run(["nft", "list", "map", "inet", "t", "m"])


def test_n2_an_element_before_its_chain_is_refused(netns: Host) -> None:
    """In one transaction an element that goes to a chain declared later is ENOENT."""
    with pytest.raises(RuntimeError, match="No such file or directory"):
        netns.nft("\n".join(["add table inet t", MAP, ELEMENT, CHAIN]))


def test_n2_a_verdict_is_changed_by_deleting_its_element_first(netns: Host) -> None:
    """Adding an element with another verdict is "File exists"; deleting and adding it in one transaction works."""
    netns.nft("\n".join(["add table inet t", CHAIN, MAP, ELEMENT]))
    change = "add element inet t m { 192.0.2.1 : accept }"
    with pytest.raises(RuntimeError, match="File exists"):
        netns.nft(change)
    netns.nft("delete element inet t m { 192.0.2.1 }\n" + change)
    assert "192.0.2.1 : accept" in netns.run(["nft", "list", "map", "inet", "t", "m"])


def test_n4_the_priority_of_a_base_chain_stays(netns: Host) -> None:
    """A base chain that is declared again with another priority is refused, and keeps the one it had."""
    chain = "table inet t {{\nchain output {{\ntype filter hook output priority {}\n}}\n}}"
    netns.nft(chain.format(-145))
    with pytest.raises(RuntimeError, match="Error"):
        netns.nft(chain.format(-140))
    assert netns.nft_json("list", "chain", "inet", "t", "output")[0]["chain"]["prio"] == -145


def test_n5_one_bad_line_rolls_back_all(netns: Host) -> None:
    """A transaction whose last line the kernel refuses leaves nothing of its first, and says where, with a caret."""
    with pytest.raises(RuntimeError, match="Error") as error:
        netns.nft("add table inet t\nadd chain inet t id-inside\ndelete chain inet t id-outside\n")
    assert re.search(r":3:\d+-\d+: Error: .*\n.*\n *\^+", str(error.value))
    assert netns.nft_json("list", "ruleset") == []


def test_n5_a_check_changes_nothing(netns: Host) -> None:
    """`nft -c` accepts what would load, refuses what would not, and loads nothing."""
    netns.run(["nft", "-c", "-f", "-"], "table inet t {\n}\n")
    with pytest.raises(RuntimeError, match="Error"):
        netns.run(["nft", "-c", "-f", "-"], "table inet t {\n}\ndelete chain inet t id-outside\n")
    assert netns.nft_json("list", "ruleset") == []


def test_n6_host_bits_are_masked_in_silence(netns: Host) -> None:
    """nft takes 10.0.1.7/24 for 10.0.1.0/24 without a word."""
    netns.nft("table inet t {\nset s {\ntype ipv4_addr; flags interval\nelements = { 10.0.1.7/24 }\n}\n}")
    elements = netns.nft_json("list", "set", "inet", "t", "s")[0]["set"]["elem"]
    assert elements == [{"prefix": {"addr": "10.0.1.0", "len": 24}}]


def test_n6_overlaps_are_refused(netns: Host) -> None:
    """An interval map with a prefix inside another is refused as "conflicting intervals"."""
    with pytest.raises(RuntimeError, match="conflicting intervals"):
        netns.nft("""
            table inet t {
                map m {
                    type ipv4_addr : mark; flags interval
                    elements = { 10.0.0.0/8 : 1, 10.1.0.0/16 : 2 }
                }
            }
        """)


@pytest.mark.parametrize("end", ["\n", "; ", ";\n"], ids=["newline", "semicolon", "both"])
def test_n7_a_closed_statement_may_be_followed_by_a_brace(netns: Host, end: str) -> None:
    """A rule loads if a newline or `;` stands between it and the brace that closes its chain."""
    netns.nft(f"table inet t {{\nchain id-inside {{ accept{end}}}\n}}")
    assert len(netns.nft_json("list", "chain", "inet", "t", "id-inside")) == 2


def _binding() -> Path:
    """Where the distribution keeps its python3-nftables."""
    places = [
        path
        for root in ("/usr/lib", "/usr/lib64", "/usr/local/lib")
        for pattern in ("python3*/dist-packages/nftables/nftables.py", "python3*/site-packages/nftables/nftables.py")
        for path in Path(root).glob(pattern)
    ]
    return places[0]


@pytest.fixture
def nftables() -> ModuleType:
    """The distribution's binding, loaded from its file (fact P6)."""
    spec = importlib.util.spec_from_file_location("distribution_nftables", _binding())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_p6_the_binding_loads_by_path(netns: Host, nftables: ModuleType) -> None:
    """The distribution's binding works from any interpreter when loaded from its file, dry run included."""
    nft = nftables.Nftables()
    nft.set_dry_run(True)
    assert nft.cmd("add table inet t") == (0, "", "")
    assert netns.nft_json("list", "ruleset") == []
    nft.set_dry_run(False)
    assert nft.cmd("add table inet t") == (0, "", "")
    assert [item["table"]["name"] for item in netns.nft_json("list", "tables")] == ["t"]


def test_n8_a_context_stays_in_its_namespace(netns: Host, nftables: ModuleType) -> None:
    """A libnftables context that was made in one namespace acts there, wherever its thread has gone."""
    nft = nftables.Nftables()
    with fresh_namespace("other") as other:
        assert nft.cmd("add table inet t")[0] == 0
        assert other.nft_json("list", "tables") == []
    assert len(netns.nft_json("list", "tables")) == 1


def test_n9_flush_ruleset_takes_our_table_and_is_announced(netns: Host) -> None:
    """`flush ruleset` removes every table, and nfnetlink says so."""
    netns.nft("table inet t {\n}")
    with netns.events(NETLINK_NETFILTER, NFNLGRP_NFTABLES) as events:
        netns.nft("flush ruleset")
        assert events.kinds()
    assert netns.nft_json("list", "ruleset") == []


@pytest.mark.parametrize(
    ("words", "announced"),
    [
        pytest.param(["nft", "list", "ruleset"], False, id="list"),
        pytest.param(["nft", "-c", "add", "rule", "inet", "t", "id-inside", "accept"], False, id="check"),
        pytest.param(["nft", "add", "rule", "inet", "t", "id-inside", "accept"], True, id="add-rule"),
        pytest.param(["nft", "add", "table", "inet", "other"], True, id="add-table"),
    ],
)
def test_n10_only_changes_are_announced(netns: Host, words: list[str], announced: bool) -> None:
    """Listing and checking raise no netlink event; adding a rule or a table does."""
    netns.nft("table inet t {\nchain id-inside {\n}\n}")
    with netns.events(NETLINK_NETFILTER, NFNLGRP_NFTABLES) as events:
        netns.run(words)
        assert bool(events.kinds()) is announced


def reads_elements(output: str, table: str) -> bool:
    """Whether libnftables, which prints its messages, asked for elements of a table with a name of four letters."""
    getsetelem, name = 10 << 8 | 13, table.encode().hex(" ")
    messages = output.split("message length")[1:]
    return any(f"| {getsetelem:05} |" in message and f"| {name}  |" in message for message in messages)


DECLARED = "add map inet t m { type ipv4_addr : mark; elements = { 192.0.2.2 : 2 }; }"


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        pytest.param("add element inet t m { 192.0.2.2 : 2 }", True, id="add-element"),
        pytest.param("delete element inet t m { 192.0.2.1 }", True, id="delete-element"),
        pytest.param(DECLARED, False, id="declare-with-elements"),
        pytest.param(f"flush map inet t m\n{DECLARED}", False, id="flush-and-declare"),
        pytest.param(DECLARED.replace("mark;", "mark; flags interval;").replace(" m ", " n "), False, id="intervals"),
        pytest.param(
            "table inet t {\nmap m {\ntype ipv4_addr : mark\nelements = { 192.0.2.2 : 2 }\n}\n}", False, id="block"
        ),
        pytest.param("add rule inet t c ip saddr @m accept", False, id="add-rule"),
        pytest.param("flush table inet t\ndelete map inet t m", False, id="delete-map"),
        pytest.param("list table inet t", False, id="list-table"),
    ],
)
def test_n13_only_commands_on_elements_read_the_sets_of_others(
    netns: Host, nftables: ModuleType, text: str, reads: bool
) -> None:
    """libnftables reads every interval set of the host for `add element` and `delete element`, and for nothing else."""
    netns.nft("table inet zzzz { map m { type ipv4_addr : mark; flags interval; elements = { 10.0.0.0/8 : 1 }; }; }")
    netns.nft("table inet t { map m { type ipv4_addr : mark; elements = { 192.0.2.1 : 1 }; }; chain c { }; }")
    context = nftables.Nftables()
    context.set_debug("mnl")
    code, output, error = context.cmd(text)
    assert (code, error) == (0, "")
    assert reads_elements(output, "zzzz") is reads


def test_n11_object_maps_count_by_mark_and_link(gateway: Gateway) -> None:
    """A map from mark and link to counters counts what matches, heeds only our bits, and lets every packet go on."""
    gw = gateway.gw
    gw.nft("""
        table inet t {
            counter inside { }
            counter behind { }
            map transmit {
                type mark . ifname : counter
                elements = { 0x01000000 . "vpn0" : "inside" }
            }
            chain postrouting {
                type filter hook postrouting priority 300; policy accept;
                counter name meta mark & 0x3f000000 . oifname map @transmit
                meta l4proto udp counter name behind
            }
        }
    """)
    for mark in (0xC100CA6C, 0, 0x02000000):
        gw.send(CHOST["ipv4"], mark=mark)
    assert (gw.counter("inside"), gw.counter("behind")) == (1, 3)


def test_a_verdict_map_by_mark_and_link_falls_through(gateway: Gateway) -> None:
    """`vmap` over mark and link jumps for its element, and lets every other packet go on to the next rule."""
    gw = gateway.gw
    gw.nft("""
        table inet t {
            counter inside { }
            counter others { }
            chain id-inside {
                counter name inside
            }
            map roads {
                type mark . ifname : verdict
                elements = { 0x01000000 . "vpn0" : goto id-inside }
            }
            chain postrouting {
                type filter hook postrouting priority 300; policy accept;
                meta mark & 0x3f000000 . oifname vmap @roads
                meta l4proto udp counter name others
            }
        }
    """)
    for mark in (0xC100CA6C, 0, 0x02000000):
        gw.send(CHOST["ipv4"], mark=mark)
    assert (gw.counter("inside"), gw.counter("others")) == (1, 2)


def flood_while(netns: Host, act: Callable[[], object], times: int) -> int:
    """Send datagrams over lo, 127.0.0.1 to 127.9.9.9, while doing something several times; return how many."""
    stop = threading.Event()
    sent = 0

    def send() -> None:
        nonlocal sent
        while not stop.is_set():
            sock.sendto(b"x", ("127.9.9.9", 9))
            sent += 1

    with netns.udp("127.0.0.1") as sock:
        thread = threading.Thread(target=send)
        thread.start()
        try:
            for _ in range(times):
                act()
        finally:
            stop.set()
            thread.join()
    return sent


MARKING = """
    table inet t {
        counter marked { }
        counter unmarked { }
        chain id-inside {
        }
        map source4 {
            type ipv4_addr : verdict; flags interval
        }
        chain output {
            type route hook output priority -145; policy accept;
        }
        chain seen {
            type filter hook output priority 0; policy accept;
        }
    }
    flush table inet t
    table inet t {
        chain id-inside {
            meta mark set meta mark & 0xc0ffffff | 0x01000000
            counter name marked
        }
        chain output {
            ip daddr 127.9.9.9 ip saddr vmap @source4
        }
        chain seen {
            ip daddr 127.9.9.9 meta mark & 0x3f000000 == 0 counter name unmarked
        }
    }
"""
ELEMENTS = ", ".join(["127.0.0.0/24 : goto id-inside"] + [f"10.{n >> 8}.{n & 255}.0/24 : accept" for n in range(1000)])
FILL = f"add element inet t source4 {{ {ELEMENTS} }}\n"
DECLARE = f"add map inet t source4 {{ type ipv4_addr : verdict; flags interval; elements = {{ {ELEMENTS} }}; }}\n"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("flush map inet t source4\n" + FILL, id="flush-map-and-fill"),
        pytest.param(f"flush map inet t source4\n{DECLARE}", id="flush-map-and-declare"),
        pytest.param(MARKING, id="flush-table-and-rules"),
        pytest.param(MARKING + "flush map inet t source4\n" + FILL, id="everything"),
    ],
)
def test_n12_one_transaction_loses_no_packet(netns: Host, text: str) -> None:
    """Refilling the same interval map, or the table's rules, in one transaction lets no packet pass unmarked."""
    netns.nft(MARKING + FILL)
    sent = flood_while(netns, lambda: netns.nft(text), times=20)
    assert sent > 1000
    assert (netns.counter("marked"), netns.counter("unmarked")) == (sent, 0)


def test_n24_a_full_set_is_enfile(netns: Host) -> None:
    """A hash set takes as many elements as its `size` says; one more is "Too many open files in system"."""
    netns.nft("table inet t {\nset s {\ntype ipv4_addr; size 2\n}\n}")
    netns.nft("add element inet t s { 192.0.2.1, 192.0.2.2 }")
    with pytest.raises(RuntimeError, match="Too many open files in system"):
        netns.nft("add element inet t s { 192.0.2.3 }")


# --- more that the ruleset builds on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ours_first", [True, False], ids=["loaded-first", "loaded-last"])
@pytest.mark.parametrize(
    ("priority", "wins"),
    [("srcnat", {True: False, False: True}), ("srcnat - 1", {True: True, False: True})],
    ids=["same-priority", "one-earlier"],
)
def test_of_equal_priority_the_chain_loaded_last_runs_first(
    gateway: Gateway, priority: str, wins: dict[bool, bool], ours_first: bool
) -> None:
    """Beside a neighbour's masquerade our snat wins at the same priority only if loaded last; one earlier, always."""
    gw = gateway.gw
    ours = (
        f"table inet t {{\nchain nat {{\ntype nat hook postrouting priority {priority}\nsnat ip to 192.0.2.131\n}}\n}}"
    )
    theirs = "table ip neighbour {\nchain nat {\ntype nat hook postrouting priority srcnat\nmasquerade\n}\n}"
    for text in (ours, theirs) if ours_first else (theirs, ours):
        gw.nft(text)
    with gateway.corp.sniff("gw") as vpn0:
        gw.send(CHOST["ipv4"])
        (packet,) = vpn0.packets(destination=CHOST["ipv4"])
    assert (str(packet.source) == "192.0.2.131") is wins[ours_first]


def test_comments_of_rules_and_elements_are_listed_as_json(netns: Host) -> None:
    """Rules and elements keep a comment of up to 128 characters and give it back as JSON; a longer one is refused."""
    text = """
        table inet t {{
            map m {{
                type ipv4_addr : mark; flags interval
                elements = {{ 10.0.0.0/8 comment "{0}" : 1 }}
            }}
            chain id-inside {{
                continue comment "{0}"
            }}
        }}
    """
    with pytest.raises(RuntimeError, match="comment too long"):
        netns.nft(text.format("x" * 129))
    netns.nft(text.format("x" * 128))
    listed = json.dumps(netns.nft_json("list", "table", "inet", "t"))
    assert listed.count("x" * 128) == 2


# --- a table with an owner -------------------------------------------------------------------------------------------

#: linux/netfilter/nf_tables.h: enum nft_table_flags (`persist` since Linux 6.9).
OWNER, PERSIST = 0x2, 0x4


def owned(netns: Host, name: str, flags: int) -> socket.socket:
    """Make a table that belongs to the socket that is given back; libnftables 1.0.6 can't say `persist`."""
    sock = netns.open_socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    batch = struct.pack(">BBH", 0, 0, 10)  # nfgenmsg: resource NFNL_SUBSYS_NFTABLES
    attributes = _attribute(1, f"{name}\0".encode()) + _attribute(2, struct.pack(">I", flags))
    messages = (
        (16, 1, batch),  # NFNL_MSG_BATCH_BEGIN
        (10 << 8, 0x401 | 4, struct.pack("=BBH", 1, 0, 0) + attributes),  # NFT_MSG_NEWTABLE, NLM_F_CREATE and _ACK
        (17, 1, batch),
    )
    sock.send(b"".join(struct.pack("=IHHII", 16 + len(body), kind, flag, 1, 0) + body for kind, flag, body in messages))
    (code,) = struct.unpack_from("=i", sock.recv(4096), 16)
    assert code == 0, os.strerror(-code)
    return sock


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def test_an_owned_table_is_flushed_by_nobody(netns: Host) -> None:
    """`flush ruleset` passes by a table that has an owner; and so does every other change of anybody else's.

    Of anybody else's: also of another verb's of ours, and of an operator's `nft -f` of the reviewed text.
    """
    with owned(netns, "t", OWNER | PERSIST):
        netns.run(["nft", "flush", "ruleset"])
        assert netns.run(["nft", "list", "tables"]) == "table inet t\n"
        for words in ("add chain inet t c", "delete table inet t"):
            with pytest.raises(RuntimeError, match="Operation not permitted"):
                netns.run(["nft", words])


@pytest.mark.parametrize(
    ("flags", "left"), [(OWNER, ""), (OWNER | PERSIST, "table inet t\n")], ids=["owner", "persist"]
)
def test_an_owned_table_after_its_owner(netns: Host, flags: int, left: str) -> None:
    """With its owner's end a table goes; with `persist` it stays, and is anybody's: the next flush takes it."""
    owned(netns, "t", flags).close()
    assert netns.run(["nft", "list", "tables"]) == left
    netns.run(["nft", "flush", "ruleset"])
    assert netns.run(["nft", "list", "tables"]) == ""
