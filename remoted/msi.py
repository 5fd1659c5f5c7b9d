# SPDX-License-Identifier: GPL-2.0-or-later
"""MSI and MSI-X: what a class declares of them, and what a transport has to offer for them.

The registers are those of the PCI Local Bus Specification 3.0, chapter 6.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Protocol

from common import pci
from common.errors import UsageError
from common.pci import Bar, BarKind
from remoted.capabilities import Capability

__all__ = ["Msi", "Msix", "VectorKind", "VectorPort", "place_msix"]

MSI_ENABLE = 0x01
MSI_MASK, MSI_PENDING = 0x10, 0x14
"""offsets in the capability, of the registers that one with per-vector masking has"""
MSIX_ENABLE, MSIX_FUNCTION_MASK = 0x80, 0x40
"""in the upper byte of message control"""
ENTRY_SIZE = 16
"""of a vector in the MSI-X table: address, upper address, data, vector control"""
MAX_MSI_VECTORS = 32
MAX_MSIX_VECTORS = 2048
_MIN_BAR_SIZE = 4096


class VectorKind(Enum):
    """Which of the two kinds of messages."""

    MSI = "msi"
    MSIX = "msix"


class VectorPort(Protocol):
    """How messages leave a function: the transport's side."""

    def signal(self, kind: VectorKind, vector: int) -> bool:
        """Signals the eventfd of a vector.

        False where none is attached, or the client has masked it: then the function keeps the message pending,
        and the transport calls its release_pending() when that has changed.
        """
        ...


class Msi(Capability):
    """MSI with a 64-bit address: 1, 2, 4, 8, 16 or 32 vectors, with or without per-vector masking."""

    __slots__ = ("maskable", "vectors")

    def __init__(self, vectors: int = 1, maskable: bool = True) -> None:
        self.vectors = vectors
        self.maskable = maskable

    @property
    def cap_id(self) -> int:
        return pci.PCI_CAP_ID_MSI

    def body(self) -> bytes:
        control = 0x80 | self.vectors.bit_length() - 1 << 1 | (0x100 if self.maskable else 0)
        return control.to_bytes(2, "little") + bytes(self._size - 4)

    def write_mask(self) -> bytes:
        mask = b"\x71\0" + b"\xfc\xff\xff\xff" + b"\xff\xff\xff\xff" + b"\xff\xff"
        if self.maskable:
            mask += b"\0\0" + ((1 << self.vectors) - 1).to_bytes(4, "little") + bytes(4)
        return mask

    @property
    def _size(self) -> int:
        return 0x18 if self.maskable else 0x0E

    def check(self) -> None:
        vectors = self.vectors
        if type(vectors) is not int or not 1 <= vectors <= MAX_MSI_VECTORS or vectors & vectors - 1:
            raise UsageError(f"MSI: {vectors!r} vectors are not 1, 2, 4, 8, 16 or 32")
        if type(self.maskable) is not bool:
            raise UsageError(f"MSI: maskable {self.maskable!r} is neither True nor False")


class Msix(Capability):
    """MSI-X with 1 to 2048 vectors.

    Table and PBA are in a BAR of their own, the last number that the class leaves free; or in BAR ``bar`` of the
    class, from the offsets ``table`` and ``pba`` on (the PBA behind the table if there is none). The device's
    bar_read() and bar_write() are not called for them.
    """

    __slots__ = ("bar", "pba", "table", "vectors")

    def __init__(self, vectors: int, bar: int | None = None, table: int = 0, pba: int | None = None) -> None:
        self.vectors = vectors
        self.bar = bar
        self.table = table
        self.pba = pba

    @property
    def cap_id(self) -> int:
        return pci.PCI_CAP_ID_MSIX

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return ENTRY_SIZE * self.vectors

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bits: whole quadwords."""
        return (self.vectors + 63) // 64 * 8

    def body(self) -> bytes:
        bar, pba = self.bar or 0, self.pba or 0
        return b"".join(
            (
                (self.vectors - 1).to_bytes(2, "little"),
                (self.table | bar).to_bytes(4, "little"),
                (pba | bar).to_bytes(4, "little"),
            )
        )

    def write_mask(self) -> bytes:
        return bytes((0, MSIX_ENABLE | MSIX_FUNCTION_MASK)) + bytes(8)

    def check(self) -> None:
        if type(self.vectors) is not int or not 1 <= self.vectors <= MAX_MSIX_VECTORS:
            raise UsageError(f"MSIX: {self.vectors!r} vectors are not 1 to {MAX_MSIX_VECTORS}")
        for name, value in (("table", self.table), ("pba", self.pba)):
            if value is not None and (type(value) is not int or value < 0 or value % 8):
                raise UsageError(f"MSIX: {name} {value!r} is not an offset that 8 divides")
        if self.bar is None and (self.table, self.pba) != (0, None):
            raise UsageError("MSIX: table and pba are offsets in a BAR of the class, which bar= names")


def place_msix(msix: Msix, bars: Mapping[int, Bar]) -> tuple[Msix, dict[int, Bar]]:
    """The declaration with all offsets filled in, and the BARs of the class with the one that it may add.

    Raises UsageError.
    """
    if msix.bar is None:
        size = max(_MIN_BAR_SIZE, 1 << (msix.table_size + msix.pba_size - 1).bit_length())
        occupied = {
            number + i for number, bar in bars.items() for i in range(1 + (bar.kind is BarKind.MEM64))
        }
        free = [number for number in range(pci.PCI_NUM_BARS) if number not in occupied]
        if not free:
            raise UsageError("MSIX: no BAR is free for its table: bar= places it in one of the class")
        placed = Msix(msix.vectors, free[-1], msix.table, msix.table_size)
        return placed, {**bars, free[-1]: Bar(BarKind.MEM32, size)}
    bar = bars.get(msix.bar) if type(msix.bar) is int else None
    if bar is None or bar.kind is BarKind.IO:
        raise UsageError(f"MSIX: bar {msix.bar!r} is not a memory BAR of the class")
    pba = msix.table + msix.table_size if msix.pba is None else msix.pba
    parts = sorted(((msix.table, msix.table + msix.table_size), (pba, pba + msix.pba_size)))
    if parts[0][1] > parts[1][0]:
        raise UsageError(f"MSIX: table and pba overlap at {parts[1][0]:#x} of BAR {msix.bar}")
    if parts[1][1] > bar.size:
        raise UsageError(f"MSIX: table and pba end at {parts[1][1]:#x}, behind the end of BAR {msix.bar}")
    for start, size in bar.shared_areas:
        if any(start < part_end and part_start < start + size for part_start, part_end in parts):
            raise UsageError(f"MSIX: table or pba overlap the shared memory at {start:#x} of BAR {msix.bar}")
    return Msix(msix.vectors, msix.bar, msix.table, pba), dict(bars)
