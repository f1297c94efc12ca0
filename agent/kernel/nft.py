"""nftables by libnftables: load a transaction, read our table back. The only importer of python-nftables."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from agent.kernel import KernelError
from agent.model import Chain, Count, Hook, NftSet, Statement, Table

#: Where distributions put python3-nftables, for interpreters that don't look there. The binding is pure Python over
#: ctypes: any interpreter can load it. The copies on the package index are frozen at 1.0.2 and have no dry run.
DISTRIBUTION_PATHS = (
    "/usr/lib/python3/dist-packages",
    "/usr/lib/python3*/site-packages",
    "/usr/lib64/python3*/site-packages",
    "/usr/local/lib/python3*/dist-packages",
)


def binding() -> ModuleType:
    """The python-nftables module: the interpreter's own if it is recent enough, else the distribution's, by path.

    Raises KernelError with the package to install.
    """
    if "nftables" in sys.modules:
        return sys.modules["nftables"]
    if importlib.util.find_spec("nftables"):
        module = importlib.import_module("nftables")
        if hasattr(module.Nftables, "set_dry_run"):
            return module
        del sys.modules["nftables"]
    for pattern in DISTRIBUTION_PATHS:
        for path in sorted(Path("/").glob(f"{pattern[1:]}/nftables/__init__.py"), reverse=True):
            spec = importlib.util.spec_from_file_location(
                "nftables", path, submodule_search_locations=[str(path.parent)]
            )
            if spec and spec.loader:
                module = importlib.util.module_from_spec(spec)
                sys.modules["nftables"] = module
                spec.loader.exec_module(module)
                return module
    raise KernelError("load python-nftables", "it is not installed (Debian, Ubuntu, Fedora: package python3-nftables)")


class Nft:
    """A libnftables context: bound to the namespace of the thread that made it, and for that thread only."""

    def __init__(self) -> None:
        try:
            self._nft = binding().Nftables()
        except OSError as error:  # from ctypes, which says what it looked for
            raise KernelError("load libnftables", str(error)) from error
        self._nft.set_numeric_prio_output(True)
        # Else a mark that /etc/iproute2/rt_marks names would read back by its name.
        self._nft.set_numeric_symbol_output(True)

    def load(self, text: str, doing: str = "load the ruleset") -> None:
        """Run commands as one transaction: all of them or, with KernelError in nft's own words, none."""
        self._run(text, doing)

    def check(self, text: str) -> None:
        """Have libnftables and the kernel look a transaction over without committing it. Raises KernelError."""
        self._nft.set_dry_run(True)
        try:
            self._run(text, "check the ruleset")
        finally:
            self._nft.set_dry_run(False)

    def text(self, name: str) -> str | None:
        """The table as `nft list table` prints it, counters' values included; loads again as it is. None: no table."""
        return self._list(name)

    def table(self, name: str) -> Table | None:
        """Our table as the kernel has it; rules come with their comments only. None: no table."""
        objects = self._objects(name)
        return None if objects is None else to_table(name, objects)

    def counts(self, name: str) -> dict[str, Count]:
        """The values of our table's counters by name; empty without a table."""
        return {
            counter["name"]: Count(counter["packets"], counter["bytes"])
            for kind, counter in self._objects(name) or ()
            if kind == "counter"
        }

    def _objects(self, name: str) -> list[tuple[str, Any]] | None:
        self._nft.set_json_output(True)
        try:
            listing = self._list(name)
        finally:
            self._nft.set_json_output(False)
        if listing is None:
            return None
        return [pair for entry in json.loads(listing)["nftables"] for pair in entry.items()]

    def _list(self, name: str) -> str | None:
        """`list table inet NAME` reads that table alone; what others have loaded costs nothing."""
        try:
            return self._run(f"list table inet {name}", f"list nft table inet {name}")
        except KernelError as error:
            if "No such file or directory" in error.why:
                return None
            raise

    def _run(self, text: str, doing: str) -> str:
        code, output, error = self._nft.cmd(text)
        if code:
            # libnftables names line and column, and draws a caret: worth more than any word of ours.
            raise KernelError(doing, error.strip() or "libnftables gave no reason")
        return str(output)


def to_table(name: str, objects: list[tuple[str, Any]]) -> Table:
    """A table from libnftables' JSON objects (libnftables-json(5)): (kind, fields) each."""
    rules: dict[str, list[Statement]] = {}
    for kind, rule in objects:
        if kind == "rule":
            rules.setdefault(rule["chain"], []).append(Statement("", rule.get("comment", "")))
    return Table(
        name=name,
        counters=tuple(fields["name"] for kind, fields in objects if kind == "counter"),
        sets=tuple(_to_set(fields) for kind, fields in objects if kind in ("set", "map")),
        chains=tuple(
            Chain(
                name=chain["name"],
                rules=tuple(rules.get(chain["name"], ())),
                hook=Hook(chain["type"], chain["hook"], chain["prio"]) if "hook" in chain else None,
            )
            for kind, chain in objects
            if kind == "chain"
        ),
    )


def _to_set(fields: dict[str, Any]) -> NftSet:
    types = [fields["type"]] if isinstance(fields["type"], str) else fields["type"]
    is_map = "map" in fields
    return NftSet(
        name=fields["name"],
        key=" . ".join(types),
        value=fields.get("map", ""),
        interval="interval" in fields.get("flags", ()),
        elements=tuple(
            (_key(element[0], types), _value(element[1])) if is_map else (_key(element, types), "")
            for element in fields.get("elem", ())
        ),
    )


def _key(key: Any, types: list[str]) -> str:
    """An element's key as nft writes it in text."""
    if isinstance(key, dict):
        if "elem" in key:  # one with a comment or a timeout
            return _key(key["elem"]["val"], types)
        if "concat" in key:
            return " . ".join(_key(part, [kind]) for part, kind in zip(key["concat"], types, strict=True))
        if "prefix" in key:
            return f"{key['prefix']['addr']}/{key['prefix']['len']}"
        if "range" in key:
            return "-".join(key["range"])
    match types:
        case ["mark"]:
            return f"0x{key:08x}"
        case ["ifname"]:
            return f'"{key}"'
        case _:
            return str(key)


def _value(value: Any) -> str:
    """A verdict, which JSON has as {"goto": {"target": "chain"}} or {"accept": null}, or the name of a counter."""
    if isinstance(value, dict):
        ((verb, target),) = value.items()
        return f"{verb} {target['target']}" if target else str(verb)
    return f'"{value}"'
