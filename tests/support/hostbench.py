# SPDX-License-Identifier: GPL-2.0-or-later
"""A hypervisor host: a booted systemd with iohub's units, and a stock QEMU with the guest under qemu@vm1."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from common.control import call
from common.ctl.guestconsole import GuestConsole, Reply
from tests.support.bootedsystem import BootedSystem
from tests.support.checkout import ROOT
from tests.support.qemu import PATIENCE, boot, guest_image
from tests.support.wait import wait_until

__all__ = ["PROXYD", "QEMU_UNIT", "REMOTED", "HostBench"]

REMOTED, PROXYD, QEMU_UNIT = "iohub-remoted@vm1.service", "iohub-proxyd@vm1.service", "qemu@vm1.service"

_GROUPS = {
    REMOTED: rf"system.slice/system-iohub\x2dremoted.slice/{REMOTED}",
    PROXYD: rf"system.slice/system-iohub\x2dproxyd.slice/{PROXYD}",
    QEMU_UNIT: f"system.slice/system-qemu.slice/{QEMU_UNIT}",
}

_CONFIG = """\
name = "vm1"
vm = "qmp:/run/qemu/vm1/iohub.qmp"
allow-users = ["qemu"]

[[device]]
model = "edu"
id = "edu0"
addr = "05.0"

