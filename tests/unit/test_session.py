"""The operator's session: who, from where; and the options that ask for a net."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from agent import cli

ASK = "from agent import session; print(session.connection())"


@pytest.mark.parametrize(
    ("connection", "found"),
    [
        pytest.param("198.51.100.10 50022 192.0.2.130 22", "198.51.100.10", id="ipv4"),
        pytest.param("2001:db8:1::10 50022 2001:db8:4::130 22", "2001:db8:1::10", id="ipv6"),
        pytest.param("fe80::1%eth0 50022 fe80::2%eth0 22", "None", id="link-local"),
        pytest.param("198.51.100.10 22", "None", id="garbage"),
        pytest.param("198.51.100.10 50022 2001:db8:4::130 22", "None", id="two-families"),
    ],
)
@pytest.mark.parametrize("above", [False, True], ids=["own", "sudo"])
def test_connection(connection: str, found: str, above: bool) -> None:
    """The connection is found in the environment, or in that of a process above; what can't be one is none."""
    command = [sys.executable, "-c", ASK]
    if above:
        command = ["sh", "-c", f"env -u SSH_CONNECTION {sys.executable} -c '{ASK}'; exit $?"]
    environment = {**os.environ, "SSH_CONNECTION": connection}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert (found in said) if found != "None" else (said == "None\n")


@pytest.mark.parametrize("text", ["0", "0s", "-5s", "25h", "1d", "", "s", "1.5m", "٣s", "90 s"])
def test_bad_durations(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A time to confirm in that can't be one is refused before anything is looked at."""
    with pytest.raises(SystemExit) as left:
        cli.main(["apply", f"--confirm-within={text}"])
    assert left.value.code == 2
    assert "is no duration from 1s to 24h" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--expect", "x", "--plan", "y"], ["--approved", "--plan", "y"]])
def test_one_approval(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is to be applied is named in one way."""
    with pytest.raises(SystemExit):
        cli.main(["apply", *words])
    assert "not allowed with argument" in capsys.readouterr().err
