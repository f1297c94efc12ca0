"""How long until what somebody broke is whole again: `./dev bench repair`.

Counted from before the command that breaks it is started until a look at the kernel finds nothing to do. Beside it, in
the same run, what a person needs who has the reviewed ruleset at hand: `nft -f`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict

from agent import reconcile
from agent.lab import sandbox
from agent.policy import load
from tests.bench.faults import faults
from tests.bench.stage import stage
from tests.kernel.net import Host

PATIENCE = 10.0


def main() -> int:
    """0: within what was promised and nothing leaked."""
    parser = argparse.ArgumentParser(prog="./dev bench repair", description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=73)
    arguments = parser.parse_args()
    sandbox.enter()
    chance = random.Random(arguments.seed)
    took: dict[str, list[float]] = defaultdict(list)
    by_hand: list[float] = []
    with stage() as here, here.gateway.host("gw") as gw:
        ruleset = here.gateway.rendered()
        with gw.inside(), reconcile.opened() as kernel:
            policy = load(here.gateway.policy)
            several = faults(gw, chance)
            for _ in range(arguments.faults):
                fault = next(several)
                time.sleep(chance.uniform(0.02, 0.2))
                began = time.monotonic()
                _run(gw, fault.commands)
                while reconcile.look(policy, kernel).plan.steps:
                    if time.monotonic() - began > PATIENCE:
                        print(f"not repaired: {fault}", *here.daemon.log[-5:], sep="\n")
                        return 1
                took[fault.kind].append(time.monotonic() - began)
            for _ in range(10):
                began = time.monotonic()
                gw.nft(ruleset)
                by_hand.append(time.monotonic() - began)
                time.sleep(0.3)
        leaked = here.leaked()
        sent = here.traffic.sent
    for kind, times in sorted(took.items()):
        print(f"{kind:<26} {len(times):>4}  median {_ms(statistics.median(times))}  worst {_ms(max(times))}")
    every = sorted(time for times in took.values() for time in times)
    median, worst = statistics.median(every), every[-1]
    print(f"{'all':<26} {len(every):>4}  median {_ms(median)}  worst {_ms(worst)}")
    reload = statistics.median(by_hand)
    print(f"median / a reload by hand (nft -f, {_ms(reload)}): {median / reload:.1f}")
    print(f"{sent} packets sent meanwhile; leaked: {leaked or 'none'}")
    return int(median > 0.1 or worst > 0.5 or bool(leaked))


def _run(gw: Host, commands: tuple[tuple[str, ...], ...]) -> None:
    for words in commands:
        gw.run([*words])


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


if __name__ == "__main__":
    raise SystemExit(main())
