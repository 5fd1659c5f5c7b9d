# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens to QEMU and its guest while proxyd is beside them."""

from __future__ import annotations

import socket

import pytest

from common.control import call
from tests.support.qmpbench import QmpBench
from tests.support.wait import wait_until

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")


@pytest.fixture
def bench(bench: QmpBench) -> QmpBench:
    bench.start_remoted()
    return bench


def qemu_of(bench: QmpBench) -> tuple[str | None, str | None]:
    """Which QEMU proxyd is attached to, or why to none."""
    status = call(bench.directory / "proxyd.varlink", "org.iohub.Proxyd.Status")
    return status.get("attached"), status.get("reason")


def test_waits_for_qemu_and_for_the_next_one(bench: QmpBench) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(bench.monitor_path))
    bench.start_proxyd()
    bench.wait_log("proxyd", "Connection refused")
    waiting = f"nobody listens at {bench.monitor_path}: Connection refused: waiting for QEMU"
    assert qemu_of(bench) == (None, waiting)
    assert {f["reason"] for f in bench.status("proxyd").values()} == {"not known: no QEMU is attached"}
    bench.monitor_path.unlink()
    monitor = bench.start_guest()
    bench.wait_log("proxyd", "plugged at 06.0")
    assert qemu_of(bench) == (f"qemu-system-x86[{bench.guest.pid}]", None)
    bench.run_guest()
    monitor.execute("quit")
    bench.wait_log("proxyd", "the machine was shut down (host-qmp-quit)")
    bench.wait_log("proxyd", "detached from qemu-system")
    bench.start_guest()
    bench.wait_log("proxyd", "plugged at 06.0", 2)
    bench.run_guest()
    bench.guest.close()
    bench.wait_log("proxyd", "detached from qemu-system", 2)
    assert {f["connected"] for f in bench.status("proxyd").values()} == {False}
    attached, reason = qemu_of(bench)
    assert attached is None
    assert reason
    wait_until(
        lambda: {f["link"] for f in bench.status("remoted").values()} == {"waiting"},
        "remoted sees that QEMU has gone",
    )


def test_a_guest_that_was_stopped_and_continued_works_on(bench: QmpBench) -> None:
    monitor = bench.start_guest()
    bench.start_proxyd()
    bench.command("setup")
    monitor.execute("stop")
    bench.wait_log("proxyd", "the guest was paused")
    monitor.execute("cont")
    bench.wait_log("proxyd", "the guest was resumed")
    bench.check_interrupts()


def test_resets_while_lines_are_high(bench: QmpBench) -> None:
    monitor = bench.start_guest()
    bench.start_proxyd()
    for number in range(1, 3):
        bench.run_guest()
        bench.command("hold 05.0")
        bench.command("hold 06.0")
        assert {f["asserted"] for f in bench.status("remoted").values()} == {True}
        if number % 2:
            bench.command("reboot")
        else:
            monitor.execute("system_reset")
        bench.guest.console.wait_ready(60.0)
        assert {f["asserted"] for f in bench.status("remoted").values()} == {False}
    bench.run_guest()
    bench.wait_log("proxyd", "the machine was reset (guest-reset)")
    bench.wait_log("proxyd", "the machine was reset (host-qmp-system-reset)")


def test_a_reset_lets_go_of_what_has_lost_its_remoted(bench: QmpBench) -> None:
    monitor = bench.start_guest()
    bench.start_proxyd()
    bench.remoted.kill()
    wait_until(lambda: bench.asked_to_eject(5) and bench.asked_to_eject(6), "QEMU asks the guest to eject")
    for function in bench.status("proxyd").values():
        assert "has ended: QEMU's proxy can't take a new one" in function["reason"]
    monitor.execute("system_reset")
    bench.guest.console.wait_ready(60.0)
    bench.start_remoted()
    bench.wait_linked(1)
    bench.run_guest()


def test_what_somebody_else_unplugs_stays_out(bench: QmpBench) -> None:
    monitor = bench.start_guest()
    bench.start_proxyd()
    bench.command("setup")
    monitor.execute("device_del", id="edu0")
    bench.eject(5)
    bench.wait_log("proxyd", "edu0: warning: unplugged, not by this daemon")
    wait_until(
        lambda: bench.status("remoted")["edu0"]["link"] == "waiting", "remoted may have another client"
    )
    assert set(monitor.plugged()) == {"com1"}
    assert bench.status("proxyd")["edu0"]["reason"].startswith("unplugged, not by this daemon")
    assert bench.end_proxyd() == 0
    bench.start_proxyd()
    bench.run_guest()
