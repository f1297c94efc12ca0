"""The seams to the kernel: thin, typed, and the only rooms that know netlink, libnftables and /proc."""

from agent import IdmarkError


class KernelError(IdmarkError):
    """The kernel refused. `doing` says what was asked of it, `why` what it answered."""

    def __init__(self, doing: str, why: str) -> None:
        super().__init__(f"{doing}: {why}")
        self.doing = doing
        self.why = why
