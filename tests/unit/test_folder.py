"""Folders that root and the agent's own user share. What takes two users is in tests/boot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent import folder


def put(path: Path, name: str, data: bytes) -> None:
    with folder.made(path, 0o750) as place:
        folder.put(place, name, data, 0o640, durable=True)


def test_put_and_got(tmp_path: Path) -> None:
    """What is put is there whole, with its modes, and nothing else is."""
    put(tmp_path / "a" / "b", "file", b"one")
    put(tmp_path / "a" / "b", "file", b"two")
    with folder.opened(tmp_path / "a", "b") as place:
        assert folder.got(place, "file") == b"two"
        assert folder.got(place, "another") is None
    assert os.listdir(tmp_path / "a" / "b") == ["file"]
    assert (tmp_path / "a" / "b" / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o750


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path: Path) -> None:
    """A symbolic link where a file is to be put is not followed: it makes way."""
    (tmp_path / "other").write_text("untouched")
    (tmp_path / "file").symlink_to(tmp_path / "other")
    put(tmp_path, "file", b"new")
    assert (tmp_path / "other").read_text() == "untouched"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("what", ["link", "fifo", "folder"])
def test_nothing_but_a_file_is_read(tmp_path: Path, what: str) -> None:
    """A symbolic link, a FIFO or a folder in the place of a file is refused at once."""
    path = tmp_path / "file"
    match what:
        case "link":
            (tmp_path / "other").write_text("secret")
            path.symlink_to(tmp_path / "other")
        case "fifo":
            os.mkfifo(path)
        case _:
            path.mkdir()
    with folder.opened(tmp_path) as place:
        with pytest.raises(OSError, match=r"symbolic|regular"):
            folder.got(place, "file")
        with pytest.raises(OSError, match=r"symbolic|owner|directory"), folder.lockable(place, "file"):
            pass


def test_a_folder_is_not_led_astray(tmp_path: Path) -> None:
    """A symbolic link in the place of a folder below is refused."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "inner").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError), folder.made(tmp_path, 0o755, "inner", 0o700):
        pass
    with pytest.raises(NotADirectoryError), folder.opened(tmp_path, "inner"):
        pass


def test_what_a_killed_one_left_is_no_hindrance(tmp_path: Path) -> None:
    """The half-written file of a process that was killed, and whose number comes again, makes way."""
    (tmp_path / f".file.{os.getpid()}").write_text("half")
    put(tmp_path, "file", b"whole")
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_put_leaves_the_old_one(tmp_path: Path) -> None:
    """What can't be put leaves what was there, and nothing besides."""
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        put(tmp_path, "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_too_large_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be read again is refused before anything relies on it; just as large as may be is read."""
    monkeypatch.setattr(folder, "LIMIT", 4)
    with folder.opened(tmp_path) as place:
        folder.put(place, "file", b"1234", 0o600, durable=False)
        with pytest.raises(OSError, match="it is larger than"):
            folder.put(place, "file", b"12345", 0o600, durable=False)
        assert folder.got(place, "file") == b"1234"


def test_a_file_to_be_locked(tmp_path: Path) -> None:
    """It is made once, and whoever comes later has the same one."""
    with (
        folder.opened(tmp_path) as place,
        folder.lockable(place, "lock") as first,
        folder.lockable(place, "lock") as two,
    ):
        assert os.path.sameopenfile(first, two)
    assert os.listdir(tmp_path) == ["lock"]