[[device]]
model = "pci-serial"
id = "com1"
addr = "06.0"
"""


class HostBench:
    """One host with one VM, which start() starts."""

    CONSOLE = "run/qemu/vm1/console"
    """the guest's console, below the root directory"""

    def __init__(self, installed: Path) -> None:
        """``installed`` is a directory with what ``make install PREFIX=/usr`` has put there, or a .deb."""
        self._connection: socket.socket | None = None
        self._console: GuestConsole | None = None
        self._cursor: str | None = None
        """the last line of the journal that is of before renew()"""
        self.system = BootedSystem()
        try:
            self._install(installed)
        except BaseException:
            self.close()
            raise

    @property
    def root(self) -> Path:
        """The host's root directory."""
        return self.system.root

    def renew(self) -> None:
        """Stops the VM, and makes all as it was before its first start; the journal begins anew."""
        self.system.systemctl("stop", QEMU_UNIT, REMOTED, PROXYD)
        self.system.systemctl("reset-failed")
        for unit in (QEMU_UNIT, REMOTED, PROXYD):
            shutil.rmtree(self.root / f"etc/systemd/system/{unit}.d", ignore_errors=True)
        self.system.systemctl("daemon-reload")
        (self.root / "etc/iohub/vm1.toml").write_text(_CONFIG)
        self._cursor = None
        self._cursor = self.journal("-n", "1", "--show-cursor").rpartition("cursor: ")[2].strip()

    def start(self, names: Collection[str] = ("edu0", "com1")) -> None:
        """Starts QEMU's unit, and with it the daemons; returns when the guest is ready and has its functions."""
        self.system.systemctl("start", QEMU_UNIT)
        self.attach(names)

    def attach(self, names: Collection[str] = ("edu0", "com1")) -> None:
        """Waits for the guest of a QEMU that has been started, and for its functions."""
        if self._console is not None:
            self._console.close()
        connection = socket.socket(socket.AF_UNIX)

        def is_connected() -> bool:
            return connection.connect_ex(str(self.root / self.CONSOLE)) == 0

        wait_until(is_connected, "QEMU listens at the console's socket")
        self._connection, self._console = connection, GuestConsole(connection)
        self.resume()
        self._console.wait_ready(PATIENCE)
        wait_until(lambda: self.linked() == set(names), "all functions are plugged and linked")

    def resume(self) -> None:
        """Lets a guest run that is started paused; called when its console has a reader."""

    def require(self, program: str) -> None:
        """Skips the test if the host can't see a program of this machine: what is in /tmp, for instance."""
        if not (self.root / program.lstrip("/")).exists():
            pytest.skip(f"{program} is not on the booted system's filesystem")

    def drop_in(self, unit: str, text: str, name: str = "test.conf") -> None:
        """Overrides settings of a unit."""
        directory = self.root / f"etc/systemd/system/{unit}.d"
        directory.mkdir(exist_ok=True)
        (directory / name).write_text(text)
        self.system.systemctl("daemon-reload")

    def add_device(self, table: str) -> None:
        """Adds a device to the VM's configuration; for the daemons that are started next."""
        with (self.root / "etc/iohub/vm1.toml").open("a") as config:
            config.write(f"\n[[device]]\n{table}")

    def send(self, line: str) -> None:
        """Gives the guest a command whose answer nobody waits for, nor any later one's."""
        assert self._connection is not None
        self._connection.sendall(line.encode() + b"\n")

    def command(self, line: str, timeout: float = 60.0) -> Reply:
        """The guest's answer, which must be ok."""
        assert self._console is not None
        reply = self._console.command(line, timeout=timeout)
        assert reply.ok, f"{line}: {reply.reason}, {reply.records}"
        return reply

    def reboot(self) -> None:
        """Resets the machine, and waits until the guest is ready again."""
        self.command("reboot")
        assert self._console is not None
        self._console.wait_ready(PATIENCE)

    def linked(self) -> set[str]:
        """The ids of the functions that remoted serves a client for, with an irqfd."""
        return {each["id"] for each in self.functions("remoted") if each["has_irqfd"]}

    def attached_to(self) -> set[str]:
        """The ids of the functions that proxyd knows to be plugged and linked to the present remoted."""
        remoted = int(self.system.show(REMOTED, "MainPID"))
        return {each["id"] for each in self.functions("proxyd") if each.get("remote_pid") == remoted}

    def functions(self, daemon: str) -> list[dict[str, Any]]:
        """What a daemon answers of its functions; nothing while it doesn't answer."""
        try:
            reply = call(
                self.root / f"run/iohub/vm1/{daemon}.varlink", f"org.iohub.{daemon.capitalize()}.Status"
            )
        except Exception:  # noqa: BLE001
            return []
        functions: list[dict[str, Any]] = reply["functions"]
        return functions

    def kill(self, unit: str, signum: int = signal.SIGKILL) -> int:
        """Sends a signal to a unit's process as soon as it has one; its pid, as seen from here."""
        pid = self.wait_for_process(unit)
        os.kill(pid, signum)
        return pid

    def wait_for_process(self, unit: str, other_than: int = 0) -> int:
        """The pid of a unit's process, as seen from here, as soon as it has one, or another one than that."""
        found: list[int] = []

        def is_there() -> bool:
            found[:] = [pid for pid in self.system.pids(_GROUPS[unit]) if pid != other_than]
            return len(found) == 1

        wait_until(is_there, f"{unit} has a process")
        return found[0]

    def wait_state(self, unit: str, state: str) -> None:
        """Returns when the unit is in that state, such as ``active``: a daemon has said that it is ready."""
        wait_until(lambda: self.system.show(unit, "ActiveState") == state, f"{unit} is {state}")

    def journal(self, *arguments: str) -> str:
        """What journalctl prints."""
        after = () if self._cursor is None else ("--after-cursor", self._cursor)
        return self.system.run("journalctl", "--no-pager", "-o", "short-monotonic", *after, *arguments).stdout

    def install_package(self, package: Path) -> None:
        """Installs a .deb, or upgrades to it."""
        shutil.copy(package, self.root / "tmp")
        self.system.run("dpkg", "--install", f"/tmp/{package.name}")

    def close(self) -> None:
        """Prints what the units have logged, for a test that fails, and ends everything."""
        with contextlib.suppress(AssertionError, OSError, IndexError):
            print(self.journal("-n", "200", "-u", "iohub-*", "-u", QEMU_UNIT))
        if self._console is not None:
            self._console.close()
        self.system.close()

    def _install(self, installed: Path) -> None:
        if installed.suffix == ".deb":
            self.install_package(installed)
        else:
            for directory in installed.iterdir():  # not itself: the root directory would get its mode
                shutil.copytree(directory, self.root / directory.name, symlinks=True, dirs_exist_ok=True)
            self.system.run("systemd-sysusers", "iohub.conf")
            self.system.run("systemd-tmpfiles", "--create", "iohub.conf")
        units = self.root / "etc/systemd/system"
        shutil.copy(ROOT / "systemd/examples/qemu@.service", units)
        # Tests start it more often than an operator would.
        (units / "qemu@.service.d").mkdir()
        (units / "qemu@.service.d/limit.conf").write_text("[Unit]\nStartLimitIntervalSec=0\n")
        self.system.run("groupadd", "--force", "--system", "kvm")
        self.system.run("chgrp", "kvm", "/dev/kvm")
        self.system.run("useradd", "--system", "--user-group", "--no-create-home", "qemu")
        (self.root / "etc/iohub/vm1.toml").write_text(_CONFIG)
        (self.root / "etc/qemu").mkdir(exist_ok=True)
        for source, name in ((guest_image(), "guest.bin"), (Path(boot(guest_image())[1]), "firmware.bin")):
            copy = self.root / "var/lib" / name
            shutil.copyfile(source, copy)
            copy.chmod(0o644)
        options = (
            "-bios /var/lib/firmware.bin -device loader,file=/var/lib/guest.bin,addr=0x100000,force-raw=on "
            "-chardev socket,id=console,path=/run/qemu/vm1/console,server=on,wait=on -serial chardev:console"
        )
        (self.root / "etc/qemu/vm1.conf").write_text(f"MEMORY=64M\nQEMU_OPTIONS={options}\n")
        self.system.systemctl("daemon-reload")
        self.system.systemctl("enable", REMOTED, PROXYD)
