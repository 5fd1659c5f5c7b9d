# SPDX-License-Identifier: GPL-2.0-or-later
"""``--vm pid:PID`` under its unit: a line stays as it is, whatever becomes of proxyd."""

from __future__ import annotations

import os
import re
import select
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from common.control import call
from tests.support.checkout import ROOT
from tests.support.countguest import requested
from tests.support.hostbench import PROXYD, QEMU_UNIT, REMOTED, HostBench
from tests.support.monitorclient import Monitor
from tests.support.qemu import GUESTS, PATIENCE
from tests.support.wait import wait_until

KILLS = 20
GSI = 10
SPURIOUS = 15
"""what the 8259 answers when a line falls before it is taken"""

_CONFIG = """\
name = "vm1"
vm = "pid:{pid}"

[[device]]
model = "irq-line"
id = "line0"
addr = "05.0"
gsi = {gsi}
"""


class PidHost(HostBench):
    """A host whose guest tells of each interrupt that it serves; proxyd is beside its QEMU with pid:."""

    def __init__(self, installed: Path) -> None:
        super().__init__(installed)
        with ExitStack() as owned:
            owned.callback(super().close)
            self.config = self.root / "etc/iohub/vm1.toml"
            self.config.unlink()  # the units don't start without it
            shutil.copyfile(GUESTS / "irqcount.bin", self.root / "var/lib/guest.bin")
            options = self.root / "etc/qemu/vm1.conf"
            options.write_text(
                options.read_text().replace("-serial chardev:", "-device isa-debugcon,iobase=0xe9,chardev=")
            )
            pid_conf = (ROOT / "systemd/examples/proxyd-pid.conf").read_text()
            self.drop_in(PROXYD, pid_conf, "pid.conf")
            self.letters = owned.enter_context(socket.socket(socket.AF_UNIX))
            self.monitor = self._start_guest(owned)
            self.qemu = self.wait_for_process(QEMU_UNIT)
            self.write_config(GSI)
            self.system.systemctl("start", REMOTED, PROXYD)
            self._owned = owned.pop_all()

    def write_config(self, gsi: int) -> None:
        """The configuration for the process of QEMU's unit."""
        self.config.write_text(_CONFIG.format(pid=self.system.show(QEMU_UNIT, "MainPID"), gsi=gsi))

    def drive(self, method: str) -> None:
        """Raises or lowers the line."""
        call(self.root / "run/iohub/vm1/remoted.varlink", f"org.iohub.Remoted.{method}", device="line0")

    def is_high(self, gsi: int = GSI) -> bool:
        """Whether the line is high in the guest's interrupt controller."""
        return bool(requested(self.monitor) >> gsi & 1)

    def served(self) -> int:
        """The IRQ of the next interrupt that the guest serves."""
        return self.letters.recv(1)[0] - ord("a")

    def is_low(self) -> bool:
        """Whether the line is low, with the interrupts until then forgotten."""
        while select.select([self.letters], [], [], 0)[0]:  # QEMU stands still while nobody reads
            assert self.served() in (GSI, SPURIOUS)
        return not self.is_high()

    def qemu_fds(self) -> Counter[str]:
        """What QEMU has open, but for the numbers of inodes."""
        directory = Path(f"/proc/{self.qemu}/fd")
        return Counter(re.sub(r"\d+", "N", os.readlink(entry)) for entry in directory.iterdir())

    def replace(self, unit: str, verb: str = "kill") -> None:
        """Ends the unit's process, and returns when the next one is ready."""
        pid = self.wait_for_process(unit)
        if verb == "kill":
            self.kill(unit)
        else:
            self.system.systemctl(verb, unit)
        self.wait_for_process(unit, pid)
        self.wait_state(unit, "active")

    def log_lines(self, text: str) -> int:
        """How many lines of proxyd have the text."""
        return self.journal("-u", PROXYD).count(text)

    def close(self) -> None:
        self._owned.close()

    def _start_guest(self, owned: ExitStack) -> Monitor:
        self.system.systemctl("start", QEMU_UNIT)
        wait_until(
            lambda: not self.letters.connect_ex(str(self.root / self.CONSOLE)), "QEMU waits for the console"
        )
        self.letters.settimeout(PATIENCE)
        assert self.letters.recv(1) == b"R"
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.root / "run/qemu/vm1/iohub.qmp"))
        return owned.enter_context(Monitor(sock))


