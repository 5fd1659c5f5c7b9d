# SPDX-License-Identifier: GPL-2.0-or-later
"""The units beside qemu@vm1.service at work: reload, watchdog, status, journal, and what outlives a process."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.hostbench import PROXYD, QEMU_UNIT, REMOTED, HostBench
from tests.support.wait import wait_until

DAEMONS = (REMOTED, PROXYD)

STUCK = """\
from remoted.device import Bar, BarKind, PciFunction


class Stuck(PciFunction):
    VENDOR_ID, DEVICE_ID = 0x1234, 0x57C4
    BARS = {0: Bar(BarKind.MEM32, 4096)}

    def bar_write(self, bar, offset, size, value):
        while value:
            pass
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


def test_journald_that_stands_still_holds_up_nothing(host: HostBench) -> None:
    """Interrupts and accesses don't wait for it, nor does a daemon that has something to log."""
    journald = host.system.main_pid("systemd-journald.service")
    os.kill(journald, signal.SIGSTOP)
    try:
        run_and_check(host)
    finally:
        os.kill(journald, signal.SIGCONT)


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
