"""The kernel's loaded modules, where nothing else tells what they do."""

from __future__ import annotations

from pathlib import Path

MODULES = Path("/proc/modules")
#: The nat tables of iptables-legacy, which nf_tables doesn't show.
LEGACY_NAT = ("iptable_nat", "ip6table_nat")


def may_translate() -> bool:
    """Whether iptables-legacy may translate addresses.

    Not by /proc/net/ip_tables_names: that is root's, and the agent need not be root.
    """
    try:
        modules = MODULES.read_text(encoding="ascii", errors="replace")
    except OSError:  # a kernel without modules
        return False
    return any(line.partition(" ")[0] in LEGACY_NAT for line in modules.splitlines())
