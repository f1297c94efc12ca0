"""The live view's pictures, from reports."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from agent.ruleset import COUNTS
from agent.watch import BARS, Frame, History, Rate, WatchError, amount, show, sparkline


def counted(transmit: int | None, misrouted: int = 0) -> dict[str, Any]:
    """Counters of one family: so many packets of 100 bytes."""
    counters: dict[str, Any] = {name: {"packets": 0, "bytes": 0} for name in COUNTS}
    counters["transmit"] = None if transmit is None else {"packets": transmit, "bytes": 100 * transmit}
    counters["misrouted-dropped"] = {"packets": misrouted, "bytes": 100 * misrouted}
    return counters


def an_identity(name: str, transmit: int | None = 0, *, open_: bool = True, misrouted: int = 0) -> dict[str, Any]:
    way = "dev wg0" if open_ else "link wg0 is down"
    state = {"open": open_, "in_force": True, "way": way, "counters": counted(transmit, misrouted)}
    return {"name": name, "link": "wg0", "link_state": "up" if open_ else "down", "families": {"ipv4": state}}


def a_report(*identities: dict[str, Any], daemon: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "gateway": "gw1",
        "policy_digest": "0" * 64,
        "in_force": True,
        "differences": [],
        "notes": [],
        "identities": list(identities),
        "daemon": daemon,
        **more,
    }


def drawn(report: dict[str, Any], history: History | None = None, width: int = 80, height: int = 24) -> list[str]:
    """The screen's lines."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, legacy_windows=False, color_system=None)
    console.print(Frame(history or History(), report))
    return file.getvalue().splitlines()


def grown(*packets: int | None) -> History:
    """A look a second, which found so many packets transmitted."""
    history = History()
    for second, transmit in enumerate(packets):
        history = history.grown(a_report(an_identity("inside", transmit)), float(second))
    return history


KEY = ("inside", "ipv4", "transmit")


def test_rates() -> None:
    """A rate is what was counted between two looks, per second."""
    assert grown(10, 30, 30).rates(KEY) == [(1.0, Rate(20.0, 2000.0)), (2.0, Rate(0.0, 0.0))]


def test_a_counter_made_anew() -> None:
    """A counter that has less than before was made anew: what it has is what came since, never less than nothing."""
    assert grown(1000, 5).rates(KEY) == [(1.0, Rate(5.0, 500.0))]


def test_a_missing_counter_has_no_rate() -> None:
    """While a counter is not there its rate is unknown, and not zero."""
    assert grown(10, None, 30, 40).rates(KEY) == [(1.0, None), (2.0, None), (3.0, Rate(10.0, 1000.0))]
    (*_, line) = drawn(a_report(an_identity("inside")), grown(10, None))
    assert line.split() == ["inside", "wg0", "up", "ipv4", "open", "-", "-", "0", "0", BARS[0]]


def test_only_the_last_minute_is_kept() -> None:
    """However long it is shown, a minute is remembered."""
    assert len(grown(*range(500)).samples) == 61


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.04, "0.0"), (9.94, "9.9"), (9.95, "10"), (999.4, "999"), (999.5, "1.0k"), (9_999, "10k")),
        *((123_456, "123k"), (999_500, "1.0M"), (4_560_000, "4.6M"), (2.5e12, "2.5T")),
    ],
)
def test_amount(value: float, text: str) -> None:
    """An amount has two or three digits and a unit."""
    assert amount(value) == text


@given(st.floats(0, 9.9e15))
def test_amounts_fit(value: float) -> None:
    """Whatever a link can carry fits its column."""
    assert len(amount(value)) <= 5


def test_sparkline() -> None:
    """The present is at the right, the highest bar is for the largest rate, the lowest for none; unknown is blank."""
    values = [(0.1, 0.0), (16.0, 50.0), (31.0, 0.001), (60.0, 100.0)]
    assert sparkline(values, 60.0, 4, BARS) == f"{BARS[0]}{BARS[4]}{BARS[1]}{BARS[7]}"
    assert sparkline([], 60.0, 4, BARS) == "    "
    assert sparkline([(60.0, 0.0)], 60.0, 4, BARS) == f"   {BARS[0]}"


@given(st.lists(st.tuples(st.floats(0, 60), st.floats(0, 1e12)), max_size=70), st.integers(1, 40))
def test_sparklines_fit(values: list[tuple[float, float]], columns: int) -> None:
    """Any past fits its columns."""
    assert len(sparkline(values, 60.0, columns, BARS)) == columns


