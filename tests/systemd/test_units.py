# SPDX-License-Identifier: GPL-2.0-or-later
"""The units beside qemu@vm1.service at work: reload, watchdog, status, journal, and what outlives a process."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.hammer import Interrupts, tsc_hertz
from tests.support.hostbench import PROXYD, QEMU_UNIT, REMOTED, HostBench
from tests.support.wait import wait_until

DAEMONS = (REMOTED, PROXYD)
STALL_SECONDS = float(os.environ.get("IOHUB_STALL_SECONDS", "2"))
"""for how long journald stands still"""
LATEST = 0.05
"""seconds from the access that raises a line to its handler"""

STUCK = """\
from remoted.device import Bar, BarKind, PciFunction


class Stuck(PciFunction):
    VENDOR_ID, DEVICE_ID = 0x1234, 0x57C4
    BARS = {0: Bar(BarKind.MEM32, 4096)}

    def bar_write(self, bar, offset, size, value):
        while value:
            pass
"""

NOISY = """\
from remoted.device import Bar, BarKind, PciFunction


class Noisy(PciFunction):
    VENDOR_ID, DEVICE_ID = 0x1234, 0x4015
    BARS = {0: Bar(BarKind.MEM32, 4096)}

    def reset(self):
        self.call_every(0.002, self.complain)

    def restored(self):
        self.call_every(0.002, self.complain)

    def complain(self):
        for number in range(20):
            self.host.log.warning("trouble %d", number)
"""


def run_and_check(host: HostBench) -> None:
    """The guest is served: a run, and all of it."""
    host.command("setup")
    host.command("run 20")
    for record in host.command("stats").of_kind("function"):
        assert [record.number(key) for key in ("raised", "served", "lost", "redone")] == [20, 20, 0, 0]


def test_a_reload_adds_a_device_and_the_others_notice_nothing(host: HostBench) -> None:
    run_and_check(host)
    pids = [host.wait_for_process(unit) for unit in DAEMONS]
    host.add_device('model = "edu"\nid = "edu1"\naddr = "07.0"\n')
    with ThreadPoolExecutor(1) as pool:
        guest = pool.submit(host.command, "run 50")
        for unit in DAEMONS:
            host.system.systemctl("reload", unit)
        wait_until(lambda: host.linked() == {"edu0", "com1", "edu1"}, "the new one is plugged and linked")
        guest.result()
    for record in host.command("stats").of_kind("function"):
        assert [record.number(key) for key in ("raised", "served", "lost", "redone")] == [70, 70, 0, 0]
    assert host.command("setup").result.number("functions") == 3
    host.command("run 20")
    assert [host.wait_for_process(unit) for unit in DAEMONS] == pids


def test_an_adopted_function_stays_plugged_when_remoted_is_killed(host: HostBench) -> None:
    """The proxyd that found it plugged has no copy of its link, and sees the process end that serves it."""
    run_and_check(host)
    pid = host.kill(REMOTED)
    host.wait_for_process(REMOTED, pid)
    wait_until(lambda: host.attached_to() == {"edu0", "com1"}, "status has the next remoted")
    for victims in ((PROXYD,), (REMOTED,), (REMOTED,), (PROXYD, REMOTED)):
        pids = {unit: host.kill(unit) for unit in victims}
        for unit, pid in pids.items():
            host.wait_for_process(unit, pid)
            host.wait_state(unit, "active")
        wait_until(lambda: host.attached_to() == {"edu0", "com1"}, "proxyd has found both functions")
        run_and_check(host)
    journal = host.journal("-u", PROXYD)
    assert len(re.findall(r": pid \d+ goes on with its link", journal)) == 4
    assert "link to" not in journal
    assert journal.count(" plugged at ") == 2 + 4, "found plugged twice, plugged once"


@pytest.mark.parametrize("unit", DAEMONS)
def test_a_stopped_process_is_ended_by_the_watchdog(stopped_host: HostBench, unit: str) -> None:
    host = stopped_host
    host.drop_in(unit, "[Service]\nWatchdogSec=1s\n")
    host.start()
    pid = host.kill(unit, signal.SIGSTOP)
    host.wait_for_process(unit, pid)
    host.wait_state(unit, "active")
    assert "Result: watchdog" in host.journal("-u", unit) or "result 'watchdog'" in host.journal("-u", unit)
    run_and_check(host)


def test_a_device_that_hangs_is_ended_and_the_guest_goes_on(stopped_host: HostBench) -> None:
    """The write that hung is done again by each successor, until its client gives up."""
    host = stopped_host
    (host.root / "etc/iohub/stuck.py").write_text(STUCK)
    host.drop_in(REMOTED, "[Service]\nWatchdogSec=1s\nWorkingDirectory=/etc/iohub\n")
    host.add_device('model = "./stuck.py:Stuck"\nid = "stuck0"\naddr = "07.0"\n')
    host.start({"edu0", "com1", "stuck0"})
    records = host.command("setup").of_kind("device")
    host.send(f"write 32 {records[0].text('memory0')} 1")
    wait_until(lambda: "Fatal Python error: Aborted" in host.journal("-u", REMOTED), "its stack is logged")
    wait_until(
        lambda: 'stuck.py", line 9 in bar_write' in host.journal("-u", REMOTED), "the stack has its line"
    )
    assert host.system.show(QEMU_UNIT, "ActiveState") == "active"


def test_status_tells_what_happens_now(stopped_host: HostBench) -> None:
    host = stopped_host
    for unit in DAEMONS:
        host.drop_in(unit, "[Service]\nWatchdogSec=1s\n")
    host.start()
    host.command("setup")
    host.command("run 200")
    wait_until(
        lambda: "2 functions, 2 of them linked" in host.system.show(REMOTED, "StatusText"), "all are told"
    )
    wait_until(lambda: host.system.show(REMOTED, "StatusText").endswith(" 0 interrupts/s"), "it is idle")
    host.send("run 1000")
    wait_until(lambda: not host.system.show(REMOTED, "StatusText").endswith(" 0 interrupts/s"), "it is busy")
    told = "Attached to QEMU: 2 functions, 2 of them linked, 2 plugged"
    assert host.system.show(PROXYD, "StatusText") == told


def test_a_users_group_does_not_matter_to_the_devices_sockets(host: HostBench) -> None:
    """QEMU connects to those of vfio-user devices, with libvirt as another group's process."""
    script = "import socket; socket.socket(socket.AF_UNIX).connect('/run/iohub/vm1/edu0.sock')"

    def connects(user: str) -> bool:
        run_as = ("setpriv", f"--reuid={user}", "--regid=nogroup", "--clear-groups")
        return not host.system.run(*run_as, "/usr/bin/python3", "-c", script, check=False).returncode

    assert connects("qemu")
    assert not connects("nobody")


