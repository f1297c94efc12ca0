"""Ten minutes of faults against the running daemon, under traffic: `./dev soak`.

What others do to rules, routes and the ruleset (faults.py), and besides: the tunnel's link flaps, its address changes,
the policy changes and is faulty for a while, the daemon is told to reload, somebody applies another policy. At the end
all must be in force, nothing may have leaked, and the daemon may have grown neither in memory nor in descriptors.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

from agent import reconcile
from agent.lab import sandbox
from agent.policy import load
from tests.bench.faults import faults
from tests.bench.stage import Stage, stage
from tests.kernel.net import Host

#: Seconds until memory is compared, seconds between two faults, and by how much memory may grow: what is repaired is
#: remembered for ten minutes (agent.fights.WINDOW), which comes to some MiB, and to no more.
WARM, PAUSES, GROWTH = 60.0, (0.02, 1.0), 1.1
PATIENCE = 20.0


def main() -> int:
    """0: all is well; 1: not, and the output says what."""
    parser = argparse.ArgumentParser(prog="./dev soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=73)
    arguments = parser.parse_args()
    sandbox.enter()
    chance = random.Random(arguments.seed)
    done: Counter[str] = Counter()
    with stage() as here, here.gateway.host("gw") as gw:
        began = time.monotonic()
        leaked = ""
        last: deque[str] = deque(maxlen=4)
        memory = 0
        with gw.inside():
            several = faults(gw, chance)
            while time.monotonic() < began + arguments.minutes * 60:
                time.sleep(chance.uniform(*PAUSES))
                if chance.random() < 0.25:
                    happens = chance.choice(WEATHER)
                    happens(here, gw, chance)
                    what = happens.__name__.strip("_").replace("_", " ")
                else:
                    # What a fault is made of may be gone by the time that it comes: another one has been there before.
                    try:
                        fault = next(several)
                        for words in fault.commands:
                            gw.run([*words])
                        what = f"{fault.kind}: {' / '.join(map(' '.join, fault.commands))}"
                    except (RuntimeError, IndexError):
                        what = "too late"
                        several = faults(gw, chance)
                done[what.partition(":")[0]] += 1
                last.append(f"{time.monotonic() - began:.2f} s: {what}")
                if here.leaked() != leaked:
                    leaked = here.leaked()
                    print(f"leaked: {leaked}", *last, sep="\n  behind ")
                if not memory and time.monotonic() > began + WARM:
                    memory, descriptors = _memory(here), _descriptors(here)
                    print(f"after {WARM:.0f} s: {memory} KiB, {descriptors} descriptors")
            here.gateway.write()
            here.daemon.reload()
            in_force = _comes_in_force(here)
        grown, left = _memory(here), _descriptors(here)
        leaked, sent = here.leaked(), here.traffic.sent
        here.daemon.stop()
        here.gateway.idmark("remove")
        time.sleep(1.0)
        would_leak = here.leaked()
        tracebacks = [line for line in here.daemon.log if "Traceback" in line or "internal error" in line]
    print(*(f"{count:>5}  {what}" for what, count in sorted(done.items())), sep="\n")
    print(f"{sum(done.values())} faults, {sent} packets; leaked: {leaked or 'none'}; in force at the end: {in_force}")
    print(f"at the end: {grown} KiB, {left} descriptors; leaked in a second without idmark: {would_leak or 'none'}")
    print(*tracebacks, sep="\n")
    flat = not memory or (grown <= memory * GROWTH and left <= descriptors)
    return int(not (in_force and flat and would_leak) or bool(leaked or tracebacks))


def _link_flaps(here: Stage, gw: Host, chance: random.Random) -> None:
    here.gateway.lab.link_down("gw", "vpn0")
    time.sleep(chance.uniform(0.0, 0.5))
    here.gateway.lab.link_up("gw", "vpn0")


def _address_comes_and_goes(here: Stage, gw: Host, chance: random.Random) -> None:
    address = f"203.0.113.{chance.randrange(100, 200)}/24"
    gw.ip("address", "add", address, "dev", "wan")
    time.sleep(chance.uniform(0.0, 0.5))
    gw.ip("address", "delete", address, "dev", "wan")


def _policy_changes(here: Stage, gw: Host, chance: random.Random) -> None:
    here.gateway.write({"id": chance.choice((1, 3)), "clamp_mss": chance.random() < 0.5})


def _policy_is_faulty(here: Stage, gw: Host, chance: random.Random) -> None:
    here.gateway.policy.write_text("gateway = \n")
    time.sleep(chance.uniform(0.0, 3.0))
    here.gateway.write()


def _told_to_reload(here: Stage, gw: Host, chance: random.Random) -> None:
    here.daemon.reload()


def _somebody_applies(here: Stage, gw: Host, chance: random.Random) -> None:
    here.gateway.idmark("apply", check=False)


WEATHER: tuple[Callable[[Stage, Host, random.Random], None], ...] = (
    _link_flaps,
    _address_comes_and_goes,
    _policy_changes,
    _policy_is_faulty,
    _told_to_reload,
    _somebody_applies,
)


def _comes_in_force(here: Stage) -> bool:
    policy = load(here.gateway.policy)
    with reconcile.opened() as kernel:
        deadline = time.monotonic() + PATIENCE
        while reconcile.look(policy, kernel).plan.steps:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
    return True


def _memory(here: Stage) -> int:
    """The daemon's resident memory, KiB."""
    status = Path(f"/proc/{here.daemon.process.pid}/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


def _descriptors(here: Stage) -> int:
    return len(list(Path(f"/proc/{here.daemon.process.pid}/fd").iterdir()))


if __name__ == "__main__":
    raise SystemExit(main())