def test_a_quiet_gateway() -> None:
    """All is well: a line for the gateway, and one for each identity and family; nothing else."""
    daemon = {"pid": 132, "since": time.time(), "in_sync": True, "down": {}, "repairs": []}
    head, titles, inside = drawn(a_report(an_identity("inside"), daemon=daemon), grown(0, 1200))
    assert head.startswith("gw1  in force  policy 000000000000  run pid 132 since ")
    assert titles.split() == ["identity", "link", "pkt/s", "B/s", "transmit", "pkt/s", "B/s", "receive"]
    assert inside.split()[:7] == ["inside", "wg0", "up", "ipv4", "open", "1.2k", "120k"]


def test_what_needs_attention() -> None:
    """Closed ways, misrouted packets, drift, identities that are down, and repairs are told below."""
    repairs = [{"at": 0.0, "kind": "rule", "words": f"+ ip rule add {number}"} for number in range(20)]
    daemon = {"pid": 1, "since": 0.0, "in_sync": False, "down": {"a": "its probe is silent"}, "repairs": repairs}
    report = a_report(
        an_identity("a", open_=False, misrouted=3), daemon=daemon, in_force=False, differences=["+ ip route add x"]
    )
    lines = drawn(report)
    text = "\n".join(lines)
    assert "NOT IN FORCE" in lines[0]
    for words in (
        "differs: + ip route add x",
        "a ipv4: misrouted-dropped 3 packets (300 bytes)",
        "a: down, its probe is silent",
        "a ipv4: closed, link wg0 is down",
        "rule: + ip rule add 19",
    ):
        assert words in text
    assert text.index("ip rule add 19") < text.index("ip rule add 18")


def test_a_policy_without_a_daemon() -> None:
    """That nobody keeps the policy in force is said."""
    assert "idmark run is not at work" in drawn(a_report(an_identity("a")))[0]


def test_more_identities_than_lines() -> None:
    """Of forty identities those with the most traffic are shown, in the policy's order, and how many are not."""

    def looked(second: int) -> dict[str, Any]:
        return a_report(*(an_identity(f"id-{number}", second * (100 - number % 20)) for number in range(40)))

    history = History().grown(looked(0), 0.0).grown(looked(1), 1.0)
    lines = drawn(looked(1), history)
    shown = [line.split()[0] for line in lines if line.startswith("id-")]
    assert len(lines) == 24
    assert shown == [f"id-{number}" for number in (*range(11), *range(20, 30))]
    assert lines[-1].strip() == "… 19 more, with less traffic"


@given(
    st.integers(0, 45),
    st.integers(0, 30),
    st.integers(0, 30),
    st.sampled_from([(80, 24), (40, 10), (200, 60), (20, 5)]),
)
def test_it_always_fits(identities: int, differences: int, repairs: int, size: tuple[int, int]) -> None:
    """However much there is to tell, it is as wide and as high as the terminal at most."""
    daemon = {
        "pid": 1,
        "since": 0.0,
        "in_sync": True,
        "down": {},
        "repairs": [{"at": 0.0, "kind": "nft", "words": "w" * 300}] * repairs,
    }
    report = a_report(
        *(an_identity(f"identity-{number}" * 2, open_=bool(number % 2)) for number in range(identities)),
        daemon=daemon,
        differences=["d" * 300] * differences,
    )
    lines = drawn(report, History(), *size)
    assert len(lines) <= size[1]
    assert all(len(line) <= size[0] for line in lines)


def test_without_unicode() -> None:
    """On a terminal that has no bars the graphs are of ASCII."""
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    console = Console(file=file, width=80, height=24, color_system=None)
    console.print(Frame(grown(0, 100), a_report(an_identity("inside"))))
    file.flush()


#: A process that shows a report of its own; its counter is a thousand packets higher each time.
SHOW = """
import itertools
from agent.watch import show
from tests.unit.test_watch import a_report, an_identity
looks = itertools.count()
try:
    show(lambda: a_report(an_identity("inside", 1000 * next(looks))))
except KeyboardInterrupt:
    print("ended")
"""


def test_on_a_terminal() -> None:
    """On a real terminal the picture is drawn again and again on a screen of its own; Ctrl-C gives the old one back."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = os.environ | {"TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    # Two frames: only then is there a rate.
    while b"k " not in seen.partition(b"open")[2]:
        seen += os.read(ours, 1 << 16)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # EIO: the other side has hung up
        while data := os.read(ours, 1 << 16):
            seen += data
    os.close(ours)
    assert process.wait() == 0
    assert seen.index(b"\x1b[?1049h") < seen.index(b"inside") < seen.index(b"\x1b[?1049l") < seen.index(b"ended")
    assert b"Traceback" not in seen
    assert b"\x1b[31m" not in seen


def test_no_terminal() -> None:
    """Where there is no terminal it says so at once."""
    with pytest.raises(WatchError, match="draws on a terminal"):
        show(dict, Console(file=io.StringIO()))
