# SPDX-License-Identifier: GPL-2.0-or-later
"""A device whose registers let a vfio-user client try everything that a transport does for a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from remoted.device import (
    Bar,
    BarKind,
    DmaError,
    Host,
    Msi,
    Msix,
    PciFunction,
    buffer,
    register,
)

# Registers of 32 bits, in BAR 0 and again in the I/O BAR 1.
SCRATCH = 0x00
RAISE = 0x04
"""a write raises the interrupt whose vector is the value"""
LOWER = 0x08
RESETS = 0x0C
DMA_ADDRESS = 0x10
"""64 bits"""
DMA_DATA = 0x18
"""a read or write moves 4 bytes from or to the guest's RAM"""
DMA_FAILED = 0x1C
"""whether the last transfer failed"""
WRITES = 0x20
"""how many writes have come"""
SIZE = 0x40

BYTES = 0x100
"""up to 0x200: plain memory, in BAR 0 only"""
SHARED_BAR = 1 << 22
SHARED = (0x1000, SHARED_BAR - 0x1000)
"""in BAR 2, behind a page of registers that read as their offset"""
MSI_VECTORS = 4
MSIX_VECTORS = 20
IDENTITY = 0x0099_1B36


class Probe(PciFunction):
    """See above."""

    VENDOR_ID: ClassVar[int] = IDENTITY & 0xFFFF
    DEVICE_ID: ClassVar[int] = IDENTITY >> 16
    CLASS_CODE: ClassVar[int] = 0xFF0000
    BARS: ClassVar[Mapping[int, Bar]] = {
        0: Bar(BarKind.MEM32, 4096),
        1: Bar(BarKind.IO, SIZE),
        2: Bar(BarKind.MEM64, SHARED_BAR, prefetchable=True, shared=(SHARED,)),
    }
    MSI = Msi(vectors=MSI_VECTORS, maskable=True)
    MSIX = Msix(vectors=MSIX_VECTORS)

    scratch: int = register(32)
    address: int = register(64)
    failed: int = register(8)
    memory: bytearray = buffer(0x100, bytes(0x100))

    def __init__(self, host: Host, options: Mapping[str, str]) -> None:
        super().__init__(host, options)
        self._resets = 0
        self._writes = 0

    def reset(self) -> None:
        self._resets += 1

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        if bar == 2:
            return offset
        if bar == 0 and offset >= BYTES and offset + size <= BYTES + 0x100:
            return int.from_bytes(self.memory[offset - BYTES : offset - BYTES + size], "little")
        if offset == SCRATCH:
            return self.scratch & ((1 << 8 * size) - 1)
        if offset == DMA_DATA:
            return self._dma_read(size)
        values = {RESETS: self._resets, DMA_FAILED: self.failed, WRITES: self._writes}
        return values.get(offset, 0)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self._writes = (self._writes + 1) & 0xFFFFFFFF
        if bar == 0 and offset >= BYTES and offset + size <= BYTES + 0x100:
            self.memory[offset - BYTES : offset - BYTES + size] = value.to_bytes(size, "little")
        elif offset == SCRATCH:
            self.scratch = value & 0xFFFFFFFF
        elif offset == RAISE:
            self.raise_irq(value % MSIX_VECTORS)
        elif offset == LOWER:
            self.lower_irq(value % MSIX_VECTORS)
        elif offset == DMA_ADDRESS:
            self.address = value if size == 8 else self.address >> 32 << 32 | value
        elif offset == DMA_ADDRESS + 4:
            self.address = self.address & 0xFFFFFFFF | value << 32
        elif offset == DMA_DATA:
            self._dma_write(value.to_bytes(size, "little"))

    def _dma_read(self, size: int) -> int:
        self.failed = 0
        try:
            return int.from_bytes(self.host.memory.read(self.address, size), "little")
        except DmaError:
            self.failed = 1
            return 0

    def _dma_write(self, data: bytes) -> None:
        self.failed = 0
        try:
            self.host.memory.write(self.address, data)
        except DmaError:
            self.failed = 1


class Pinless(PciFunction):
    """No interrupt and no BAR."""

    VENDOR_ID: ClassVar[int] = IDENTITY & 0xFFFF
    DEVICE_ID: ClassVar[int] = 0x009A
    INTERRUPT_PIN: ClassVar[int] = 0
