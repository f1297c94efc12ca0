"""Other programs' chains, from what the kernel sent: bytes that were read from one, and where they lead."""

from __future__ import annotations

import struct

import pytest

from agent.host import Flowtable, NftChain, reachable
from agent.kernel.attributes import attributes
from agent.kernel.chains import effect, flowtable
from agent.model import Hook

#: The expressions of rules of iptables-nft 1.8.9, as a kernel 6.18 dumps them on a little-endian machine.
COUNTER = "2c0001000c000100636f756e746572001c0002000c00010000000000000000000c0002000000000000000000"
SET_XMARK = "340001000b000100746172676574000024000200090001004d41524b0000000008000200000000020c000300000001000000ff00"
RESTORE_MARK = (
    "400001000b0001007461726765740000300002000d000100434f4e4e4d41524b000000000800020000000002"
    "140003000000000000ff000000ff000000000200"
)
RPFILTER = (
    "380001000a0001006d61746368000000280002000d000100727066696c7465720000000008000200000000000c0003000a00000000000000"
)
DROP = "300001000e000100696d6d6564696174650000001c0002000800010000000000100002000c0002000800010000000000"


@pytest.mark.parametrize(
    ("expressions", "bits", "ones"),
    [
        pytest.param(COUNTER, 0, 0, id="none"),
        pytest.param(COUNTER + SET_XMARK, 0x00FF0000, 0x00010000, id="MARK --set-xmark 0x10000/0xff0000"),
        pytest.param(COUNTER + RESTORE_MARK, 0xFF00, 0xFF00, id="CONNMARK --restore-mark --nfmask 0xff00"),
    ],
)
def test_targets(expressions: str, bits: int, ones: int) -> None:
    """What a target of iptables writes into packet marks."""
    found = effect(bytes.fromhex(expressions))
    assert (found.bits, found.ones) == (bits, ones)


def test_a_target_of_tproxy() -> None:
    """TPROXY writes a mark as well: --tproxy-mark 0x1000000/0x1000000."""
    info = struct.pack("=II", 0x01000000, 0x01000000) + bytes(20)
    target = _attribute(1, b"TPROXY\0") + _attribute(2, struct.pack(">I", 1)) + _attribute(3, info)
    found = effect(_attribute(1, _attribute(1, b"target\0") + _attribute(2, target)))
    assert (found.bits, found.ones) == (0x01000000, 0x01000000)


def test_rpfilter() -> None:
    """`-m rpfilter --invert --validmark -j DROP` is a check of the way back, by mark, that drops."""
    found = effect(bytes.fromhex(RPFILTER + COUNTER + DROP))
    assert (found.reverse_check, found.by_mark, found.drops) == (True, True, True)


def test_or_of_two_registers() -> None:
    """`meta mark set meta mark | ct mark & 0xff`, in two registers as newer nft has it: only those bits change."""
    meta = _expression("meta", _number(1, 1) + _number(2, 3))
    connection = _expression("ct", _number(1, 2) + _number(2, 3))
    masked = _bitwise(2, 2, mask=0xFF, xor=0)
    either = _expression("bitwise", _number(1, 1) + _number(2, 1) + _number(3, 4) + _number(6, 4) + _number(8, 2))
    found = effect(meta + connection + masked + either + _expression("meta", _number(2, 3) + _number(3, 1)))
    assert (found.bits, found.ones) == (0xFF, 0xFF)


def test_a_flowtable() -> None:
    """A flowtable's name and links: the attributes as nft sends them, and the kernel lists them."""
    devices = _attribute(1, b"b\0") + _attribute(1, b"a\0")
    hook = _number(1, 0) + _number(2, 0) + _attribute(3, devices)
    message = _attribute(1, b"fw\0") + _attribute(2, b"f\0") + _attribute(3, hook)
    assert flowtable("inet", attributes(message)) == Flowtable("inet", "fw", "f", ("b", "a"))


def test_reachable() -> None:
    """Where jumps lead, also in a circle, and what nobody names where there is a map; not other tables' chains."""
    base = NftChain("ip", "t", "base", Hook("filter", "output", 0), jumps=frozenset({"a", "gone"}))
    chains = (
        base,
        NftChain("ip", "t", "a", jumps=frozenset({"b"})),
        NftChain("ip", "t", "b", jumps=frozenset({"a"}), by_map=True),
        NftChain("ip", "t", "unnamed"),
        NftChain("ip", "t", "c", jumps=frozenset({"d"})),
        NftChain("ip", "t", "d"),
        NftChain("ip", "other", "b"),
        NftChain("ip", "t", "base2", Hook("filter", "input", 0)),
    )
    assert {chain.name for chain in reachable(base, chains)} == {"base", "a", "b", "unnamed", "c", "d"}
    assert [chain.name for chain in reachable(chains[-1], chains)] == ["base2"]


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack(">I", value))


def _expression(name: str, data: bytes) -> bytes:
    return _attribute(1, _attribute(1, f"{name}\0".encode()) + _attribute(2, data))


def _bitwise(source: int, destination: int, *, mask: int, xor: int) -> bytes:
    data = _number(1, source) + _number(2, destination) + _number(3, 4)
    for kind, value in ((4, mask), (5, xor)):
        data += _attribute(kind, _attribute(1, struct.pack("=I", value)))
    return _expression("bitwise", data)
