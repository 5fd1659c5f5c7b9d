# SPDX-License-Identifier: GPL-2.0-or-later
"""A real systemd as pid 1 of namespaces of its own, on an overlay of this machine's root directory.

What it writes lies on a tmpfs and goes with it. /dev has what QEMU needs, /run and /tmp are new, cgroups are
version 2. It needs root, unshare(1), nsenter(1) and systemd.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.wait import wait_until

__all__ = ["BootedSystem", "missing_for_boot"]

_SYSTEMD = "/lib/systemd/systemd"
_BOOT_SECONDS = 60.0

_IN_OWN_CGROUP = r"""
set -eu
mount --make-rprivate /
mount -t cgroup2 cgroup2 "$1"
mkdir "$1/$2"
echo 0 >"$1/$2/cgroup.procs"
umount "$1"
shift 2
exec "$@"
"""
"""runs a command in a new control group: a cgroup namespace that it makes begins there"""

_REMOVE_CGROUP = r"""
set -eu
mount --make-rprivate /
mount -t cgroup2 cgroup2 "$1"
test ! -d "$1/$2" || find "$1/$2" -depth -type d -exec rmdir {} +
"""

_PID_1 = r"""
set -eu
top=$1
mount --make-rprivate /
mount -t tmpfs tmpfs "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" "$top/root"
cd "$top/root"
for source in $2; do
	mkdir -p ".$source"
	mount --bind "$source" ".$source"
done
mount -t proc proc proc
mount -t tmpfs tmpfs dev
mkdir dev/pts dev/shm
for node in null zero full random urandom tty kvm fuse; do
	test -e "/dev/$node" || continue
	# Not the node itself: owner and mode are the booted system's own.
	mknod -m 0666 "dev/$node" c $(stat -c '0x%t 0x%T' "/dev/$node")
done
mount -t devpts devpts dev/pts -o newinstance,ptmxmode=0666,mode=620
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=0755 tmpfs run
mount -t tmpfs tmpfs tmp
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
: >etc/machine-id
mkdir old
pivot_root . old
umount -l old
rmdir old
export container=test
exec /lib/systemd/systemd --log-target=journal systemd.unit=basic.target
"""


def missing_for_boot() -> str | None:
    """Why no systemd can be booted here; None if one can."""
    if os.geteuid() != 0:
        return "booting a systemd needs root"
    absent = [name for name in (_SYSTEMD, "unshare", "nsenter") if shutil.which(name) is None]
    if absent:
        return f"booting a systemd needs {', '.join(absent)}"
    probe = subprocess.run(
        [
            "unshare",
            "-m",
            "-p",
            "-f",
            "-C",
            "-u",
            "-i",
            "sh",
            "-c",
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces for a systemd: {probe.stderr.strip()}" if probe.returncode else None


class BootedSystem:
    """One booted systemd. Commands run in it with run(); its files are below ``root``."""

    def __init__(self, shown: Sequence[Path] = ()) -> None:
        """Boots. Directories in ``shown`` are this machine's own, not an overlay's view of them."""
        self._top = Path(tempfile.mkdtemp(prefix="booted-"))
        command = ["unshare", "-m", "-p", "-f", "-u", "-i", "--kill-child"]
        grouped = ["sh", "-c", _IN_OWN_CGROUP, "cgroup", str(self._top), self._top.name]
        pid_1 = ["unshare", "-C", "sh", "-c", _PID_1, "pid1", str(self._top), " ".join(map(str, shown))]
        self._process = subprocess.Popen(
            [*command, *grouped, *pid_1],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            wait_until(self._has_booted, "systemd has booted", _BOOT_SECONDS)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its pid 1, as seen from here."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])

    @property
    def root(self) -> Path:
        """Its root directory, as seen from here."""
        return Path(f"/proc/{self.pid}/root")

    def run(
        self, *command: str, check: bool = True, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in it. Fails the test, with what the command said, when it fails and ``check``."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-C", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        """The output of systemctl."""
        return self.run("systemctl", "--no-pager", *arguments, check=check).stdout

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", "--value", "-p", name, unit).strip()

    def main_pid(self, unit: str) -> int:
        """The pid of the only process of a running unit, as seen from here."""
        (pid,) = self.pids(self.show(unit, "ControlGroup").lstrip("/"))
        return pid

    def pids(self, group: str) -> list[int]:
        """The processes of a control group, as seen from here; none if there is no such group."""
        try:
            text = (self.root / "sys/fs/cgroup" / group / "cgroup.procs").read_text()
        except OSError:
            return []
        return [int(pid) for pid in text.split()]

    def close(self) -> None:
        """Ends it, and all that runs in it."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        wait_until(self._has_no_cgroup, "the control group is empty and removed")
        shutil.rmtree(self._top)

    def _has_no_cgroup(self) -> bool:
        """Removes it. It is busy while a killed process is not quite gone."""
        command = ["unshare", "-m", "sh", "-c", _REMOVE_CGROUP, "cgroup", str(self._top), self._top.name]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _has_booted(self) -> bool:
        if self._process.poll() is not None:
            assert self._process.stderr is not None
            raise AssertionError(f"systemd didn't boot: {self._process.stderr.read().decode()}")
        try:
            state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        except (OSError, IndexError):
            return False
        return state in ("running", "degraded")
