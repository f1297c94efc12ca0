"""Other programs' settings, read as these programs read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.host import Setting
from agent.ini import assignments
from agent.managers import network_manager, networkd

RULES, ROUTES = "ManageForeignRoutingPolicyRules", "ManageForeignRoutes"
DROP_IN = "etc/systemd/networkd.conf.d/50-idmark.conf"


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def told(root: Path, **files: str) -> str:
    """What networkd does with foreign rules."""
    for name, value in files.items():
        write(root, name, f"[Network]\n{RULES}={value}\n")
    return networkd(root)[0].value


def test_assignments() -> None:
    """Sections, comments, lines that go on, blanks around the equals sign."""
    text = "# a\n[A]\nx = 1\n;b\ny=1 \\\n# between\n  2\n\n[B]\nnonsense\nx=\n"
    assert list(assignments(text)) == [("A", "x", "1"), ("A", "y", "1  2"), ("B", "x", "")]


def test_no_file() -> None:
    """Without a file both are on."""
    assert networkd(Path("/nonexistent")) == (Setting(RULES, "yes"), Setting(ROUTES, "yes"))


def test_the_drop_in_of_ours(tmp_path: Path) -> None:
    """With the drop-in that comes with idmark both are off, and the file is named."""
    ours = Path(__file__).parents[2] / "deploy/networkd/networkd.conf.d/50-idmark.conf"
    write(tmp_path, DROP_IN, ours.read_text())
    assert networkd(tmp_path) == (Setting(RULES, "no", f"/{DROP_IN}"), Setting(ROUTES, "no", f"/{DROP_IN}"))


@pytest.mark.parametrize(
    ("files", "value"),
    [
        pytest.param({"etc/systemd/networkd.conf": "no"}, "no", id="main"),
        pytest.param({"usr/lib/systemd/networkd.conf": "no"}, "no", id="vendors-main"),
        pytest.param(
            {"etc/systemd/networkd.conf": "yes", "usr/lib/systemd/networkd.conf": "no"}, "yes", id="hidden-main"
        ),
        pytest.param({"etc/systemd/networkd.conf": "yes", DROP_IN: "no"}, "no", id="drop-in-after-main"),
        pytest.param({"usr/lib/systemd/networkd.conf.d/60.conf": "yes", DROP_IN: "no"}, "yes", id="by-name"),
        pytest.param(
            {"usr/lib/systemd/networkd.conf.d/50-idmark.conf": "yes", DROP_IN: "no"}, "no", id="etc-hides-usr"
        ),
        pytest.param({"run/systemd/networkd.conf.d/50-idmark.conf": "yes", DROP_IN: "no"}, "no", id="etc-hides-run"),
        pytest.param({DROP_IN: "off"}, "no", id="off"),
        pytest.param({DROP_IN: "maybe"}, "yes", id="no-boolean"),
        pytest.param({"etc/systemd/networkd.conf.d/50-idmark.txt": "no"}, "yes", id="no-conf"),
    ],
)
def test_precedence(tmp_path: Path, files: dict[str, str], value: str) -> None:
    """The last of the drop-ins by name has the last word, and of one name /etc hides the others."""
    assert told(tmp_path, **files) == value


def test_a_masked_drop_in(tmp_path: Path) -> None:
    """A link to /dev/null hides the vendor's file of that name."""
    write(tmp_path, "usr/lib/systemd/networkd.conf.d/50-x.conf", f"[Network]\n{RULES}=no\n")
    assert networkd(tmp_path)[0].value == "no"
    write(tmp_path, DROP_IN, "")
    (tmp_path / "etc/systemd/networkd.conf.d/50-x.conf").symlink_to("/dev/null")
    assert networkd(tmp_path)[0].value == "yes"


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    """A drop-in whose target is gone says nothing, and is no trouble."""
    place = tmp_path / "etc/systemd/networkd.conf.d"
    place.mkdir(parents=True)
    (place / "50-gone.conf").symlink_to(tmp_path / "gone")
    assert {setting.value for setting in networkd(tmp_path)} == {"yes"}


def test_another_section(tmp_path: Path) -> None:
    """A key in a section that is not its own says nothing."""
    write(tmp_path, DROP_IN, f"[DHCPv4]\n{RULES}=no\n")
    assert networkd(tmp_path)[0].value == "yes"


def test_network_manager(tmp_path: Path) -> None:
    """Tables of single connections and of all, with the file; 0 is the default and says nothing."""
    write(tmp_path, "etc/NetworkManager/NetworkManager.conf", "[connection-all]\nipv4.route-table=100\n")
    keyfiles = "etc/NetworkManager/system-connections"
    keyfile = "[connection]\ninterface-name=wan\n[ipv4]\nroute-table=0\n[ipv6]\nroute-table=7\n"
    write(tmp_path, f"{keyfiles}/wan.nmconnection", keyfile)
    write(tmp_path, f"run/{keyfiles.removeprefix('etc/')}/any.nmconnection", "[ipv4]\nroute-table=8\n")
    assert network_manager(tmp_path) == (
        Setting("ipv4.route-table", "100", "/etc/NetworkManager/NetworkManager.conf"),
        Setting("wan ipv6.route-table", "7", f"/{keyfiles}/wan.nmconnection"),
        Setting("ipv4.route-table", "8", "/run/NetworkManager/system-connections/any.nmconnection"),
    )
