# SPDX-License-Identifier: GPL-2.0-or-later
"""edu's registers, as QEMU's docs/specs/edu.rst describes them."""

from __future__ import annotations

import math

import pytest

from common import pci
from common.loop import Loop
from remoted.devices.edu import Edu
from remoted.msi import VectorKind
from tests.support.devices import FunctionBench
from tests.support.messageboard import MessageBoard
from tests.support.steploop import run_until

IDENTIFICATION, LIVENESS, FACTORIAL, STATUS = 0x00, 0x04, 0x08, 0x20
IRQ_STATUS, IRQ_RAISE, IRQ_ACKNOWLEDGE = 0x24, 0x60, 0x64
DMA_SOURCE, DMA_DESTINATION, DMA_COUNT, DMA_COMMAND = 0x80, 0x88, 0x90, 0x98

Bench = FunctionBench[Edu]


@pytest.fixture
def edu(loop: Loop) -> Bench:
    return FunctionBench(Edu, loop)


def compute(edu: Bench, loop: Loop, value: int) -> int:
    """A driver's way to a factorial."""
    edu.write(FACTORIAL, 4, value)
    run_until(loop, lambda: not edu.read(STATUS, 4) & 0x01)
    return edu.read(FACTORIAL, 4)


def test_identity(edu: Bench) -> None:
    function = edu.function
    assert function.config_read(pci.PCI_VENDOR_ID, 4) == 0x11E81234
    assert function.config_read(pci.PCI_REVISION_ID, 4) == 0x00FF0010
    assert function.config_read(pci.PCI_SUBSYSTEM_VENDOR_ID, 4) == 0x11001AF4
    assert function.config_read(pci.PCI_INTERRUPT_PIN, 1) == 1
    function.config_write(pci.PCI_BASE_ADDRESS_0, 4, 0xFFFFFFFF)
    assert function.config_read(pci.PCI_BASE_ADDRESS_0, 4) == 0xFFF00000


def test_identification(edu: Bench) -> None:
    assert edu.read(IDENTIFICATION, 4) == 0x010000ED
    edu.write(IDENTIFICATION, 4, 0)
    assert edu.read(IDENTIFICATION, 4) == 0x010000ED


def test_liveness(edu: Bench) -> None:
    assert edu.read(LIVENESS, 4) == 0
    for value in (0, 1, 0x12345678, 0xFFFFFFFF):
        edu.write(LIVENESS, 4, value)
        assert edu.read(LIVENESS, 4) == value ^ 0xFFFFFFFF


@pytest.mark.parametrize("value", [0, 1, 2, 12, 13, 20, 32, 33, 34, 35, 1000, 0x80000000, 0xFFFFFFFF])
def test_factorial(edu: Bench, loop: Loop, value: int) -> None:
    """Modulo 2 to the 32nd, for the largest value too."""
    expected = math.factorial(value) % 2**32 if value < 10000 else 0
    assert compute(edu, loop, value) == expected


def test_factorial_is_busy_until_it_is_done(edu: Bench, loop: Loop) -> None:
    edu.write(FACTORIAL, 4, 5)
    assert edu.read(STATUS, 4) == 0x01
    assert edu.read(FACTORIAL, 4) == 5
    edu.write(FACTORIAL, 4, 6)
    run_until(loop, lambda: edu.read(STATUS, 4) == 0)
    assert edu.read(FACTORIAL, 4) == 120, "a value written while it was busy is ignored"


def test_factorial_interrupt(edu: Bench, loop: Loop) -> None:
    assert compute(edu, loop, 5) == 120
    assert not edu.line
    edu.write(STATUS, 4, 0x80)
    compute(edu, loop, 5)
    assert edu.line
    assert edu.read(IRQ_STATUS, 4) == 0x01
    edu.write(IRQ_ACKNOWLEDGE, 4, 0x01)
    assert not edu.line


def test_status_takes_only_its_interrupt_bit(edu: Bench, loop: Loop) -> None:
    edu.write(STATUS, 4, 0xFFFFFFFF)
    assert edu.read(STATUS, 4) == 0x80
    edu.write(FACTORIAL, 4, 1)
    edu.write(STATUS, 4, 0)
    assert edu.read(STATUS, 4) == 0x01, "a computation can't be stopped"
    run_until(loop, lambda: edu.read(STATUS, 4) == 0)
    assert not edu.line


def test_raise_and_acknowledge(edu: Bench) -> None:
    """The line is high while any bit is set."""
    edu.write(IRQ_RAISE, 4, 0)
    assert not edu.line
    edu.write(IRQ_RAISE, 4, 0x80000001)
    edu.write(IRQ_RAISE, 4, 0x00000100)
    assert edu.lines == [True]
    assert edu.read(IRQ_STATUS, 4) == 0x80000101
    edu.write(IRQ_ACKNOWLEDGE, 4, 0x80000100)
    assert edu.line
    assert edu.read(IRQ_STATUS, 4) == 0x00000001
    edu.write(IRQ_ACKNOWLEDGE, 4, 0xFFFFFFFF)
    assert edu.lines == [True, False]
    edu.write(IRQ_STATUS, 4, 1)
    assert edu.read(IRQ_STATUS, 4) == 0, "read-only"


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("offset", [IDENTIFICATION, LIVENESS, FACTORIAL, STATUS, IRQ_STATUS])
def test_only_four_bytes_below_the_dma_registers(edu: Bench, offset: int, size: int) -> None:
    before = edu.read(offset, 4)
    assert edu.read(offset, size) == (1 << 8 * size) - 1
    edu.write(offset, size, 0x55)
    edu.write(IRQ_RAISE, size, 1)
    assert edu.read(offset, 4) == before
    assert not edu.line


