# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted behind stock QEMUs that are killed, quit, reset and stopped."""

from __future__ import annotations

import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.serial_reg import (
    UART_IER,
    UART_IER_RDI,
    UART_RX,
)
from tests.support.monitorclient import CommandRefused, MonitorClient
from tests.support.qemu import PATIENCE
from tests.support.stockproxy import HAMMER_ADDR, Remoted, StockGuest, start_hammer
from tests.support.wait import wait_until

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")

SERIAL, EDU = "05.0", "06.0"


@pytest.fixture
def remoted(requires_kvm: None, requires_qemu: None, tmp_path: Path) -> Iterator[Remoted]:
    remoted = Remoted(tmp_path, {SERIAL: "pci-serial", EDU: "edu"})
    yield remoted
    remoted.child.kill()


def raised(remoted: Remoted) -> int:
    count = remoted.status(HAMMER_ADDR)["raised"]
    assert isinstance(count, int)
    return count


def wait_for_traffic(remoted: Remoted) -> None:
    before = raised(remoted)
    wait_until(lambda: raised(remoted) > before + 10, "the firmware raises its line")


def check_interrupts(guest: StockGuest) -> None:
    """Each function's interrupts are served, and no others; those that are held come again."""
    guest.ok("setup")
    guest.ok("run 20 held 4")
    for function in guest.functions().values():
        counts = [function.number(key) for key in ("raised", "served", "lost", "reasserts")]
        assert counts == [20, 20, 0, 5]
    for irq in guest.ok("stats").of_kind("irq"):
        assert (irq.number("spurious"), irq.number("orphaned"), irq.number("stuck")) == (0, 0, 0)


def test_200_kills(remoted: Remoted, tmp_path: Path) -> None:
    """From the start of the process until well into its traffic, which is what half of them hit."""
    rng = random.Random(11)
    fds = remoted.count_idle_fds(HAMMER_ADDR)
    begin = time.monotonic()
    with start_hammer(remoted):
        wait_for_traffic(remoted)
        startup = time.monotonic() - begin
    interrupted = 0
    for _ in range(200):
        before = raised(remoted)
        with start_hammer(remoted) as qemu, pytest.raises(subprocess.TimeoutExpired):
            qemu.process.wait(rng.uniform(0, 2 * startup))
        wait_until(lambda: remoted.count_idle_fds(HAMMER_ADDR) == fds, "all of the link's fds are closed")
        interrupted += raised(remoted) > before
    assert 0 < interrupted < 200
    assert "warning" not in remoted.log
    with StockGuest(tmp_path, remoted) as guest:
        check_interrupts(guest)


def test_quit_during_traffic(remoted: Remoted, tmp_path: Path) -> None:
    fds = remoted.count_idle_fds(HAMMER_ADDR)
    for _ in range(5):
        path = tmp_path / "qmp"
        with start_hammer(remoted, "-qmp", f"unix:{path},server=on,wait=off") as qemu:
            with MonitorClient(path) as monitor:
                wait_for_traffic(remoted)
                monitor.execute("quit")
            assert qemu.process.wait(PATIENCE) == 0
        wait_until(lambda: remoted.count_idle_fds(HAMMER_ADDR) == fds, "all of the link's fds are closed")
    assert "warning" not in remoted.log


@pytest.mark.parametrize(("seabios", "times"), [(False, 10), (True, 3)], ids=["firmware", "SeaBIOS"])
def test_reset_with_lines_high(remoted: Remoted, tmp_path: Path, seabios: bool, times: int) -> None:
    """With either line high, or both; SeaBIOS programs the PIIX3 and the PICs before the guest does."""
    fds = [remoted.count_idle_fds(addr) for addr in (SERIAL, EDU)]
    with StockGuest(tmp_path, remoted, seabios) as guest:
        guest.ok("setup")
        for number in range(times):
            held = [SERIAL, EDU] if number % 3 == 2 else [(SERIAL, EDU)[number % 3]]
            for addr in held:
                assert guest.ok(f"hold {addr}").result.number("status") == 1
                assert remoted.status(addr)["asserted"]
            guest.monitor.execute("system_reset")
            guest.console.wait_ready(PATIENCE)
            assert not any(remoted.status(addr)["level"] for addr in (SERIAL, EDU))
            check_interrupts(guest)
    wait_until(
        lambda: [remoted.count_idle_fds(addr) for addr in (SERIAL, EDU)] == fds,
        "all of the links' fds are closed",
    )


def test_stop_and_cont_with_a_line_high(remoted: Remoted, tmp_path: Path) -> None:
    """The interrupt comes once, however often the machine is stopped meanwhile."""
    with StockGuest(tmp_path, remoted) as guest:
        for addr in (SERIAL, EDU):
            guest.ok("setup")
            guest.ok(f"hold {addr}")
            for _ in range(3):
                guest.monitor.execute("stop")
                guest.monitor.execute("cont")
            (step,) = guest.ok(f"release {addr}").of_kind("step")
            assert [step.number(key) for key in ("entries", "elsewhere", "served")] == [1, 0, 1]
            check_interrupts(guest)
        # A line that is high while the machine is saved is nothing to look after: it can't be saved.
        with pytest.raises(CommandRefused, match="does not support migration"):
            guest.monitor.execute("migrate", uri="exec:cat >/dev/null")


def test_a_line_that_rises_while_the_machine_is_stopped(
    requires_kvm: None, requires_qemu: None, tmp_path: Path
) -> None:
    """A character arrives; the interrupt for it comes when the machine goes on, and once."""
    line = tmp_path / "line"
    remoted = Remoted(tmp_path, {SERIAL: f"pci-serial,chardev=unix:{line}"})
    try:
        with StockGuest(tmp_path, remoted) as guest, socket.socket(socket.AF_UNIX) as far_end:
            far_end.connect(str(line))
            guest.ok("setup")
            base = guest.value(f"config read 32 {SERIAL} 0x10") & ~3
            for count in range(1, 4):
                guest.ok(f"out 8 {base + UART_IER} {UART_IER_RDI}")
                guest.monitor.execute("stop")
                far_end.sendall(b"x")
                wait_until(lambda: remoted.status(SERIAL)["asserted"], "the line rises")
                guest.monitor.execute("cont")
                wait_until(lambda: not remoted.status(SERIAL)["asserted"], "the guest serves it")
                assert guest.value(f"in 8 {base + UART_RX}") == ord("x")
                assert guest.functions()[SERIAL].number("served") == count
            (irq,) = guest.ok("stats").of_kind("irq")
            assert (irq.number("entries"), irq.number("spurious")) == (3, 0)
    finally:
        remoted.child.kill()
