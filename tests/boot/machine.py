"""A machine in namespaces: systemd as its process 1 over a copy-on-write view of this one's root, links of its own.

It takes real root: systemd gives services to other users, and a user namespace made without privilege has only one.
Nothing is left behind: the kernel takes all of it apart with process 1; all but /var/lib/idmark lies in memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).parents[2]
#: Seconds until something that must come is given up.
PATIENCE = 60.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Becomes process 1. $BASE is an empty directory, $STATE what a disk would keep, the rest is where things are here.
INIT = r"""
set -eu
mount -t tmpfs tmpfs "$BASE"
mkdir "$BASE/upper" "$BASE/work" "$BASE/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$BASE/upper,workdir=$BASE/work" "$BASE/root"
cd "$BASE/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do : > dev/$name; mount --bind /dev/$name dev/$name; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for place in run etc/systemd/system var/log; do mount -t tmpfs -o mode=755 tmpfs $place; done
mount -t tmpfs -o mode=1777 tmpfs tmp

# As an operator installs it, but that Python and the packages come from here.
mkdir -p opt/idmark/python opt/idmark/packages opt/idmark/source etc/idmark etc/sysusers.d var/lib/idmark
mount --bind "$PYTHON" opt/idmark/python
mount --bind "$PACKAGES" opt/idmark/packages
mount --bind "$SOURCE" opt/idmark/source
mount --bind "$STATE" var/lib/idmark
cat > usr/local/sbin/idmark <<'SCRIPT'
#!/bin/sh
export LD_LIBRARY_PATH=/opt/idmark/python/lib PYTHONPATH=/opt/idmark/source:/opt/idmark/packages
exec /opt/idmark/python/bin/PYTHON_NAME -B -m agent "$@"
SCRIPT
sed -i "s/PYTHON_NAME/$PYTHON_NAME/" usr/local/sbin/idmark
chmod 755 usr/local/sbin/idmark
[ -z "$POLICY" ] || cp "$POLICY" etc/idmark/policy.toml
cp "$SOURCE"/deploy/sysusers.d/idmark.conf etc/sysusers.d/
systemd-sysusers --root="$PWD" idmark.conf
cp -r "$SOURCE"/deploy/networkd/networkd.conf.d etc/systemd/
cp "$SOURCE"/deploy/systemd/*.service "$UNITS"/*.service etc/systemd/system/
cp -r "$UNITS"/*.service.d etc/systemd/system/
systemctl --root="$PWD" enable idmark.service network.service nftables.service

# No link is up, as when a machine is switched on; the far ends are.
ip link set lo up
for name in eth0 vpn0; do ip link add $name type veth peer name far-$name; ip link set far-$name up; done
echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter

pivot_root . tmp
umount -l /tmp
exec env -i container=idmark PATH="$PATH" /lib/systemd/systemd --unit=multi-user.target
"""


@dataclass
class Machine:
    """`base` is an empty directory, `state` what outlives a power cut, `units` more units, with drop-ins."""

    base: Path
    state: Path
    units: Path
    _unshare: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _init: int = field(default=0, init=False)

    def boot(self, policy: Path | None) -> None:
        """Switch it on with this policy in /etc/idmark, and wait until its network is up."""
        environment = {
            "PATH": PATH,
            "BASE": str(self.base),
            "STATE": str(self.state),
            "UNITS": str(self.units),
            "SOURCE": str(REPO),
            "PYTHON": sys.base_prefix,
            "PYTHON_NAME": f"python3.{sys.version_info.minor}",
            "PACKAGES": sysconfig.get_path("purelib"),
            "POLICY": str(policy or ""),
        }
        words = ["unshare", "-m", "-p", "-f", "-n", "-C", "-u", "-i", "--kill-child", "sh", "-c", INIT]
        self._unshare = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL)
        self.wait("systemctl is-active network")

    def power_off(self) -> None:
        """Pull the plug."""
        if self._unshare:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init or self._unshare.pid, signal.SIGKILL)
            self._unshare.wait()
        self._unshare, self._init = None, 0

    def try_(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a line of shell as its root."""
        words = ["nsenter", "-t", str(self._process_1()), "-a", "env", "-i", f"PATH={PATH}", "sh", "-c", script]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)

    def run(self, script: str) -> str:
        """The output of a line of shell, which must succeed."""
        done = self.try_(script)
        assert done.returncode == 0, f"{script}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.journal()}"
        return done.stdout

    def wait(self, script: str) -> None:
        """Wait until a line of shell succeeds."""
        deadline = time.monotonic() + PATIENCE
        while self.try_(script).returncode:
            assert time.monotonic() < deadline, f"{script}: in vain\n{self.journal()}"
            time.sleep(0.1)

    def journal(self) -> str:
        """What the journal has of our units."""
        return self.try_("journalctl --no-pager -o short-monotonic -u 'idmark*' -u network").stdout

    def _process_1(self) -> int:
        """Its number here. Only once it is systemd are there all the namespaces to enter."""
        assert self._unshare is not None
        deadline = time.monotonic() + PATIENCE
        while not self._init:
            assert self._unshare.poll() is None, "the machine did not start: see its output"
            assert time.monotonic() < deadline, "the machine did not start"
            child = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().strip()
            if child and Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                self._init = int(child)
            time.sleep(0.05)
        return self._init
