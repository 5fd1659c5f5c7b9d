# SPDX-License-Identifier: GPL-2.0-or-later
"""proxyd beside a running stock QEMU: what it plugs, adopts, replaces and unplugs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fds import settled_fds
from tests.support.monitorclient import MonitorClient
from tests.support.qmpbench import QmpBench

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")

PLUGGED = {"edu0": "child<x-pci-proxy-dev>", "com1": "child<x-pci-proxy-dev>"}


def test_plugs_devices_whose_interrupts_arrive(bench: QmpBench, monitor: MonitorClient) -> None:
    bench.start_proxyd()
    assert monitor.plugged() == PLUGGED
    bench.run_guest(rounds=100)
    served = {name: (f["connected"], f["remote_pid"]) for name, f in bench.status("proxyd").items()}
    assert served == dict.fromkeys(PLUGGED, (True, bench.remoted.process.pid))


def test_leaves_them_plugged_at_its_end_and_adopts_them_at_its_start(
    bench: QmpBench, monitor: MonitorClient
) -> None:
    bench.start_proxyd()
    bench.run_guest()
    fds = bench.settled_fds()
    assert bench.end_proxyd() == 0
    assert not bench.asked_to_eject(5)
    bench.check_interrupts()
    bench.start_proxyd()
    bench.wait_linked(0)
    bench.check_interrupts()
    bench.proxyd.kill()
    bench.check_interrupts()
    bench.start_proxyd()
    bench.wait_linked(0)
    # No setup: a device that had been plugged anew would have lost its addresses.
    bench.check_interrupts()
    assert monitor.plugged() == PLUGGED
    bench.wait_log("proxyd", "found plugged at 05.0, served by", 2)
    assert bench.settled_fds() == fds


def test_unplugs_at_its_end_when_told_to(bench: QmpBench, monitor: MonitorClient) -> None:
    bench.start_proxyd("--unplug-on-exit")
    bench.run_guest()
    bench.unplug()
    assert monitor.plugged() == {}
    assert bench.addresses().isdisjoint({"05.0", "06.0"})


def test_twenty_rounds_of_plugging_and_unplugging_leave_no_fd_behind(
    bench: QmpBench, monitor: MonitorClient
) -> None:
    bench.plug_and_unplug(monitor, 20)


def test_replaces_twenty_times_what_has_lost_its_remoted(bench: QmpBench, monitor: MonitorClient) -> None:
    bench.start_proxyd(module="tests.support.hastyproxyd")
    bench.run_guest(rounds=4)
    pids = bench.proxyd.process.pid, bench.guest.pid
    fds = [settled_fds(pid) for pid in pids]
    for number in range(1, 21):
        bench.remoted.kill()
        bench.eject(5, 6)
        bench.start_remoted()
        bench.wait_linked(number)
        bench.run_guest(rounds=4)
    assert [settled_fds(pid) for pid in pids] == fds


def test_replaces_an_adopted_function_that_loses_its_remoted(bench: QmpBench, monitor: MonitorClient) -> None:
    bench.start_proxyd()
    fds = settled_fds(bench.proxyd.process.pid)
    bench.proxyd.kill()
    bench.start_proxyd()
    bench.remoted.kill()
    bench.eject(5, 6)
    bench.start_remoted()
    bench.wait_linked(1)
    bench.run_guest()
    assert settled_fds(bench.proxyd.process.pid) == fds


def test_replaces_what_it_finds_plugged_without_a_link(bench: QmpBench, monitor: MonitorClient) -> None:
    bench.start_proxyd()
    bench.proxyd.kill()
    bench.remoted.kill()
    bench.start_remoted()
    bench.start_proxyd()
    bench.wait_log("proxyd", "found plugged without a link", 2)
    bench.eject(5, 6)
    bench.wait_linked(1)
    bench.run_guest()


def test_functions_of_one_slot_come_and_go_together(tmp_path: Path) -> None:
    bench = QmpBench(tmp_path, ("edu", "id=edu0", "addr=05.0"), ("pci-serial", "id=com1", "addr=05.1"))
    try:
        bench.start_remoted()
        monitor = bench.start_guest()
        bench.start_proxyd()
        assert bench.addresses() >= {"05.0", "05.1"}
        bench.run_guest()
        bench.remoted.kill()
        bench.eject(5)
        bench.start_remoted()
        bench.wait_linked(1)
        assert bench.addresses() >= {"05.0", "05.1"}
        bench.run_guest()
        bench.proxyd.kill()
        monitor.execute("device_del", id="com1")
        bench.eject(5)
        assert monitor.plugged() == {}
        bench.start_proxyd()
        bench.run_guest()
    finally:
        bench.close()
