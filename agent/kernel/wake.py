"""When to look again, and never why: rtnetlink's announcements, the ruleset's generation, signals, other threads."""

from __future__ import annotations

import contextlib
import errno
import select
import signal
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from agent.kernel import KernelError
from agent.kernel.netlink import HEADER, SOL_NETLINK
from agent.kernel.nfnl import Nfnl

NETLINK_ADD_MEMBERSHIP = 1
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
#: linux/rtnetlink.h, enum rtnetlink_groups: LINK, IPV4_IFADDR, IPV4_RULE, IPV6_IFADDR, IPV6_RULE; and IPV4_NETCONF,
#: which tells of rp_filter, but not of src_valid_mark (net/ipv4/devinet.c, devinet_conf_proc).
GROUPS = (1, 5, 8, 9, 19, 24)
#: IPV4_ROUTE and IPV6_ROUTE: where a routing daemon is at work these never end.
ROUTE_GROUPS = (7, 11)
#: RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR.
MOVES = frozenset({16, 17, 20, 21})
#: Seconds between two looks at the ruleset's generation. A subscription to nf_tables would be told at once, and would
#: make every large load on this host hold 8 KiB of kernel memory an element meanwhile, whoever loads it.
TICK = 0.05
#: A burst of announcements is waited for: until it pauses for so long, and no longer than that, in seconds.
PAUSE, BURST = 0.002, 0.02
#: What the kernel keeps for us of a burst, in bytes; what doesn't fit costs nothing but a look (ENOBUFS).
BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Woken:
    """Why a wait has ended; all false: its time was over.

    `changed`: something in the kernel did. `moved`: links or addresses did, which takes routes along without a
    word. `signals` are numbers. `poked`: another thread asked for it.
    """

    changed: bool = False
    moved: bool = False
    signals: frozenset[int] = frozenset()
    poked: bool = False

    def __or__(self, other: Woken) -> Woken:
        return Woken(
            self.changed or other.changed,
            self.moved or other.moved,
            self.signals | other.signals,
            self.poked or other.poked,
        )


class Wake:
    """Everything that wakes the daemon, in one wait; in the namespace and the main thread of who makes it.

    `signals` do nothing else from then on than end a wait. Raises KernelError.
    """

    def __init__(self, nfnl: Nfnl, signals: Iterable[int] = ()) -> None:
        self._nfnl = nfnl
        self._generation = nfnl.generation()
        self._events, self._routes = _listening(GROUPS), _listening(ROUTE_GROUPS)
        self._heard, self._bell = socket.socketpair()
        for end in (self._heard, self._bell):
            end.setblocking(False)
        self._before = {number: signal.signal(number, _nothing) for number in signals}
        self._fd_before = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        self._but_routes, self._anything = select.poll(), select.poll()
        for each in (self._events, self._heard):
            self._but_routes.register(each, select.POLLIN)
            self._anything.register(each, select.POLLIN)
        self._anything.register(self._routes, select.POLLIN)

    def __enter__(self) -> Wake:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for each in (self._events, self._routes, self._heard, self._bell):
            each.close()

    def poke(self) -> None:
        """End the wait, or the next one; for other threads."""
        with contextlib.suppress(BlockingIOError):  # full: it is going to end anyway
            self._bell.send(b"\0")

    def wait(self, seconds: float, deaf: float = 0.0) -> Woken:
        """Wait for anything to happen, `seconds` at most; for the first `deaf` seconds news of routes waits, too."""
        now = time.monotonic()
        until, hearing = now + max(seconds, deaf), now + deaf
        woken = self._heard_of(routes=now >= hearing)
        while not (woken.changed or woken.signals or woken.poked or now >= until):
            is_deaf = now < hearing
            poll = self._but_routes if is_deaf else self._anything
            # Here a daemon with nothing to do spends its time: two questions to the kernel, twenty times a second.
            ready = poll.poll(min(TICK, (hearing if is_deaf else until) - now) * 1000)
            now = time.monotonic()
            if ready or is_deaf or self._nfnl.generation() != self._generation:
                woken |= self._heard_of(routes=now >= hearing)
        last = now + BURST
        while woken.changed and now < last and self._but_routes.poll(PAUSE * 1000):
            woken |= self._heard_of(routes=False)
            now = time.monotonic()
        return woken

    def _heard_of(self, *, routes: bool) -> Woken:
        generation = self._nfnl.generation()
        committed, self._generation = generation != self._generation, generation
        woken = Woken(changed=committed) | _announced(self._events) | self._rung()
        # Whoever is about to look has no need to be told of routes once more.
        return woken | _announced(self._routes) if routes or woken.changed else woken

    def _rung(self) -> Woken:
        try:
            rung = self._heard.recv(4096)
        except BlockingIOError:
            return Woken()
        return Woken(signals=frozenset(rung) - {0}, poked=0 in rung)


def _listening(groups: Iterable[int]) -> socket.socket:
    """A socket that hears of changes in the namespace of this thread."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    sock.setblocking(False)
    with contextlib.suppress(OSError):  # refused in a user namespace
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    sock.bind((0, 0))
    for group in groups:
        sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    return sock


def _announced(sock: socket.socket) -> Woken:
    """Whether a socket has heard anything since the last question."""
    announced = moved = False
    while True:
        try:
            data = sock.recv(1 << 16)
        except BlockingIOError:
            return Woken(changed=announced, moved=moved)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise KernelError("listen to rtnetlink", error.strerror or str(error)) from error
            announced = moved = True  # some were lost, and what they were doesn't matter
            continue
        announced = True
        offset = 0
        while not moved and offset + HEADER.size <= len(data):
            size, kind = struct.unpack_from("=IH", data, offset)
            moved = kind in MOVES
            offset += max((size + 3) & ~3, HEADER.size)


def _nothing(number: int, frame: object) -> None:
    """A handler of Python's must be there, or the signal would not be written to the descriptor."""
