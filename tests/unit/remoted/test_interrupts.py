# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupts by vector: as messages where the transport carries them, else by the line."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import ClassVar

import pytest

from common import pci
from common.errors import UsageError
from remoted.device import Bar, BarKind, Msi, Msix, PciFunction
from remoted.msi import VectorKind
from tests.support.messageboard import MessageBoard

MASTER = pci.PCI_COMMAND_MASTER
MEMORY = pci.PCI_COMMAND_MEMORY
INTX_DISABLE = pci.PCI_COMMAND_INTX_DISABLE
ONES = 0xFFFFFFFFFFFFFFFF


class Both(PciFunction):
    """Eight vectors either way."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x0001
    BARS: ClassVar[Mapping[int, Bar]] = {0: Bar(BarKind.MEM64, 4096)}
    MSI = Msi(vectors=8)
    MSIX = Msix(vectors=70)

    def reset(self) -> None:
        """Its registers, of which it has none, are no fields: a restart doesn't keep them."""


@pytest.fixture
def board() -> MessageBoard:
    board = MessageBoard(Both)
    board.command(MASTER)
    return board


def test_without_messages_the_line_is_high_while_any_vector_is_raised() -> None:
    board = MessageBoard(Both, has_messages=False)
    assert board.capability(pci.PCI_CAP_ID_MSI) == board.capability(pci.PCI_CAP_ID_MSIX) == 0
    assert not board.function.bus_config_read(pci.PCI_STATUS, 2) & pci.PCI_STATUS_CAP_LIST
    assert set(board.function.bars) == {0}
    assert [board.function.vectors(kind) for kind in VectorKind] == [0, 0]
    board.function.raise_irq(3)
    board.function.raise_irq(3)
    board.function.raise_irq(69)
    assert board.lines == [True]
    assert board.function.bus_config_read(pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT
    board.function.lower_irq(3)
    board.function.lower_irq(5)
    assert board.line
    board.function.lower_irq(69)
    assert board.lines == [True, False]
    assert not board.function.bus_config_read(pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT
    board.function.raise_irq()
    board.function.full_reset()
    assert not board.line
    assert not board.function.intx_level


@pytest.mark.parametrize("vector", [-1, 70])
def test_a_vector_that_is_not_declared(board: MessageBoard, vector: int) -> None:
    with pytest.raises(ValueError, match=rf"vector {vector} is not one of the 70 that the class declares"):
        board.function.raise_irq(vector)
    with pytest.raises(ValueError, match="is not one of the 70"):
        board.function.lower_irq(vector)


def test_msix_is_sent_by_each_call_and_the_line_is_low_meanwhile(board: MessageBoard) -> None:
    function = board.function
    function.raise_irq(69)
    assert board.line
    board.msix_control(0x8000)
    assert not board.line
    assert function.intx_level
    assert board.pba == 1 << 69, "only the line has told of it"
    function.lower_irq(69)
    board.attach(VectorKind.MSIX, 0, 70)
    function.raise_irq(69)
    function.raise_irq(69)
    function.raise_irq(0)
    assert board.port.sent == [(VectorKind.MSIX, 69), (VectorKind.MSIX, 69), (VectorKind.MSIX, 0)]
    assert not board.line
    board.msix_control(0)
    assert board.line
    assert board.function.vectors(VectorKind.MSIX) == 70


def test_what_the_line_has_told_is_sent_once_when_messages_are_enabled(board: MessageBoard) -> None:
    board.attach(VectorKind.MSIX, 0, 70)
    board.attach(VectorKind.MSI, 0, 8)
    board.function.raise_irq(3)
    board.function.raise_irq(5)
    board.function.lower_irq(5)
    board.msix_control(0x8000)
    assert board.port.take() == [3]
    board.msix_control(0x0000)
    assert board.line
    board.msi_control(0x31)
    assert board.port.take() == [], "a message has told of it"
    board.msi_control(0x30)
    board.function.full_reset()
    board.command(MASTER)
    board.msi_control(0x31)
    assert board.port.take() == []


def test_msix_comes_before_msi(board: MessageBoard) -> None:
    board.attach(VectorKind.MSIX, 0, 70)
    board.attach(VectorKind.MSI, 0, 8)
    board.msi_control(0x31)
    board.msix_control(0x8000)
    board.function.raise_irq(2)
    board.msix_control(0)
    board.function.raise_irq(2)
    assert board.port.sent == [(VectorKind.MSIX, 2), (VectorKind.MSI, 2)]


def test_what_has_no_eventfd_is_pending_and_sent_once_when_it_has(board: MessageBoard) -> None:
    board.msix_control(0x8000)
    board.function.raise_irq(64)
    board.function.raise_irq(64)
    board.function.raise_irq(1)
    assert board.pba == 1 << 64 | 1 << 1
    board.attach(VectorKind.MSIX, 2, 68)
    assert board.port.take() == [64]
    assert board.pba == 1 << 1
    board.attach(VectorKind.MSIX, 0, 70)
    board.attach(VectorKind.MSIX, 0, 70)
    assert board.port.take() == [1]
    assert board.pba == 0


def test_the_function_mask(board: MessageBoard) -> None:
    board.attach(VectorKind.MSIX, 0, 70)
    board.msix_control(0xC000)
    board.function.raise_irq(65)
    assert (board.port.take(), board.pba) == ([], 1 << 65)
    board.msix_control(0x8000)
    assert (board.port.take(), board.pba) == ([65], 0)


def test_the_masks_of_msi(board: MessageBoard) -> None:
    board.attach(VectorKind.MSI, 0, 8)
    mask = board.capability(pci.PCI_CAP_ID_MSI) + 0x10
    board.function.bus_config_write(mask, 4, 0xFFFFFFFF)
    assert board.function.bus_config_read(mask, 4) == 0xFF
    board.msi_control(0x31)
    board.function.raise_irq(3)
    board.function.raise_irq(4)
    assert (board.port.take(), board.msi_pending) == ([], 0x18)
    board.function.bus_config_write(mask + 4, 4, 0)
    assert board.msi_pending == 0x18
    board.function.bus_config_write(mask, 4, 0xFF & ~0x10)
    assert (board.port.take(), board.msi_pending) == ([4], 0x08)


@pytest.mark.parametrize(
    ("allocated", "sent"), [(0, [0, 0, 0]), (1, [1, 0, 1]), (3, [1, 6, 3]), (7, [1, 6, 3])]
)
def test_vectors_share_the_messages_that_the_guest_has_allocated(
    board: MessageBoard, allocated: int, sent: list[int]
) -> None:
    board.attach(VectorKind.MSI, 0, 8)
    board.msi_control(0x01 | allocated << 4)
    for vector in (1, 6, 67):
        board.function.raise_irq(vector)
    assert board.port.take() == sent


def test_without_bus_mastering_messages_are_pending(board: MessageBoard) -> None:
    board.attach(VectorKind.MSIX, 0, 70)
    board.msix_control(0x8000)
    board.command(0)
    board.function.raise_irq(7)
    assert (board.port.take(), board.pba) == ([], 1 << 7)
    board.attach(VectorKind.MSIX, 0, 70)
    assert board.port.take() == []
    board.command(MASTER)
    assert (board.port.take(), board.pba) == ([7], 0)


def test_a_cause_that_is_gone_is_not_pending(board: MessageBoard) -> None:
    board.msix_control(0x8000)
    board.function.raise_irq(7)
    board.function.lower_irq(7)
    assert board.pba == 0
    board.attach(VectorKind.MSIX, 0, 70)
    assert board.port.take() == []


def test_a_shared_msi_is_pending_while_one_cause_is_left(board: MessageBoard) -> None:
    board.msi_control(0x01)
    board.function.raise_irq(2)
    board.function.raise_irq(5)
    board.function.lower_irq(2)
    assert board.msi_pending == 1
    board.function.lower_irq(5)
    assert board.msi_pending == 0


def test_a_reset_clears_enabling_masks_pending_bits_and_table(board: MessageBoard) -> None:
    table = board.function.bus_config_read(board.capability(pci.PCI_CAP_ID_MSIX) + 4, 4)
    bar, offset = table & 7, table & ~7
    for entry in range(70):
        assert board.function.region_write(bar, offset + 16 * entry, 8, ONES)
        assert board.function.region_write(bar, offset + 16 * entry + 8, 8, ONES - (1 << 32))
        assert board.function.region_read(bar, offset + 16 * entry + 8, 8) == 0xFFFFFFFF
    board.msi_control(0x31)
    board.function.raise_irq(1)
    board.msix_control(0x8000)
    board.function.raise_irq(1)
    assert board.pba
    assert board.msi_pending
    board.function.full_reset()
    assert (board.pba, board.msi_pending, board.line, board.function.intx_level) == (0, 0, False, False)
    for entry in range(70):
        assert board.function.region_read(bar, offset + 16 * entry, 8) == 0
        assert board.function.region_read(bar, offset + 16 * entry + 8, 8) == 1 << 32
    board.attach(VectorKind.MSIX, 0, 70)
    board.attach(VectorKind.MSI, 0, 8)
    board.command(MASTER)
    board.function.raise_irq(1)
    assert board.port.take() == []
    assert board.line


def test_after_a_restart_without_registers_the_guest_s_settings_are_there(board: MessageBoard) -> None:
    """The class starts from its reset, with nothing raised or pending; the driver goes on."""
    table = board.function.bus_config_read(board.capability(pci.PCI_CAP_ID_MSIX) + 4, 4)
    assert board.function.region_write(table & 7, (table & ~7) + 16, 8, 0xFEE00000)
    board.msix_control(0x8000)
    board.function.raise_irq(1)
    with closing(board.keep()) as state:
        state.commit()
        board.restart(state.fd)
    assert not board.function.keeps_registers
    assert (board.pba, board.function.intx_level) == (0, False)
    assert board.function.region_read(table & 7, (table & ~7) + 16, 8) == 0xFEE00000
    board.attach(VectorKind.MSIX, 0, 70)
    board.function.raise_irq(1)
    assert board.port.take() == [1]


def test_the_table_has_a_bar_of_its_own_that_the_guest_can_place(board: MessageBoard) -> None:
    assert board.function.bars == {0: Bar(BarKind.MEM64, 4096), 5: Bar(BarKind.MEM32, 4096)}
    assert board.function.bus_config_write(0x24, 4, 0xFFFFFFFF)
    assert board.function.bus_config_read(0x24, 4) == 0xFFFFF000
    assert board.function.bus_config_write(0x24, 4, 0xFEB00000)
    board.command(MEMORY)
    assert board.function.bus_write(True, 0xFEB00010, 4, 0xFEE00004)
    assert board.function.bus_read(True, 0xFEB00010, 4) == 0xFEE00004
    assert board.function.bus_read(True, 0xFEB00010, 2) == 0xFFFF
    assert board.function.bus_write(True, 0xFEB00000 + 70 * 16, 4, 0xFF)  # the PBA is read-only
    assert board.pba == 0
    assert board.function.errors == 0


def test_a_device_that_needs_messages_is_refused_without_them() -> None:
    class Needy(Both):
        NEEDS_MESSAGES = True

    MessageBoard(Needy)
    with pytest.raises(
        UsageError, match="it needs MSI or MSI-X, which mpqemu does not carry: use transport="
    ):
        MessageBoard(Needy, has_messages=False)


def test_msix_can_be_hidden_from_the_guest() -> None:
    board = MessageBoard(Both, msix=False)
    board.command(MASTER)
    assert board.capability(pci.PCI_CAP_ID_MSIX) == 0
    assert set(board.function.bars) == {0}
    assert [board.function.vectors(kind) for kind in VectorKind] == [8, 0]
    board.attach(VectorKind.MSI, 0, 8)
    board.attach(VectorKind.MSIX, 0, 70)
    board.msi_control(0x31)
    board.function.raise_irq(69)
    assert board.port.sent == [(VectorKind.MSI, 69 % 8)]


def test_a_device_that_needs_msix_is_refused_without_it() -> None:
    class Needy(PciFunction):
        VENDOR_ID, DEVICE_ID = 0x1234, 0x0002
        MSIX = Msix(vectors=2)
        NEEDS_MESSAGES = True

    MessageBoard(Needy)
    with pytest.raises(UsageError, match="it needs MSI-X, which msix=off hides from the guest"):
        MessageBoard(Needy, msix=False)


def test_a_declaration_is_shown_with_its_values_and_the_same_in_every_process() -> None:
    """The layout of kept state is told apart by it."""
    assert repr(Msix(5, bar=2)) == "Msix(bar=2, pba=None, table=0, vectors=5)"
    assert repr(Msi(8)) == "Msi(maskable=True, vectors=8)"
