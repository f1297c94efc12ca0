"""A host looked at for the doctor: every seam asked once, and `Host` filled. Changes nothing."""

from __future__ import annotations

import os
import pwd
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from agent import IdmarkError, ruleset, state
from agent import facts as host_facts
from agent.addresses import Address, Family, Prefix, address_text, parse_address
from agent.desired import NOBODY, Desired, desire
from agent.host import Host, KeptFile, Listener, conf, is_hosts_own_business
from agent.kernel import KernelError, runtime
from agent.kernel.chains import legacy, read
from agent.kernel.nft import Nft
from agent.kernel.processes import processes
from agent.kernel.rtnl import Rtnl
from agent.kernel.settings import number, port_range
from agent.kernel.sockets import inodes, listeners
from agent.managers import network_manager, networkd
from agent.model import LOOKUP, TABLE_MAIN, Facts, Lookup, Policy, Rule
from agent.prefixes import outermost
from agent.reconcile import Seams
from agent.symptoms.routing import TABLE_LOCAL
from agent.symptoms.settings import NETWORK_MANAGER, NETWORKD

#: The sysctls of each link, and of `all`; and those of the namespace, by their paths below /proc/sys.
OF_LINKS = (
    ("ipv4", "rp_filter"),
    ("ipv4", "src_valid_mark"),
    ("ipv4", "accept_local"),
    ("ipv4", "forwarding"),
    ("ipv6", "forwarding"),
    ("ipv6", "accept_ra"),
)
OF_ALL = (
    "net/ipv4/ip_nonlocal_bind",
    "net/ipv6/ip_nonlocal_bind",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_max",
)
#: The kernel's rules for tables local, main and default: the table is there whatever it holds.
KERNELS = frozenset({TABLE_LOCAL, TABLE_MAIN, 253})
#: What the ruleset asks of a kernel, and a table that asks just that.
FEATURES: Mapping[str, str] = {
    "chains that look for the route again (nft_chain_route)": "chain c { type route hook output priority -145; }",
    "interval maps to chains": "map m { type ipv4_addr : verdict; flags interval; }",
    "maps to counters": 'counter n { }; map m { type mark : counter; elements = { 1 : "n" }; }',
    "what a connection was made to (nft_ct)": "chain c { ct status dnat ct original ip daddr 192.0.2.1; }",
    "source translation (nft_nat)": "chain c { type nat hook postrouting priority 95; snat ip to 192.0.2.1; }",
    "clamping of segments (nft_exthdr, nft_rt)": "chain c { tcp flags syn tcp option maxseg size set rt mtu; }",
}
#: Of so many identities, and of so many networks of each one's members, it is asked where they are.
ASKED = 32
#: The user that the service runs as.
AGENT = "idmark"


class ExaminationError(IdmarkError):
    """Something on this host could not be looked at."""


def examine(policy: Policy, kernel: Seams, down: Mapping[str, str] = NOBODY) -> tuple[Desired, Host]:
    """What the policy wants here, and the host as the doctor sees it. `down`: as for `desire`.

    A policy without identities does: then it is a host that is to get one. Raises KernelError, ExaminationError,
    SettingsError.
    """
    facts = host_facts.take(policy, kernel.rtnl, kernel.nfnl, kernel.sysctls)
    desired = desire(policy, facts, down)
    rules = kernel.rtnl.rules()
    nft = read()
    table = kernel.nfnl.table(policy.kernel.nft_table)
    running = tuple(processes())
    programs = frozenset(process.name for process in running if process.here)
    waiting = listeners(inodes(running))
    host = Host(
        facts=facts,
        in_force=table is not None and ruleset.digest(table) is not None,
        rules=rules,
        empty=_empty(rules, kernel.rtnl),
        foreign_routes=tuple(
            route
            for table in sorted({identity.table for identity in policy.identities})
            for route in kernel.rtnl.foreign_routes(table)
        ),
        to_members=tuple(_to_members(desired, kernel.rtnl)),
        chains=nft.chains,
        flowtables=nft.flowtables,
        legacy=legacy(),
        listeners=waiting,
        local=_local(waiting, facts, kernel.rtnl),
        programs=programs,
        sysctls=_sysctls(facts),
        networkd=networkd() if NETWORKD in programs else (),
        network_manager=network_manager() if NETWORK_MANAGER in programs else (),
        missing=missing(kernel.nft),
        files=tuple(_files(policy)),
        ephemeral=port_range(),
        now=time.time(),
    )
    return desired, host