@pytest.fixture
def pid_host(
    installed: Path, requires_systemd: None, requires_kvm: None, requires_qemu: None
) -> Iterator[PidHost]:
    with closing(PidHost(installed)) as host:
        wait_until(lambda: host.linked() == {"line0"}, "the line is attached")
        yield host


def test_a_line_outlives_proxyd(pid_host: PidHost) -> None:
    """A high line stays high, the process isn't stopped again, and keeps no fd of it."""
    host = pid_host
    fds = host.qemu_fds()
    host.monitor.execute("stop")
    host.drive("Raise")
    wait_until(host.is_high, "the line is high")
    for number in range(KILLS):
        pid = host.kill(PROXYD)
        assert host.is_high()
        host.wait_for_process(PROXYD, pid)
        if number % 2:  # every other one gets as far as to serve
            host.wait_state(PROXYD, "active")
        assert host.is_high()
    host.wait_state(PROXYD, "active")
    host.replace(PROXYD, "restart")
    assert host.is_high()
    host.monitor.execute("cont")
    assert host.served() == GSI
    host.drive("Lower")
    wait_until(host.is_low, "the line is low")
    assert host.log_lines("attached to GSI") == 1
    assert host.log_lines("detached") == 0
    assert host.log_lines("goes on with GSI 10") >= KILLS // 2
    assert host.qemu_fds() == fds
    (function,) = host.functions("proxyd")
    assert (function["connected"], function["gsi"], function["reconnects"]) == (True, GSI, 0)


def test_every_assertion_is_served_while_proxyd_is_killed(pid_host: PidHost) -> None:
    host = pid_host
    fds = host.qemu_fds()
    pid = 0
    for number in range(KILLS):
        pid = host.wait_for_process(PROXYD, pid)
        if number % 5 == 4:
            host.replace(REMOTED)
            wait_until(lambda: host.linked() == {"line0"}, "the line is attached")
        host.drive("Raise")
        host.kill(PROXYD)
        assert host.served() == GSI
        host.drive("Lower")
        wait_until(host.is_low, "the line is low")
    host.wait_state(PROXYD, "active")
    assert host.log_lines("attached to GSI") == 1
    assert host.qemu_fds() == fds


def test_what_is_of_another_gsi_or_process_is_dropped(pid_host: PidHost) -> None:
    host = pid_host
    host.monitor.execute("stop")
    host.drive("Raise")
    wait_until(host.is_high, "the line is high")
    host.write_config(11)
    host.replace(PROXYD)
    wait_until(lambda: host.is_high(11), "the line is high at the other GSI")
    wait_until(lambda: not host.is_high(), "the line is out of the GSI before")
    assert host.log_lines("goes on") == 0
    config = host.config.read_text()
    host.config.write_text(config.replace("pid:", "pid:1"))
    host.kill(PROXYD)
    host.wait_state(PROXYD, "failed")
    wait_until(lambda: not host.is_high(11), "nothing of it is left in the VM")
    wait_until(lambda: host.linked() == set(), "its link has ended")
    host.config.write_text(config)
    host.system.systemctl("start", PROXYD)
    wait_until(lambda: host.is_high(11), "the line is high again")


def test_a_line_whose_link_has_ended_meanwhile_is_taken_out(pid_host: PidHost) -> None:
    host = pid_host
    host.drop_in(PROXYD, "[Service]\nRestartSec=2s\n")
    host.monitor.execute("stop")
    host.drive("Raise")
    wait_until(host.is_high, "the line is high")
    pid = host.kill(PROXYD)
    host.system.systemctl("stop", REMOTED)
    assert host.is_high()
    host.wait_for_process(PROXYD, pid)
    wait_until(lambda: not host.is_high(), "the line is low")
    host.system.systemctl("start", REMOTED)
    wait_until(lambda: host.linked() == {"line0"}, "the line is attached")
    host.drive("Raise")
    wait_until(host.is_high, "the line is high")
