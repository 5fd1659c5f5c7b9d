# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupts by vector: as messages where the transport carries them, else by the line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest

from common import pci
from common.errors import UsageError
from common.loop import Loop
from remoted.device import Bar, BarKind, Host, Msi, Msix, PciFunction
from remoted.memory import GuestMemory
from remoted.msi import VectorKind
from tests.support.remotebench import Recorder

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


class Port:
    """A transport: which vectors have an eventfd, and what was signalled."""

    def __init__(self) -> None:
        self.attached: set[tuple[VectorKind, int]] = set()
        self.sent: list[tuple[VectorKind, int]] = []

    def signal(self, kind: VectorKind, vector: int) -> bool:
        if (kind, vector) not in self.attached:
            return False
        self.sent.append((kind, vector))
        return True

    def take(self) -> list[int]:
        """The vectors signalled since the last call."""
        sent, self.sent = self.sent, []
        return [vector for _, vector in sent]


class Board:
    """A function between a transport and a guest."""

    def __init__(self, model: type[PciFunction] = Both, *, has_messages: bool = True) -> None:
        self.lines: list[bool] = []
        self.port = Port()
        loop = Loop()
        loop.close()
        host = Host(
            "dev0",
            loop,
            Recorder().logger,
            GuestMemory(),
            self.lines.append,
            vectors=self.port if has_messages else None,
        )
        self.function = model(host, {})
        self.function.full_reset()

    def capability(self, cap_id: int) -> int:
        """The offset of a capability, found as a guest finds it; 0 without it."""
        function = self.function
        offset = 0
        if function.bus_config_read(pci.PCI_STATUS, 2) & pci.PCI_STATUS_CAP_LIST:
            offset = function.bus_config_read(pci.PCI_CAPABILITY_LIST, 1)
        while offset and function.bus_config_read(offset, 1) != cap_id:
            offset = function.bus_config_read(offset + 1, 1)
        return offset

    def command(self, value: int) -> None:
        assert self.function.bus_config_write(pci.PCI_COMMAND, 2, value)

    def msi_control(self, value: int) -> None:
        assert self.function.bus_config_write(self.capability(pci.PCI_CAP_ID_MSI) + 2, 2, value)

    def msix_control(self, value: int) -> None:
        assert self.function.bus_config_write(self.capability(pci.PCI_CAP_ID_MSIX) + 2, 2, value)

    def attach(self, kind: VectorKind, start: int, count: int) -> None:
        self.port.attached |= {(kind, vector) for vector in range(start, start + count)}
        self.function.release_pending(kind, start, count)

    @property
    def pba(self) -> int:
        """The pending bits of MSI-X, read as the guest reads them."""
        register = self.function.bus_config_read(self.capability(pci.PCI_CAP_ID_MSIX) + 8, 4)
        bar, offset = register & 7, register & ~7
        return sum(self.function.region_read(bar, offset + 8 * i, 8) << 64 * i for i in range(2))

    @property
    def msi_pending(self) -> int:
        return self.function.bus_config_read(self.capability(pci.PCI_CAP_ID_MSI) + 0x14, 4)

    @property
    def line(self) -> bool:
        return bool(self.lines) and self.lines[-1]


@pytest.fixture
def board() -> Board:
    board = Board()
    board.command(MASTER)
    return board


def test_without_messages_the_line_is_high_while_any_vector_is_raised() -> None:
    board = Board(has_messages=False)
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
def test_a_vector_that_is_not_declared(board: Board, vector: int) -> None:
    with pytest.raises(ValueError, match=rf"vector {vector} is not one of the 70 that the class declares"):
        board.function.raise_irq(vector)
    with pytest.raises(ValueError, match="is not one of the 70"):
        board.function.lower_irq(vector)


def test_msix_is_sent_by_each_call_and_the_line_is_low_meanwhile(board: Board) -> None:
    function = board.function
    function.raise_irq(69)
    assert board.line
    board.msix_control(0x8000)
    assert not board.line
    assert function.intx_level
    board.attach(VectorKind.MSIX, 0, 70)
    function.raise_irq(69)
    function.raise_irq(69)
    function.raise_irq(0)
    assert board.port.sent == [(VectorKind.MSIX, 69), (VectorKind.MSIX, 69), (VectorKind.MSIX, 0)]
    assert not board.line
    board.msix_control(0)
    assert board.line
    assert board.function.vectors(VectorKind.MSIX) == 70


def test_msix_comes_before_msi(board: Board) -> None:
    board.attach(VectorKind.MSIX, 0, 70)
    board.attach(VectorKind.MSI, 0, 8)
    board.msi_control(0x31)
    board.msix_control(0x8000)
    board.function.raise_irq(2)
    board.msix_control(0)
    board.function.raise_irq(2)
    assert board.port.sent == [(VectorKind.MSIX, 2), (VectorKind.MSI, 2)]


def test_what_has_no_eventfd_is_pending_and_sent_once_when_it_has(board: Board) -> None:
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


def test_the_function_mask(board: Board) -> None:
    board.attach(VectorKind.MSIX, 0, 70)
    board.msix_control(0xC000)
    board.function.raise_irq(65)
    assert (board.port.take(), board.pba) == ([], 1 << 65)
    board.msix_control(0x8000)
    assert (board.port.take(), board.pba) == ([65], 0)


def test_the_masks_of_msi(board: Board) -> None:
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
    board: Board, allocated: int, sent: list[int]
) -> None:
    board.attach(VectorKind.MSI, 0, 8)
    board.msi_control(0x01 | allocated << 4)
    for vector in (1, 6, 67):
        board.function.raise_irq(vector)
    assert board.port.take() == sent


def test_without_bus_mastering_messages_are_pending(board: Board) -> None:
    board.attach(VectorKind.MSIX, 0, 70)
    board.msix_control(0x8000)
    board.command(0)
    board.function.raise_irq(7)
    assert (board.port.take(), board.pba) == ([], 1 << 7)
    board.attach(VectorKind.MSIX, 0, 70)
    assert board.port.take() == []
    board.command(MASTER)
    assert (board.port.take(), board.pba) == ([7], 0)


def test_a_cause_that_is_gone_is_not_pending(board: Board) -> None:
    board.msix_control(0x8000)
    board.function.raise_irq(7)
    board.function.lower_irq(7)
    assert board.pba == 0
    board.attach(VectorKind.MSIX, 0, 70)
    assert board.port.take() == []


def test_a_shared_msi_is_pending_while_one_cause_is_left(board: Board) -> None:
    board.msi_control(0x01)
    board.function.raise_irq(2)
    board.function.raise_irq(5)
    board.function.lower_irq(2)
    assert board.msi_pending == 1
    board.function.lower_irq(5)
    assert board.msi_pending == 0


def test_a_reset_clears_enabling_masks_pending_bits_and_table(board: Board) -> None:
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


def test_the_table_has_a_bar_of_its_own_that_the_guest_can_place(board: Board) -> None:
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

    Board(Needy)
    with pytest.raises(
        UsageError, match="it needs MSI or MSI-X, which mpqemu does not carry: use transport="
    ):
        Board(Needy, has_messages=False)


def test_a_declaration_is_shown_with_its_values_and_the_same_in_every_process() -> None:
    """The layout of kept state is told apart by it."""
    assert repr(Msix(5, bar=2)) == "Msix(bar=2, pba=None, table=0, vectors=5)"
    assert repr(Msi(8)) == "Msi(maskable=True, vectors=8)"
