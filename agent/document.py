"""The policy's document: its keys, read into frozen values.

A document without a fault is read here alone. The words for what is wrong in another one are the schema's business:
that is pydantic's, which takes longer to import than most verbs to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agent import values
from agent.addresses import Address, Prefix
from agent.model import UNREACHABLE, Kernel
from agent.toml_lines import Place

# Every field may be None, which TOML itself can't say: that is what a value at fault is replaced by, so that the checks
# of what values are to each other have the rest of the document before them.


@dataclass(frozen=True)
class ProbeTable:
    """A health check that an identity sends by its own link. `every` is in seconds."""

    target: Address | None
    every: float | None = 2.0
    fail_after: int | None = 3
    port: int | None = None


@dataclass(frozen=True)
class IdentityTable:
    """An identity: whose packets, and the road that they take."""

    id: int | None
    link: str | None
    addresses: Literal["auto"] | list[Address | None] | None = field(default_factory=list)
    members: list[Prefix | values.ListFile | None] | None = field(default_factory=list)
    next_hop: Literal["none", "auto"] | list[Address | None] | None = "auto"
    when_down: str | None = UNREACHABLE
    masquerade: bool | None = False
    clamp_mss: bool | None = False
    probe: ProbeTable | None = None
    flush_flows: bool | None = False


_KERNEL = Kernel()


@dataclass(frozen=True)
class KernelTable:
    """Where in the kernel's name spaces all of it lives."""

    mark_mask: int | None = _KERNEL.mark_mask
    table_base: int | None = _KERNEL.table_base
    rule_priority: int | None = _KERNEL.rule_priority
    nft_table: str | None = _KERNEL.nft_table
    hook_priority: int | None = _KERNEL.hook_priority
    enforce: bool | None = _KERNEL.enforce
    way_bits: int | None = _KERNEL.way_bits
    nat: Literal["auto"] | bool | None = "auto"
    drop_own_sources: bool | None = _KERNEL.drop_own_sources


@dataclass(frozen=True)
class Document:
    """An idmark policy."""

    gateway: str | None
    identity: dict[str, IdentityTable | None] | None
    downstream: Literal["auto"] | list[str | None] | None = "auto"
    kernel: KernelTable | None = field(default_factory=KernelTable)


def read_document(tables: dict[str, Any]) -> tuple[Document, list[tuple[Place, str]]]:
    """What stands in the document, with None for what is at fault, and these faults. Takes `tables` over."""
    try:
        return _document(tables), []
    except (ValueError, TypeError, KeyError):  # a value that it can't have; a key that is missing, or that there is not
        from agent import schema  # noqa: PLC0415

        faults = schema.faults(tables)
        return _document(tables), faults


def prepare() -> None:
    """Have the words for faults at hand, for who keeps a policy: while they are imported nothing is repaired."""
    from agent import schema  # noqa: F401, PLC0415


#: From a value as TOML has it to the one that the agent has. Raises ValueError, TypeError or KeyError.
_Read = Callable[[Any], Any]


def _of(kind: type, read: _Read | None = None) -> _Read:
    """A value that TOML holds as this type and no other: true is no number."""

    def read_it(value: object) -> object:
        if value is None:
            return None
        if type(value) is not kind:
            raise TypeError(value)
        return value if read is None else read(value)

    return read_it


def _list(read: _Read) -> _Read:
    return _of(list, lambda several: [*map(_of(str, read), several)])


def _words_or(*words: str, read: _Read) -> _Read:
    """One of these words, or a list."""
    several = _list(read)
    return lambda value: value if value in words else several(value)


def _table(kind: type, keys: Mapping[str, _Read]) -> _Read:
    return _of(dict, lambda table: kind(**{key: keys[key](value) for key, value in table.items()}))


_probe = _table(
    ProbeTable,
    {
        "target": _of(str, values.probe_target),
        "every": _of(str, values.every),
        "fail_after": _of(int, values.fail_after),
        "port": _of(int, values.port),
    },
)
_identity = _table(
    IdentityTable,
    {
        "id": _of(int, values.integer),
        "link": _of(str, values.link),
        "addresses": _words_or("auto", read=values.own_address),
        "members": _list(values.member),
        "next_hop": _words_or("none", "auto", read=values.next_hop),
        "when_down": _of(str),
        "masquerade": _of(bool),
        "clamp_mss": _of(bool),
        "probe": _probe,
        "flush_flows": _of(bool),
    },
)
_kernel = _table(
    KernelTable,
    {
        "mark_mask": _of(int, values.mark_mask),
        "table_base": _of(int, values.integer),
        "rule_priority": _of(int, values.integer),
        "nft_table": _of(str, values.nft_table),
        "hook_priority": _of(int, values.hook_priority),
        "enforce": _of(bool),
        "way_bits": _of(int, values.way_bits),
        "nat": values.nat,
        "drop_own_sources": _of(bool),
    },
)
_document = _table(
    Document,
    {
        "gateway": _of(str, values.gateway),
        "downstream": _words_or("auto", read=values.link),
        "identity": _of(dict, lambda several: {name: _identity(table) for name, table in several.items()}),
        "kernel": _kernel,
    },
)
