"""When to look again, and never why: rtnetlink's announcements, the ruleset's generation, signals, other threads."""

from __future__ import annotations

import contextlib
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
#: linux/rtnetlink.h, enum rtnetlink_groups: LINK, then IFADDR, ROUTE and RULE of IPv4 and of IPv6; and IPV4_NETCONF,
#: which tells of rp_filter, but not of src_valid_mark (net/ipv4/devinet.c, devinet_conf_proc).
GROUPS = (1, 5, 7, 8, 9, 11, 19, 24)
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
        self._events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._events.setblocking(False)
        with contextlib.suppress(OSError):  # SO_RCVBUFFORCE is refused in a user namespace
            self._events.setsockopt(socket.SOL_SOCKET, 33, BUFFER)
        self._events.bind((0, 0))
        for group in GROUPS:
            self._events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        self._heard, self._bell = socket.socketpair()
        for end in (self._heard, self._bell):
            end.setblocking(False)
        self._before = {number: signal.signal(number, _nothing) for number in signals}
        self._fd_before = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        self._signals, self._anything = select.poll(), select.poll()
        for poll, each in ((self._signals, self._heard), (self._anything, self._heard), (self._anything, self._events)):
            poll.register(each, select.POLLIN)

    def __enter__(self) -> Wake:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for each in (self._events, self._heard, self._bell):
            each.close()

    def poke(self) -> None:
        """End the wait, or the next one; for other threads."""
        with contextlib.suppress(BlockingIOError):  # full: it is going to end anyway
            self._bell.send(b"\0")

    def wait(self, seconds: float, deaf: float = 0.0) -> Woken:
        """Wait for anything to happen, `seconds` at most; for the first `deaf` seconds the kernel's word waits, too."""
        now = time.monotonic()
        until, hearing = now + max(seconds, deaf), now + deaf
        woken = Woken()
        while now < hearing and not (woken.signals or woken.poked):
            self._signals.poll((hearing - now) * 1000)
            woken |= self._rung()
            now = time.monotonic()
        woken |= self._heard_of()
        while not (woken.changed or woken.signals or woken.poked or now >= until):
            # Here a daemon with nothing to do spends its time: two questions to the kernel, twenty times a second.
            ready = self._anything.poll(min(TICK, until - now) * 1000)
            if ready or self._nfnl.generation() != self._generation:
                woken |= self._heard_of()
            now = time.monotonic()
        last = now + BURST
        while woken.changed and now < last and self._anything.poll(PAUSE * 1000):
            woken |= self._heard_of()
            now = time.monotonic()
        return woken

    def _heard_of(self) -> Woken:
        generation = self._nfnl.generation()
        committed, self._generation = generation != self._generation, generation
        return Woken(changed=committed) | self._announced() | self._rung()

    def _announced(self) -> Woken:
        announced = moved = False
        while True:
            try:
                data = self._events.recv(1 << 16)
            except BlockingIOError:
                return Woken(changed=announced, moved=moved)
            except OSError as error:
                if error.errno != 105:  # ENOBUFS: some were lost, and what they were doesn't matter
                    raise KernelError("listen to rtnetlink", error.strerror or str(error)) from error
                announced = moved = True
                continue
            announced = True
            offset = 0
            while not moved and offset + HEADER.size <= len(data):
                size, kind = struct.unpack_from("=IH", data, offset)
                moved = kind in MOVES
                offset += max((size + 3) & ~3, HEADER.size)

    def _rung(self) -> Woken:
        try:
            rung = self._heard.recv(4096)
        except BlockingIOError:
            return Woken()
        return Woken(signals=frozenset(rung) - {0}, poked=0 in rung)


def _nothing(number: int, frame: object) -> None:
    """A handler of Python's must be there, or the signal would not be written to the descriptor."""
