"""The person at the keyboard: who it is, and the SSH connection that she works through."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from agent.addresses import Address, Family, parse_address
from agent.desired import Desired
from agent.kernel.rtnl import Rtnl
from agent.model import Facts, Lookup
from agent.proof import Packet, decide, route_of

#: /proc/PID/loginuid of a process that nobody logged in for: (uid_t)-1 (proc(5)).
NOBODY = 0xFFFFFFFF


class Connection(NamedTuple):
    """An SSH connection: the operator's end, and this host's."""

    client: Address
    server: Address


def user() -> str:
    """Who is at work: by the kernel's own record of the login, which sudo and su keep; else by sudo's word."""
    try:
        login = int(Path("/proc/self/loginuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        login = NOBODY
    if login != NOBODY:
        return _name(login)
    return os.environ.get("SUDO_USER") or _name(os.geteuid())


def _name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def connection() -> Connection | None:
    """The SSH connection of this session, also where sudo has dropped it from the environment; None: there is none."""
    for environment in _environments():
        words = environment.get("SSH_CONNECTION", "").split()
        if len(words) == 4:
            try:
                found = Connection(parse_address(words[0]), parse_address(words[2]))
            except ValueError:  # link-local, with its zone: that never leaves its link
                return None
            return found if Family.of(found.client) is Family.of(found.server) else None
    return None


def _environments() -> Iterator[Mapping[str, str]]:
    """Our environment, and that of each process above."""
    yield os.environ
    pid = os.getppid()
    while pid > 1:
        place = Path(f"/proc/{pid}")
        try:
            entries = (place / "environ").read_bytes().decode(errors="replace").split("\0")
            status = (place / "status").read_text(errors="replace")
        except OSError:  # another user's: it ends here
            return
        yield dict(entry.split("=", 1) for entry in entries if "=" in entry)
        pid = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:")), 0)


def danger(session: Connection, before: Desired | None, after: Desired, facts: Facts, rtnl: Rtnl) -> str | None:
    """What would become of the session's own packets, in words; None: they go as they do now.

    `before` is what is in force now, if that is known. Raises KernelError.
    """
    if not any(session.server == item.address for link in facts.links for item in link.addresses):
        return None  # a session of another host, or of another namespace
    reply = Packet(session.server, session.client)
    now = rtnl.lookup(session.client, source=session.server)
    words = f"your SSH session ({session.client} to {session.server})"
    old, new = (_identity(desired, reply) if desired else None for desired in (before, after))
    then = _road(after, new, reply, rtnl)
    if then.link is None and now.link is not None:
        return f"{words} would be cut: its replies leave by {_way(now)}, and would be refused ({then.error})"
    if (now.link, now.via) != (then.link, then.via):
        return f"{words} would take another road: its replies leave by {_way(now)}, and would leave by {_way(then)}"
    if before and old != new:
        return f"{words} would change identity: from {old or 'none'} to {new or 'none'}"
    return None


def _identity(desired: Desired, packet: Packet) -> str | None:
    standing = decide(desired, packet).standing
    return standing.identity.name if standing else None


def _road(desired: Desired, name: str | None, packet: Packet, rtnl: Rtnl) -> Lookup:
    """Where the packet would go: by the identity's table, or as the host's other rules say."""
    if name is None:
        # Without a source: no rule of ours would take it.
        return rtnl.lookup(packet.destination)
    identity = desired.policy.identity(name)
    route = route_of(desired, identity.table, packet.destination)
    if route is None:
        return rtnl.lookup(packet.destination)
    if route.kind != "unicast":
        standing = next(each for each in desired.standings if each.identity.name == name)
        way = standing.way(route.family)
        return Lookup(identity.table, error=f"{name} is closed: {way.closed}" if way and way.closed else route.kind)
    return Lookup(identity.table, route.hops[0].link, route.hops[0].via)


def _way(road: Lookup) -> str:
    return road.error or f"{road.link}{f' via {road.via}' if road.via else ''}"