@pytest.mark.parametrize("offset", [0x0C, 0x1C, 0x28, IRQ_RAISE, IRQ_ACKNOWLEDGE, 0x7C, 0x84, 0xA0, 0xFFFFC])
def test_nothing_else_can_be_read(edu: Bench, offset: int) -> None:
    assert edu.read(offset, 4) == 0xFFFFFFFF


class TestDma:
    @pytest.mark.parametrize("offset", [DMA_SOURCE, DMA_DESTINATION, DMA_COUNT])
    def test_registers(self, edu: Bench, offset: int) -> None:
        """64 bits; 4-byte accesses see and write the low half, and clear the high one."""
        edu.write(offset, 8, 0x123456789ABCDEF0)
        assert edu.read(offset, 8) == 0x123456789ABCDEF0
        assert edu.read(offset, 4) == 0x9ABCDEF0
        edu.write(offset, 4, 0x11111111)
        assert edu.read(offset, 8) == 0x11111111
        for size in (1, 2):
            edu.write(offset, size, 0x22)
            assert edu.read(offset, size) == (1 << 8 * size) - 1
        assert edu.read(offset, 8) == 0x11111111

    def test_transfer_ends_without_memory(self, edu: Bench, loop: Loop) -> None:
        edu.write(DMA_COUNT, 8, 100)
        edu.write(DMA_COMMAND, 8, 0x3)
        assert edu.read(DMA_COMMAND, 8) == 0x3
        for offset in (DMA_SOURCE, DMA_DESTINATION, DMA_COUNT, DMA_COMMAND):
            edu.write(offset, 8, 5)
        run_until(loop, lambda: not edu.read(DMA_COMMAND, 8) & 1)
        assert edu.read(DMA_COMMAND, 8) == 0x2
        assert edu.read(DMA_COUNT, 8) == 100, "nothing can be written while it runs"
        assert not edu.line

    def test_interrupt(self, edu: Bench, loop: Loop) -> None:
        edu.write(DMA_COMMAND, 4, 0x5)
        assert not edu.line
        run_until(loop, lambda: edu.line)
        assert edu.read(IRQ_STATUS, 4) == 0x100
        assert edu.read(DMA_COMMAND, 8) == 0x4

    def test_a_command_that_starts_nothing_is_ignored(self, edu: Bench) -> None:
        edu.write(DMA_COMMAND, 8, 0x6)
        assert edu.read(DMA_COMMAND, 8) == 0


def test_reset(edu: Bench, loop: Loop) -> None:
    """Registers to power-on; what was under way never ends, nor does it interrupt."""
    edu.write(LIVENESS, 4, 1)
    edu.write(STATUS, 4, 0x80)
    edu.write(IRQ_RAISE, 4, 1)
    edu.write(DMA_SOURCE, 8, 1)
    edu.write(FACTORIAL, 4, 5)
    edu.write(DMA_COMMAND, 4, 0x5)
    edu.function.full_reset()
    assert edu.lines == [True, False]
    edu.place_bars()
    done: list[bool] = []
    loop.call_later(0, lambda: done.append(True))
    run_until(loop, lambda: done)
    assert [edu.read(offset, 4) for offset in (LIVENESS, FACTORIAL, STATUS, IRQ_STATUS)] == [0, 0, 0, 0]
    assert [edu.read(offset, 8) for offset in (DMA_SOURCE, DMA_COMMAND)] == [0, 0]
    assert not edu.line
    assert compute(edu, loop, 3) == 6


def test_msi() -> None:
    """As edu_raise_irq() and edu_lower_irq() in QEMU's hw/misc/edu.c: a message for each interrupt."""
    board = MessageBoard(Edu)
    write = board.function.region_write
    board.command(pci.PCI_COMMAND_MASTER)
    board.attach(VectorKind.MSI, 0, 1)
    assert board.function.bus_config_read(board.capability(pci.PCI_CAP_ID_MSI) + 2, 2) == 0x80
    write(0, IRQ_RAISE, 4, 1)
    assert (board.line, board.port.take()) == (True, [])
    board.msi_control(0x01)
    assert (board.line, board.port.take()) == (False, [0]), "it would be lost"
    write(0, IRQ_RAISE, 4, 2)
    write(0, IRQ_RAISE, 4, 2)
    assert board.port.take() == [0, 0]
    write(0, IRQ_ACKNOWLEDGE, 4, 2)
    assert board.function.region_read(0, IRQ_STATUS, 4) == 1
    board.msi_control(0x00)
    assert (board.line, board.port.take()) == (True, [])
    write(0, IRQ_ACKNOWLEDGE, 4, 1)
    assert not board.line
