"""nftables by libnftables: check and load transactions. The only importer of python-nftables."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from agent.kernel import KernelError

#: Where distributions put python3-nftables, for interpreters that don't look there. The binding is pure Python over
#: ctypes: any interpreter can load it. The copies on the package index are frozen at 1.0.2 and have no dry run.
DISTRIBUTION_PATHS = (
    "/usr/lib/python3/dist-packages",
    "/usr/lib/python3*/site-packages",
    "/usr/lib64/python3*/site-packages",
    "/usr/local/lib/python3*/dist-packages",
)


#: libnftables enlarges its socket's buffer by SO_SNDBUFFORCE, which a user namespace may not; and sends all at once.
TOO_LONG = (
    "In a user namespace (an unprivileged container) a transaction is limited to net.core.wmem_default bytes, some "
    "3,000 prefixes by default: raise it on the host, sysctl -w net.core.wmem_default=8388608"
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
    """libnftables in the namespace of the thread that calls. Every method raises KernelError.

    A context for each call: it stays bound to the namespace that it was made in, is not for sharing between threads,
    and keeps what it believes of interval sets even after a dry run, by which it judges the next command.
    """

    def __init__(self) -> None:
        self._binding = binding()

    def load(self, text: str) -> None:
        """Run commands as one transaction: all of them or, with the error in nft's own words, none."""
        self._run(text, "load the ruleset")

    def check(self, text: str) -> None:
        """Have libnftables and the kernel look a transaction over without committing it."""
        self._run(text, "check the ruleset", dry_run=True)

    def text(self, name: str) -> str | None:
        """The table as `nft list table` prints it, counters' values included; loads again as it is. None: no table."""
        try:
            return self._run(f"list table inet {name}", f"list nft table inet {name}")
        except KernelError as error:
            if "No such file or directory" in error.why:
                return None
            raise

    def _run(self, text: str, doing: str, *, dry_run: bool = False) -> str:
        try:
            context = self._binding.Nftables()
        except OSError as error:  # from ctypes, which says what it looked for
            raise KernelError("load libnftables", str(error)) from error
        context.set_dry_run(dry_run)
        code, output, complaint = context.cmd(text)
        if code:
            # libnftables names line and column, and draws a caret: worth more than any word of ours.
            why = complaint.strip() or "libnftables gave no reason"
            raise KernelError(doing, f"{why}\n{TOO_LONG}" if "Message too long" in why else why)
        return str(output)
