# SPDX-License-Identifier: GPL-2.0-or-later
"""What the units may do: little, and enough for each kind of VM with the drop-ins of systemd/examples."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.ctl.guestconsole import GuestConsole
from tests.support.checkout import ROOT
from tests.support.hostbench import PROXYD, QEMU_UNIT, REMOTED, HostBench
from tests.support.qemu import PATIENCE
from tests.support.wait import wait_until

EXAMPLES = ROOT / "systemd/examples"
EMBEDDED = """\
name = "vm2"
vm = "embedded"

[[device]]
model = "edu"
id = "edu0"
addr = "05.0"
"""
PID = """\
name = "vm1"
vm = "pid:{pid}"

[[device]]
model = "irq-line"
id = "line0"
gsi = 11
"""


@pytest.fixture
def host(
    installed: Path, requires_systemd: None, requires_kvm: None, requires_qemu: None
) -> Iterator[HostBench]:
    """A host whose VM hasn't been started."""
    with closing(HostBench(installed)) as bench:
        yield bench


@pytest.mark.parametrize(
    ("unit", "drop_ins", "limit"),
    [
        ("remoted", (), 0.4),
        ("remoted", ("remoted-chardev.conf",), 0.4),
        ("remoted", ("remoted-drive.conf",), 0.4),
        ("proxyd", (), 0.4),
        ("proxyd", ("proxyd-embedded.conf", "without-qemu.conf"), 0.4),
        ("proxyd", ("proxyd-pid.conf",), 0.9),
    ],
)
def test_exposure(tmp_path: Path, unit: str, drop_ins: tuple[str, ...], limit: float) -> None:
    """By the offline analyser, whose threshold is in tenths."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    path = tmp_path / f"iohub-{unit}@vm1.service"
    parts = [ROOT / f"systemd/iohub-{unit}@.service", *(EXAMPLES / name for name in drop_ins)]
    path.write_text("\n".join(part.read_text() for part in parts))
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={limit * 10:.0f}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


def test_an_embedded_vm(host: HostBench) -> None:
    remoted, proxyd = (unit.replace("vm1", "vm2") for unit in (REMOTED, PROXYD))
    (host.root / "etc/iohub/vm2.toml").write_text(EMBEDDED)
    for unit in (remoted, proxyd):
        host.drop_in(unit, (EXAMPLES / "without-qemu.conf").read_text(), "without-qemu.conf")
    host.drop_in(proxyd, (EXAMPLES / "proxyd-embedded.conf").read_text(), "embedded.conf")
    host.system.systemctl("start", remoted, proxyd)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(host.root / "run/iohub/vm2/proxyd.console"))
    with GuestConsole(connection) as console:
        console.wait_ready(PATIENCE)
        assert console.command("setup").result.text("functions") == "1"
        assert console.command("run 20").ok
        (record,) = console.command("stats").of_kind("function")
        assert [record.number(key) for key in ("raised", "served", "lost", "redone")] == [20, 20, 0, 0]


def test_a_process_of_another_user(host: HostBench) -> None:
    host.start()
    host.system.systemctl("stop", REMOTED, PROXYD)
    (host.root / "etc/iohub/vm1.toml").write_text(PID.format(pid=host.system.show(QEMU_UNIT, "MainPID")))
    host.drop_in(PROXYD, (EXAMPLES / "proxyd-pid.conf").read_text())
    host.system.systemctl("start", REMOTED, PROXYD)
    wait_until(lambda: host.linked() == {"line0"}, "the line is wired to QEMU's KVM")


def test_a_drive(host: HostBench) -> None:
    """The image is opened for writing, by the next process as well."""
    folder = host.root / "var/lib/iohub"
    folder.mkdir()
    image = folder / "disk0.img"
    image.write_bytes(bytes(1 << 20))
    host.system.run("chown", "-R", "iohub:", "/var/lib/iohub")
    host.drop_in(REMOTED, (EXAMPLES / "remoted-drive.conf").read_text())
    host.add_device('model = "nvme"\nid = "disk0"\naddr = "07.0"\ndrive = "file:/var/lib/iohub/disk0.img"\n')
    host.start({"edu0", "com1", "disk0"})
    host.kill(REMOTED)
    wait_until(lambda: host.linked() == {"edu0", "com1", "disk0"}, "the next process has opened it")
    assert "disk0: its drive can only be read" not in host.journal("-u", REMOTED)


@pytest.mark.parametrize(
    "chardev", ["pty", "unix:/run/iohub/vm1/com", "unix:/run/serial/com", "file:/run/serial/com"]
)
def test_a_chardev(host: HostBench, chardev: str) -> None:
    (host.root / "run/serial").mkdir()
    host.system.run("chown", "iohub:", "/run/serial")
    if "serial" in chardev:
        host.drop_in(REMOTED, (EXAMPLES / "remoted-chardev.conf").read_text())
    host.add_device(f'model = "pci-serial"\nid = "com2"\naddr = "07.0"\nchardev = "{chardev}"\n')
    host.start({"edu0", "com1", "com2"})
    if ":" in chardev:
        assert (host.root / chardev.partition(":/")[2]).exists()
