"""Packets on their way through the host's rules and routes."""

from __future__ import annotations

import ctypes
import os
import sys
import time

#: membarrier(2) in the kernel's tables of 64-bit system calls; the C library has no name for it.
MEMBARRIER = {
    "x86_64": 324,
    "aarch64": 283,
    "loongarch64": 283,
    "riscv64": 283,
    "ppc64le": 365,
    "s390x": 356,
}
MEMBARRIER_CMD_GLOBAL = 1
#: Seconds to wait where the kernel can't be asked: four times what it took to answer at worst.
LONG = 0.1


def wait() -> None:
    """Return when every packet is through that was on its way between a mark and its route when this was called.

    A packet is held up in between by another table's thousand rules, or by a CPU that is somebody else's for a while.
    The kernel looks at rules and routes in read-side critical sections of RCU, from a hook's first rule to the route
    that is looked up for the mark (nf_hook(), netif_receive_skb()), and membarrier(2) waits for all of them to end
    (synchronize_rcu() in kernel/sched/membarrier.c): 8 ms and more. It doesn't where there is one CPU alone, must not
    where CPUs are `nohz_full`, and some sandboxes don't let it through: then it is a wait by the clock.
    """
    number = MEMBARRIER.get(os.uname().machine) if sys.maxsize > 1 << 32 and os.cpu_count() != 1 else None
    if number is None or ctypes.CDLL(None).syscall(number, MEMBARRIER_CMD_GLOBAL, 0, 0):
        time.sleep(LONG)