def missing(nft: Nft, features: Mapping[str, str] = FEATURES) -> tuple[tuple[str, str], ...]:
    """What the kernel can't do, in its own words: dry runs, all at once and, if that fails, each for itself."""
    tables = {
        what: f"table inet idmark-doctor-{place} {{\n{text}\n}}\n"
        for place, (what, text) in enumerate(features.items())
    }
    if not _refusal(nft, "".join(tables.values())):
        return ()
    refused = ((what, _refusal(nft, text)) for what, text in tables.items())
    return tuple((what, why) for what, why in refused if why)


def _refusal(nft: Nft, text: str) -> str:
    try:
        nft.check(text)
    except KernelError as error:
        return next((line for line in error.why.splitlines() if "Error" in line), error.why)
    return ""


def _empty(rules: Iterable[tuple[Rule, bool]], rtnl: Rtnl) -> frozenset[int]:
    tables = {rule.table for rule, ours in rules if not ours and rule.action == LOOKUP} - KERNELS
    return frozenset(table for table in tables if rtnl.is_empty(table))


def _to_members(desired: Desired, rtnl: Rtnl) -> Iterator[tuple[str, Prefix, Lookup]]:
    """Where main leads to the first networks of each identity's members, by their first host."""
    for family in Family:
        for standing in desired.standings[:ASKED]:
            for network in islice(outermost(family, [standing.identity.members]), ASKED):
                if network.length:
                    first = network.address + (network.length < family.bits)
                    yield standing.identity.name, network, rtnl.lookup(parse_address(address_text(family, first)))


def _local(waiting: Iterable[Listener], facts: Facts, rtnl: Rtnl) -> frozenset[Address]:
    """Addresses that services wait on and no link has, and that the kernel takes for the host's all the same."""
    there = {item.address for link in facts.links for item in link.addresses}
    asked = {each.address for each in waiting} - there
    return frozenset(
        address
        for address in asked
        if not (address.is_unspecified or is_hosts_own_business(address)) and rtnl.lookup(address).table == TABLE_LOCAL
    )


def _sysctls(facts: Facts) -> dict[str, int]:
    links = ["all", *(link.name for link in facts.links)]
    keys = (*OF_ALL, *(conf(family, link, name) for family, name in OF_LINKS for link in links))
    return {key: value for key in keys if (value := number(key)) is not None}


# --- files -----------------------------------------------------------------------------------------------------------


def _files(policy: Policy) -> Iterator[KeptFile]:
    paths = [Path(name) for name in policy.files]
    for place, path in enumerate(paths):
        yield from _kept(path, "list" if place else "policy")
    for directory in dict.fromkeys(path.resolve().parent for path in paths):
        yield from _kept(directory, "policy" if directory == paths[0].resolve().parent else "list")
    kept = Path(os.environ.get("STATE_DIRECTORY") or state.DEFAULT)
    for directory in (kept, runtime.directory()):
        yield from _kept(directory, "state")
        for name in _names(directory):
            yield from _kept(directory / name, "state")


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ExaminationError(f"look into {directory}: {error.strerror}") from error


def _kept(path: Path, purpose: str) -> Iterator[KeptFile]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ExaminationError(f"look at {path}: {error.strerror}") from error
    directory = stat.S_ISDIR(found.st_mode)
    yield KeptFile(
        path=str(path),
        purpose=purpose,
        mode=found.st_mode & 0o7777,
        owner=_user(found.st_uid),
        changed=0.0 if directory else found.st_mtime,
        directory=directory,
        refused=purpose != "state" and _is_refused(found, directory=directory),
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _is_refused(found: os.stat_result, *, directory: bool) -> bool:
    """Whether the user that the service runs as, if there is one here, may not read a file, or enter a directory."""
    try:
        agent = pwd.getpwnam(AGENT)
    except KeyError:
        return False
    wanted = 0o1 if directory else 0o4
    if found.st_uid == agent.pw_uid:
        return not found.st_mode >> 6 & wanted
    in_group = found.st_gid in os.getgrouplist(AGENT, agent.pw_gid)
    return not found.st_mode >> 3 * in_group & wanted
