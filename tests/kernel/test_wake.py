"""What wakes the daemon, and what doesn't."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from agent.kernel.nfnl import Nfnl
from agent.kernel.wake import BUFFER, Wake, Woken
from tests.kernel.net import Host

#: Seconds: long enough for whatever must come, short enough for what must not.
LONG, SHORT = 10.0, 0.2


@pytest.fixture
def wake(netns: Host) -> Iterator[Wake]:
    """A wake in the test's namespace, which has one link."""
    netns.ip_batch(
        "link add near type veth peer name far\nlink set near up\nlink set far up\naddress add 192.0.2.1/24 dev near"
    )
    netns.settle()
    with Nfnl() as nfnl, Wake(nfnl, {signal.SIGHUP, signal.SIGTERM}) as wake:
        yield wake


def test_silence(wake: Wake) -> None:
    """Nothing happens: nothing wakes it."""
    assert wake.wait(SHORT) == Woken()


@pytest.mark.parametrize(
    ("words", "moved"),
    [
        pytest.param("link set near down", True, id="link"),
        pytest.param("link set near name other", True, id="renamed"),
        pytest.param("link add third type veth peer name fourth", True, id="new-link"),
        pytest.param("address add 192.0.2.2/24 dev near", True, id="address"),
        pytest.param("address add 2001:db8::2/64 dev near nodad", True, id="ipv6-address"),
        pytest.param("route add 198.51.100.0/24 via 192.0.2.9", False, id="route"),
        pytest.param("-6 route add 2001:db8:9::/64 dev near", False, id="ipv6-route"),
        pytest.param("rule add priority 100 lookup 100", False, id="rule"),
        pytest.param("-6 rule add priority 100 lookup 100", False, id="ipv6-rule"),
    ],
)
def test_rtnetlink(wake: Wake, netns: Host, words: str, moved: bool) -> None:
    """A change of links, addresses, routes or rules wakes it; of links and addresses it says so."""
    netns.ip(*words.split())
    assert wake.wait(LONG) == Woken(changed=True, moved=moved)


def test_nftables(wake: Wake, netns: Host) -> None:
    """Whoever commits anything to nf_tables wakes it; reading doesn't."""
    netns.nft("table inet foreign { }")
    assert wake.wait(LONG) == Woken(changed=True)
    netns.run(["nft", "list", "ruleset"])
    assert wake.wait(SHORT) == Woken()


def test_burst(wake: Wake, netns: Host) -> None:
    """A burst of changes is one reason to look, and not many."""
    netns.ip_batch("\n".join(f"route add 198.51.{number}.0/24 via 192.0.2.9" for number in range(100)))
    assert wake.wait(LONG).changed
    assert wake.wait(SHORT) == Woken()


def test_overflow(wake: Wake, netns: Host) -> None:
    """More than its buffer holds: some announcements are lost, and it looks all the same."""
    routes = BUFFER // 200
    netns.ip_batch("\n".join(f"route add 10.{n >> 8}.{n & 255}.0/24 via 192.0.2.9" for n in range(routes)))
    assert wake.wait(LONG).changed
    netns.ip("rule", "add", "priority", "100", "lookup", "100")
    assert wake.wait(LONG).changed


def test_deaf(wake: Wake, netns: Host) -> None:
    """While it is deaf news of routes waits, and is not lost; of rules and of the ruleset it hears all the same."""
    netns.ip("route", "add", "198.51.100.0/24", "via", "192.0.2.9")
    assert wake.wait(0.0, deaf=SHORT).changed
    assert wake.wait(SHORT) == Woken()
    netns.ip("rule", "add", "priority", "100", "lookup", "100")
    assert wake.wait(0.0, deaf=LONG).changed
    netns.nft("table inet foreign { }")
    assert wake.wait(0.0, deaf=LONG).changed


@pytest.mark.parametrize("deaf", [0.0, LONG])
def test_signals(wake: Wake, deaf: float) -> None:
    """Signals wake it, also while it is deaf; each is told, and does nothing else."""
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    assert wake.wait(LONG, deaf) == Woken(signals=frozenset({signal.SIGHUP, signal.SIGTERM}))


@pytest.mark.parametrize("deaf", [0.0, LONG])
def test_poke(wake: Wake, deaf: float) -> None:
    """Another thread wakes it, also while it is deaf, and as often as it likes."""

    def poke() -> None:
        for _ in range(10_000):
            wake.poke()

    thread = threading.Thread(target=poke)
    thread.start()
    assert wake.wait(LONG, deaf).poked
    thread.join()


def test_handlers_come_back(netns: Host) -> None:
    """Afterwards signals do what they did before."""
    before = signal.getsignal(signal.SIGHUP), signal.set_wakeup_fd(-1)
    with Nfnl() as nfnl, Wake(nfnl, {signal.SIGHUP}):
        assert signal.getsignal(signal.SIGHUP) is not before[0]
    assert (signal.getsignal(signal.SIGHUP), signal.set_wakeup_fd(-1)) == before
