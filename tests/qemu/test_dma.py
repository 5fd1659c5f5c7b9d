# SPDX-License-Identifier: GPL-2.0-or-later
"""edu's DMA engine in remoted, and the RAM of a stock QEMU's guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from common import pci
from tests.support.qemu import PATIENCE
from tests.support.stockproxy import Remoted, StockGuest
from tests.support.wait import wait_until

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")

EDU = "05.0"
SOURCE, DESTINATION, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
RUN, FROM_DEVICE, RAISE_IRQ = 0x1, 0x2, 0x4
BUFFER = 0x40000
RAM_END = 64 << 20


class Driver:
    """The guest as a driver of edu."""

    def __init__(self, guest: StockGuest) -> None:
        self.guest = guest
        guest.ok("setup")
        guest.ok(f"config write 16 {EDU} 4 {pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER}")
        self._base = guest.value(f"config read 32 {EDU} 0x10")

    def transfer(self, source: int, destination: int, count: int, command: int) -> None:
        for register, value in ((SOURCE, source), (DESTINATION, destination), (COUNT, count)):
            self.guest.ok(f"write 32 {self._base + register} {value}")
        self.guest.ok(f"write 32 {self._base + COMMAND} {command | RUN}")
        wait_until(lambda: not self.guest.value(f"read 32 {self._base + COMMAND}") & RUN, "the transfer ends")

    def poke(self, addr: int, values: list[int]) -> None:
        for n, value in enumerate(values):
            self.guest.ok(f"write 32 {addr + 4 * n} {value}")

    def peek(self, addr: int, count: int) -> list[int]:
        return [self.guest.value(f"read 32 {addr + 4 * n}") for n in range(count)]

    def check_round_trip(self, there: int, back: int) -> None:
        """Four words go through the device, and arrive unchanged between unchanged neighbours."""
        words = [there ^ 0x01020304, 0xFFFFFFFF, back, 0x80000001]
        self.poke(there, words)
        self.poke(back - 4, [7] * 6)
        self.transfer(there, BUFFER + 96, 16, 0)
        self.transfer(BUFFER + 96, back, 16, FROM_DEVICE)
        assert self.peek(back - 4, 6) == [7, *words, 7]


@pytest.fixture
def remoted(requires_kvm: None, requires_qemu: None, tmp_path: Path) -> Iterator[Remoted]:
    remoted = Remoted(tmp_path, {EDU: "edu"})
    yield remoted
    remoted.child.kill()


def test_dma(remoted: Remoted, tmp_path: Path) -> None:
    """Through low RAM, across pages, at the very end; also after a reset; but not off the end."""
    with StockGuest(tmp_path, remoted) as guest:
        driver = Driver(guest)
        driver.check_round_trip(0x300000, 0x400000)
        driver.check_round_trip(0x500FF8, 0x600FFC)
        driver.check_round_trip(RAM_END - 16, 0x700000)

        driver.poke(RAM_END - 8, [1, 2])
        driver.transfer(0x300000, BUFFER, 16, 0)
        driver.transfer(RAM_END - 8, BUFFER, 16, 0)
        driver.transfer(BUFFER, RAM_END - 8, 16, FROM_DEVICE)
        assert driver.peek(RAM_END - 8, 2) == [1, 2]
        driver.transfer(BUFFER, 0x700000, 16, FROM_DEVICE)
        assert driver.peek(0x700000, 4) == driver.peek(0x300000, 4)
        assert remoted.log.count(f"DMA failed: no RAM at {RAM_END:#x}") == 2

        driver.transfer(0x300000, BUFFER, 16, RAISE_IRQ)
        # The interrupt comes by another way than the register that says that the transfer is over.
        wait_until(lambda: guest.functions()[EDU].number("served"), "the interrupt is served")
        assert guest.functions()[EDU].number("served") == 1

        guest.monitor.execute("system_reset")
        guest.console.wait_ready(PATIENCE)
        Driver(guest).check_round_trip(0x300000, 0x400000)
    assert remoted.log.count("warning") == 2
