"""What large sets hold, known by one process and left to the next: the kernel takes 20 s to tell of a million elements.

It goes by the generation of the ruleset, which the kernel counts up with every commit to any table of the namespace
(nf_tables_commit in net/netfilter/nf_tables_api.c): while it is the same, nobody has put in or taken out anything.
Packets don't move it: they count, and change sets only by a rule of the same table that says so, which is no rule of
ours. It begins anew with each namespace and each boot; hence the file lies in the runtime directory, whose name is the
namespace's number until the next boot, and holds the boot's own number as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import folder
from agent.addresses import Addresses, Family
from agent.kernel import KernelError, runtime

NAME = "sets"
#: A random number of this boot (Documentation/admin-guide/sysctl/kernel.rst).
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Known:
    """What sets of a table hold, by name, at a generation of the ruleset."""

    table: str
    generation: int
    sets: Mapping[str, Addresses]


def leave(known: Known) -> None:
    """Leave it to the next process of this namespace, in the place of what was left before. Raises KernelError."""
    place = runtime.directory()
    try:
        data = dump(known, _boot())
        with folder.made(place.parent, 0o755, place.name, 0o700) as directory:
            folder.put(directory, NAME, data, 0o600, durable=False)
    except OSError as error:
        raise KernelError(f"write {place / NAME}", error.strerror or str(error)) from error


def left() -> Known | None:
    """What was left last since boot. None: nothing was, or it is damaged; then the kernel has to be asked."""
    place = runtime.directory()
    try:
        with folder.opened(place.parent, place.name) as directory:
            return load(folder.got(directory, NAME) or b"", _boot())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def forget() -> None:
    """Nothing is left to the next process any more. Raises KernelError."""
    runtime.withdraw(NAME)


def dump(known: Known, boot: str) -> bytes:
    """As bytes: the addresses one set after the other behind a line of JSON, and their digest before all."""
    sets = [(name, addresses.family, len(addresses)) for name, addresses in known.sets.items()]
    head = {"boot": boot, "table": known.table, "generation": known.generation, "sets": sets}
    body = b"\n".join((json.dumps(head).encode(), b"".join(each.packed for each in known.sets.values())))
    return hashlib.sha256(body).digest() + body


def load(data: bytes, boot: str) -> Known:
    """From what `dump` gave at the same boot. Raises ValueError, LookupError, TypeError for anything else."""
    size = hashlib.sha256().digest_size
    body = data[size:]
    if hashlib.sha256(body).digest() != data[:size]:
        raise ValueError("it is not whole")
    line, _, packed = body.partition(b"\n")
    head: dict[str, Any] = json.loads(line)
    if head["boot"] != boot:
        raise ValueError("it is of another boot")
    sets, place = {}, 0
    for name, family, count in head["sets"]:
        end = place + count * Family(family).size
        sets[name] = Addresses(Family(family), packed[place:end])
        place = end
    return Known(head["table"], head["generation"], sets)


def _boot() -> str:
    return BOOT_ID.read_text(encoding="ascii").strip()