def test_root_may_ask_without_naming_the_units_user(host: HostBench) -> None:
    assert "com1: pci-serial" in host.system.run("iohubctl", "status", "vm1").stdout
    assert host.system.run("iohubctl", "list").stdout.split()[-5:][2:] == ["2", "0", "vm1"]


def latencies(host: HostBench, seconds: float) -> list[float]:
    """Seconds from each access that raises a line to the handler, of so long a time, in ascending order."""
    interrupts, end = Interrupts(host), time.monotonic() + seconds
    while time.monotonic() < end:
        interrupts()
    hertz = tsc_hertz()
    return sorted(cycles / hertz for cycles in interrupts.samples)


def test_journald_that_stands_still_holds_up_no_interrupt(stopped_host: HostBench) -> None:
    """While a device has ten thousand lines a second to log. What isn't taken is counted, and told of.

    For how long the processes have waited for a CPU of a machine that is busy is not counted. The same load while
    journald runs is measured for comparison.
    """
    host = stopped_host
    (host.root / "etc/iohub/noisy.py").write_text(NOISY)
    host.drop_in(REMOTED, "[Service]\nWorkingDirectory=/etc/iohub\n")
    host.add_device('model = "./noisy.py:Noisy"\nid = "noisy0"\naddr = "07.0"\n')
    host.start({"edu0", "com1", "noisy0"})
    host.command("setup")
    journald = host.system.main_pid("systemd-journald.service")
    before = latencies(host, STALL_SECONDS / 2)
    os.kill(journald, signal.SIGSTOP)
    try:
        delay = cpu_delay(host)
        during = latencies(host, STALL_SECONDS)
        delay = cpu_delay(host) - delay
        wait_until(lambda: lost_lines(host) > 0, "lines are lost, and the status says so")
        lost = lost_lines(host)
    finally:
        os.kill(journald, signal.SIGCONT)
    print(
        f"\nraise to handler: max {before[-1] * 1e3:.1f} ms while journald runs ({len(before)} interrupts), "
    )
    print(f"{during[-1] * 1e3:.1f} ms while it stands still ({len(during)}), {lost} lines lost")
    print(f"{delay:.2f} s of waiting for a CPU in that time")
    assert during[-1] < LATEST + delay
    wait_until(lambda: "journald did not take them: " in host.journal("-u", REMOTED), "the loss is told of")
    for record in host.command("stats").of_kind("function"):
        assert record.number("lost") == record.number("redone") == 0


def cpu_delay(host: HostBench) -> float:
    """For how many seconds remoted and QEMU have been ready to run, and waited for a CPU (schedstat)."""
    nanoseconds = 0
    for unit in (REMOTED, QEMU_UNIT):
        for path in Path(f"/proc/{host.wait_for_process(unit)}/task").glob("*/schedstat"):
            nanoseconds += int(path.read_text().split()[1])
    return nanoseconds / 1e9


def lost_lines(host: HostBench) -> int:
    """What iohubctl status tells of remoted's log."""
    status = host.system.run("iohubctl", "status", "--json", "vm1", check=False).stdout
    found = re.search(r"(\d+) lines of the log could not be written", status)
    return int(found[1]) if found else 0


def test_state_of_another_class_starts_from_reset(host: HostBench) -> None:
    """With one line in the journal, and a new plug of the function."""
    path = host.root / "etc/iohub/vm1.toml"
    path.write_text(path.read_text().replace('model = "edu"', 'model = "irq-line"'))
    host.kill(REMOTED)
    wait_until(lambda: "starts from reset" in host.journal("-u", REMOTED), "the state is refused")
    lines = [line for line in host.journal("-u", REMOTED).splitlines() if "starts from reset" in line]
    assert len(lines) == 1
    assert "edu0: it starts from reset: the state is that of another class" in lines[0]


@pytest.mark.parametrize("unit", DAEMONS)
def test_the_manager_finds_nothing_to_warn_of(stopped_host: HostBench, unit: str) -> None:
    done = stopped_host.system.run("systemd-analyze", "verify", "--man=no", unit)
    assert done.stdout + done.stderr == ""
