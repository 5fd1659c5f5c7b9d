# SPDX-License-Identifier: GPL-2.0-or-later
"""What a proxyd knows of what the one before it has begun."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.support.monitorclient import MonitorClient
from tests.support.qmpbench import QmpBench
from tests.support.wait import wait_until

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")


def end_while_the_guest_is_silent(bench: QmpBench) -> None:
    """proxyd asks QEMU to unplug everything, and ends before the guest consents."""
    bench.proxyd.process.send_signal(signal.SIGTERM)
    wait_until(lambda: bench.asked_to_eject(5) and bench.asked_to_eject(6), "QEMU asks the guest to eject")
    bench.proxyd.kill()


def eject(bench: QmpBench, _monitor: MonitorClient) -> None:
    bench.eject(5, 6)


def reset(bench: QmpBench, monitor: MonitorClient) -> None:
    monitor.execute("system_reset")
    bench.guest.console.wait_ready(60.0)


def notes(monitor: MonitorClient) -> list[str]:
    """What proxyd has left in QEMU."""
    names = [str(entry["name"]) for entry in monitor.execute("qom-list", path="/objects")]
    return sorted(name for name in names if name.startswith("iohub"))


@pytest.mark.parametrize("let_go", [eject, reset])
def test_what_the_one_before_has_asked_to_eject_is_plugged_again(
    bench: QmpBench, monitor: MonitorClient, let_go: Callable[[QmpBench, MonitorClient], None]
) -> None:
    bench.start_proxyd("--unplug-on-exit")
    bench.run_guest()
    end_while_the_guest_is_silent(bench)
    assert notes(monitor) == ["iohub-unplug-com1", "iohub-unplug-edu0"]
    bench.start_proxyd()
    bench.check_interrupts()
    (amiss,) = bench.status("proxyd")["edu0"]["amiss"]
    assert amiss == "the guest was asked to eject it and has not done so yet; it is plugged again after that"
    let_go(bench, monitor)
    bench.wait_log("proxyd", "edu0: plugged at 05.0", 2)
    bench.wait_log("proxyd", "com1: plugged at 06.0", 2)
    bench.wait_linked(0)
    bench.run_guest()
    assert notes(monitor) == []
    assert bench.status("proxyd")["edu0"]["amiss"] == []
    assert "not by this daemon" not in bench.log("proxyd")


def test_what_was_ejected_meanwhile_is_plugged_and_leaves_no_note(
    bench: QmpBench, monitor: MonitorClient
) -> None:
    bench.start_proxyd("--unplug-on-exit")
    bench.run_guest()
    end_while_the_guest_is_silent(bench)
    bench.eject(5, 6)
    bench.start_proxyd()
    bench.run_guest()
    assert notes(monitor) == []


def test_what_somebody_else_unplugs_after_that_stays_out(bench: QmpBench, monitor: MonitorClient) -> None:
    """The note is that of one request, and goes with it."""
    bench.start_proxyd("--unplug-on-exit")
    end_while_the_guest_is_silent(bench)
    bench.start_proxyd()
    bench.eject(5, 6)
    bench.wait_log("proxyd", "edu0: plugged at 05.0", 2)
    bench.wait_log("proxyd", "com1: plugged at 06.0", 2)
    bench.wait_linked(0)
    bench.run_guest()
    monitor.execute("device_del", id="edu0")
    bench.eject(5)
    bench.wait_log("proxyd", "edu0: warning: unplugged, not by this daemon")
    assert set(monitor.plugged()) == {"com1"}


def test_remoted_is_not_bothered_by_a_restart(bench: QmpBench, monitor: MonitorClient) -> None:
    """A connection to a device that has a client would be one more, to be refused and told."""
    bench.start_proxyd()
    bench.proxyd.kill()
    bench.start_proxyd()
    bench.wait_linked(0)
    assert {function["refused"] for function in bench.status("remoted").values()} == {0}
    assert "refused" not in bench.log("remoted")
    assert "warning" not in bench.log("proxyd")
