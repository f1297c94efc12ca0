"""What systemd-networkd and NetworkManager are told in their files, as these programs read them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from agent import IdmarkError
from agent.host import Setting
from agent.ini import assignments

#: Where configuration lies, the more important first: a file hides those of the same name further down
#: (systemd.conf(5)).
SYSTEMD = ("etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd", "lib/systemd")
#: networkd.conf(5): both are on unless a file says otherwise, the first since 249.
FOREIGN = ("ManageForeignRoutingPolicyRules", "ManageForeignRoutes")
TRUE = frozenset({"1", "yes", "y", "true", "t", "on"})
FALSE = frozenset({"0", "no", "n", "false", "f", "off"})

NETWORK_MANAGER = ("etc/NetworkManager", "run/NetworkManager", "usr/lib/NetworkManager")
CONNECTIONS = "system-connections"


class SettingsError(IdmarkError):
    """Another program's file could not be read."""


def networkd(root: Path = Path("/")) -> tuple[Setting, ...]:
    """Whether systemd-networkd deletes rules and routes that are not its own. Raises SettingsError."""
    found = {key: Setting(key, "yes") for key in FOREIGN}
    for path in _systemd_files(root, "networkd.conf"):
        for section, key, value in assignments(_read(path)):
            if section == "Network" and key in found and value.lower() in TRUE | FALSE:
                found[key] = Setting(key, "yes" if value.lower() in TRUE else "no", _name(path, root))
    return tuple(found.values())


def network_manager(root: Path = Path("/")) -> tuple[Setting, ...]:
    """The routing tables other than main that NetworkManager is to use, for all connections or for one.

    The key of a connection's begins with its link's name, which may be missing: `wan ipv4.route-table`. Raises
    SettingsError.
    """
    return tuple(
        Setting(key, value, _name(path, root))
        for path, key, value in (*_global_tables(root), *_connection_tables(root))
        if value not in ("", "0")
    )


def _global_tables(root: Path) -> Iterator[tuple[Path, str, str]]:
    """nm-settings(5): a connection that says nothing goes by the `[connection…]` sections of NetworkManager.conf."""
    for path in _nm_files(root):
        for section, key, value in assignments(_read(path)):
            if section.startswith("connection") and key in ("ipv4.route-table", "ipv6.route-table"):
                yield path, key, value


def _connection_tables(root: Path) -> Iterator[tuple[Path, str, str]]:
    for directory in NETWORK_MANAGER:
        for path in sorted((root / directory / CONNECTIONS).glob("*")):
            if path.name.startswith(".") or not path.is_file():
                continue
            values = {(section, key): value for section, key, value in assignments(_read(path))}
            link = values.get(("connection", "interface-name"), "")
            for family in ("ipv4", "ipv6"):
                if (family, "route-table") in values:
                    yield path, f"{link} {family}.route-table".strip(), values[family, "route-table"]


def _systemd_files(root: Path, name: str) -> Iterator[Path]:
    """The file and its drop-ins, in the order in which they are read: the last word counts."""
    mains = (root / directory / name for directory in SYSTEMD)
    yield from (path for path in list(filter(os.path.lexists, mains))[:1] if not _is_masked(path))
    yield from _drop_ins(root / directory / f"{name}.d" for directory in SYSTEMD)


def _nm_files(root: Path) -> Iterator[Path]:
    """NetworkManager.conf(5): the directories first, the file itself has the last word."""
    yield from _drop_ins(root / directory / "conf.d" for directory in NETWORK_MANAGER)
    main = root / NETWORK_MANAGER[0] / "NetworkManager.conf"
    if main.exists():
        yield main


def _drop_ins(directories: Iterator[Path]) -> list[Path]:
    """The files of these directories by their names; of one name that of the first directory which has it."""
    found: dict[str, Path] = {}
    for directory in directories:
        for path in directory.glob("*.conf"):
            found.setdefault(path.name, path)
    return [path for _, path in sorted(found.items()) if not _is_masked(path)]


def _is_masked(path: Path) -> bool:
    """A link to /dev/null hides what has the same name, and says nothing itself."""
    return path.is_symlink() and os.readlink(path) == os.devnull


def _read(path: Path) -> str:
    """Its text; a link that leads nowhere says nothing, and nor does what has gone meanwhile."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise SettingsError(f"read {path}: {error.strerror}") from error


def _name(path: Path, root: Path) -> str:
    return f"/{path.relative_to(root)}"
