# SPDX-License-Identifier: GPL-2.0-or-later
"""What proxyd does when QEMU or its guest keeps it waiting, with VMs that let it wait at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

import pytest

from tests.support.monitorclient import Monitor, MonitorClient
from tests.support.qmpbench import QmpBench

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")

T = TypeVar("T")


class Vm(NamedTuple):
    bench: QmpBench
    monitor: Monitor
    """the test's own of the same QEMU"""


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of calls that wait, in their order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.fixture(scope="module")
def vms(
    requires_kvm: None, requires_qemu: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Vm]]:
    """Starts a VM, by the name of its directory, without proxyd."""
    with ExitStack() as stack:

        def start(name: str) -> Vm:
            bench = QmpBench(tmp_path_factory.mktemp(name))
            stack.callback(bench.close)
            bench.start_remoted()
            return Vm(bench, bench.start_guest())

        yield start


class Unplugged(NamedTuple):
    """A running VM and a stopped one, whose proxyd has ended and wasn't let unplug anything."""

    running: Vm
    stopped: Vm
    statuses: list[int]


@pytest.fixture(scope="module")
def unplugged(vms: Callable[[str], Vm]) -> Unplugged:
    running, stopped = vms("running"), vms("stopped")
    stopped.monitor.execute("stop")
    for vm in (running, stopped):
        vm.bench.start_proxyd("--unplug-on-exit")
    running.bench.run_guest()
    return Unplugged(running, stopped, at_once([running.bench.end_proxyd, stopped.bench.end_proxyd]))


def test_says_that_the_guest_does_not_consent(unplugged: Unplugged) -> None:
    bench, monitor = unplugged.running
    assert unplugged.statuses[0] == 0
    line = "the guest has not ejected it within 5 s: it stays plugged until the guest ejects it or is reset"
    bench.wait_log("proxyd", line, 2)
    assert set(monitor.plugged()) == {"edu0", "com1"}
    bench.check_interrupts()
    monitor.execute("system_reset")
    monitor.wait_event("DEVICE_DELETED", device="edu0")


def test_says_that_a_stopped_guest_can_not_consent(unplugged: Unplugged) -> None:
    bench, monitor = unplugged.stopped
    assert unplugged.statuses[1] == 0
    line = "the guest is paused and can't eject it within 5 s: it stays plugged"
    bench.wait_log("proxyd", line, 2)
    assert set(monitor.plugged()) == {"edu0", "com1"}


@pytest.fixture(scope="module")
def busy(vms: Callable[[str], Vm]) -> Iterator[list[Vm]]:
    """Two VMs with proxyds whose monitors somebody else has; ``monitor`` is his."""
    benches = [vms(name).bench for name in ("busy", "busy")]
    with ExitStack() as others:
        found = [Vm(bench, others.enter_context(MonitorClient(bench.monitor_path))) for bench in benches]
        # A daemon ends with the thread that has started it.
        pool = others.enter_context(ThreadPoolExecutor(len(benches)))
        for start in [pool.submit(bench.start_proxyd) for bench in benches]:
            start.result()
        yield found


def test_a_busy_monitor_is_told_and_waited_for(busy: list[Vm]) -> None:
    bench, other = busy[0]
    line = f"at {bench.monitor_path} doesn't answer: it is busy, or its monitor has another client"
    bench.wait_log("proxyd", line)
    other.close()
    bench.wait_linked(0)
    bench.run_guest()
    assert bench.end_proxyd() == 0


def test_sigterm_ends_it_while_the_monitor_is_busy(busy: list[Vm]) -> None:
    bench, _ = busy[1]
    line = f"at {bench.monitor_path} doesn't answer: it is busy, or its monitor has another client"
    bench.wait_log("proxyd", line)
    assert bench.end_proxyd() == 0
