"""The door: the text of a policy to a `Policy`, or every fault in it."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agent import IdmarkError
from agent.addresses import Prefixes, sorted_addresses
from agent.checks import CHECKS, WARNINGS
from agent.document import read_document
from agent.draft import Draft, UnreadableError, read_text, way_of
from agent.faults import Fault, in_order
from agent.model import Fwmark, Identity, Kernel, Policy, Probe
from agent.toml_lines import Lines

__all__ = ["Fault", "PolicyError", "load"]

NO_LISTS: Mapping[str, str] = MappingProxyType({})


class PolicyError(IdmarkError):
    """A policy that can't be used. `faults` holds all that is wrong with it, sorted by file and line.

    `files` is what it was read from, as far as that is known: the policy, and the lists that it names.
    """

    def __init__(self, faults: Iterable[Fault], files: tuple[str, ...]) -> None:
        self.faults = in_order(faults)
        self.files = files
        super().__init__("\n".join(map(str, self.faults)))

    def lines(self) -> list[str]:
        """A line a fault, each beginning with its place."""
        return [str(fault) for fault in self.faults]


def load(path: Path) -> Policy:
    """Read and check a policy and its lists. Raises PolicyError, with every fault that there is."""
    file = str(path)
    try:
        text = read_text(path)
    except UnreadableError as error:
        raise PolicyError([Fault(file, error.line, "", str(error))], (file,)) from error
    return parse(text, path)


def parse(text: str, path: Path, lists: Mapping[str, str] = NO_LISTS) -> Policy:
    """Check a policy's text, which stands, or stood, in a file, and its lists. Raises PolicyError.

    `lists` are at hand, by their names, and not read from files.
    """
    file = str(path)
    try:
        tables = tomllib.loads(text)
    except RecursionError as error:
        raise PolicyError([Fault(file, None, "", "is not TOML: nested too deeply")], (file,)) from error
    except ValueError as error:  # TOMLDecodeError, and int()'s own for a number of thousands of digits
        raise PolicyError([_syntax_fault(file, text, str(error))], (file,)) from error
    document, wrong = read_document(tables)
    draft = Draft(path, document, Lines(text), lists)
    faults = [draft.fault(where, message) for where, message in wrong]
    faults += (fault for check in CHECKS for fault in check(draft))
    if faults:
        raise PolicyError(faults, draft.files)
    policy = _policy(draft)
    warnings = in_order(fault for check in WARNINGS for fault in check(draft))
    return replace(policy, digest=_digest(policy), warnings=tuple(map(str, warnings)), files=draft.files)


def _syntax_fault(file: str, text: str, message: str) -> Fault:
    """tomllib says where in its message: "… (at line 3, column 5)", "… (at end of document)"."""
    at = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    if at is None:
        return Fault(file, None, "", f"is not TOML: {message}")
    message = message[: at.start()]
    if at[1] is None:
        return Fault(file, text.rstrip().count("\n") + 1, "", f"is not TOML: {message}, at the end of the file")
    return Fault(file, int(at[1]), "", f"is not TOML: {message}, column {at[2]}")


def _policy(draft: Draft) -> Policy:
    """The policy, of a draft that every check has passed."""
    # Nothing in it is None any longer, which its types cannot say: hence Any.
    document: Any = draft.document
    kernel = Kernel(**{**vars(document.kernel), "nat": None if document.kernel.nat == "auto" else document.kernel.nat})
    identities = [_identity(kernel, draft, name, table) for name, table in draft.identities]
    return Policy(
        gateway=document.gateway,
        downstream=None if document.downstream == "auto" else tuple(sorted(document.downstream)),
        identities=tuple(_on_ways(kernel, sorted(identities, key=lambda identity: identity.id))),
        kernel=kernel,
    )


def _on_ways(kernel: Kernel, identities: Sequence[Identity]) -> Iterator[Identity]:
    """Identities that share a way out, with the first one's table and the way's number in their fwmarks."""
    ways: dict[object, list[Identity]] = {}
    for identity in identities if kernel.way_bits else ():
        if key := way_of(identity):
            ways.setdefault(key, []).append(identity)
    shared = [on for on in ways.values() if len(on) > 1]
    numbers = {identity.name: (number, on[0]) for number, on in enumerate(shared, start=1) for identity in on}
    unit, mask = kernel.mark_mask & -kernel.mark_mask, way_mask(kernel)
    for identity in identities:
        number, first = numbers.get(identity.name, (0, identity))
        if number:
            way = Fwmark(number * (mask & -mask), mask)
            fwmark = Fwmark(way.value | identity.id * unit, kernel.mark_mask)
            yield replace(identity, fwmark=fwmark, table=first.table, priority=first.priority, way=way)
        else:
            yield identity


def way_mask(kernel: Kernel) -> int:
    """The bits of the mask that number ways."""
    return kernel.mark_mask & ~(kernel.mark_mask >> kernel.way_bits)


def _identity(kernel: Kernel, draft: Draft, name: str, table: Any) -> Identity:
    mask = kernel.mark_mask
    sources = [source for source in draft.sources if (source.identity, source.key) == (name, "members")]
    return Identity(
        name=name,
        id=table.id,
        link=table.link,
        fwmark=Fwmark(table.id * (mask & -mask), mask),
        table=kernel.table_base + table.id,
        priority=kernel.rule_priority + table.id,
        addresses=None if table.addresses == "auto" else sorted_addresses(table.addresses),
        members=Prefixes.joined(source.prefixes for source in sources),
        next_hop=sorted_addresses(table.next_hop) if isinstance(table.next_hop, list) else table.next_hop,
        when_down=table.when_down,
        masquerade=table.masquerade,
        clamp_mss=table.clamp_mss,
        probe=Probe(**vars(table.probe)) if table.probe else None,
        flush_flows=table.flush_flows,
    )


def _digest(policy: Policy) -> str:
    """SHA-256 over what the policy means, in an order of its own."""
    digest = hashlib.sha256()
    for part in _canonical(policy):
        digest.update(part)
    return digest.hexdigest()


def _canonical(policy: Policy) -> Iterator[bytes]:
    """A policy, each field once; what follows from others (fwmark, table, priority) is left out."""
    # Keys that came later stand here only if they say something: what was approved before keeps its digest.
    kernel = asdict(policy.kernel)
    for key in ("nat", "way_bits", "drop_own_sources"):
        if kernel[key] == getattr(Kernel(), key):
            del kernel[key]
    frame = {"gateway": policy.gateway, "downstream": policy.downstream, "kernel": kernel}
    yield _canonical_line(frame)
    for identity in policy.identities:
        fields = {
            "name": identity.name,
            "id": identity.id,
            "link": identity.link,
            "addresses": identity.addresses and [*map(str, identity.addresses)],
            "next_hop": identity.next_hop if isinstance(identity.next_hop, str) else [*map(str, identity.next_hop)],
            "when_down": identity.when_down,
            "masquerade": identity.masquerade,
            "clamp_mss": identity.clamp_mss,
        }
        if identity.probe:
            fields["probe"] = asdict(identity.probe) | {"target": str(identity.probe.target)}
        if identity.flush_flows:
            fields["flush_flows"] = True
        yield _canonical_line(fields)
        for (family, length), column in identity.members.columns.items():
            yield _canonical_line({"family": family, "length": length, "members": len(column)})
            yield column.packed


def _canonical_line(fields: Mapping[str, object]) -> bytes:
    return f"{json.dumps(fields, sort_keys=True)}\n".encode()
