"""The kernel's count of IPv4 packets that came from where they can't come from."""

from __future__ import annotations

import os
from pathlib import Path

from agent.kernel import KernelError

#: A row of hexadecimal numbers for each CPU, under the names of the columns (lnstat(8); net/ipv4/route.c,
#: rt_cache_seq_show). Every namespace shows it, and the numbers are those of the whole machine.
#: Not /proc/net: that is the namespace of the process's first thread.
FILE = Path("/proc/thread-self/net/stat/rt_cache")
COLUMN = "in_martian_src"


def martian_sources() -> int | None:
    """Packets that rp_filter or an impossible source stopped, since boot; None where the kernel has no such file.

    Raises KernelError.
    """
    try:
        names, *rows = FILE.read_text(encoding="ascii").splitlines()
        column = names.split().index(COLUMN)
        return sum(int(row.split()[column], 16) for row in rows)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KernelError(f"read {FILE}", os.strerror(error.errno or 0)) from error
    except (ValueError, IndexError) as error:
        raise KernelError(f"read {FILE}", f"it has no column {COLUMN}, or rows of another length") from error
