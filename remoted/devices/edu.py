# SPDX-License-Identifier: GPL-2.0-or-later
"""edu: the device for driver lessons of QEMU's docs/specs/edu.rst; details as in hw/misc/edu.c.

The option ``dma_mask`` is QEMU's: what the DMA engine can address, 28 bits unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from remoted.device import Bar, BarKind, Host, Msi, Option, PciFunction, Timer, register
from remoted.devices.edu_dma import DEFAULT_MASK, DmaEngine

__all__ = ["Edu"]

REG_IDENTIFICATION = 0x00
REG_LIVENESS = 0x04
REG_FACTORIAL = 0x08
REG_STATUS = 0x20
REG_IRQ_STATUS = 0x24
REG_IRQ_RAISE = 0x60
REG_IRQ_ACKNOWLEDGE = 0x64

IDENTIFICATION = 0x010000ED
STATUS_COMPUTING = 0x01
STATUS_IRQFACT = 0x80
FACT_IRQ = 0x00000001

_DMA_AREA = 0x80
"""from here on accesses may have 8 bytes"""
_ALL_ONES = 0xFFFFFFFFFFFFFFFF
_MASK32 = 0xFFFFFFFF
_FACTORIAL_ENDS = 34
"""34! is the first that is a multiple of 2 to the 32nd, so it and every later one is 0 in 32 bits"""


class Edu(PciFunction):
    """QEMU's device for driver lessons: a factorial, DMA, and interrupts.

    Each interrupt is a message while the guest has enabled MSI; else the line is high until the status is 0.
    """

    VENDOR_ID = 0x1234
    DEVICE_ID = 0x11E8
    REVISION = 0x10
    CLASS_CODE = 0x00FF00
    BARS: ClassVar = {0: Bar(BarKind.MEM32, 1 << 20)}
    MSI = Msi(vectors=1, maskable=False)
    OPTIONS = (Option("dma_mask", int, DEFAULT_MASK, "what DMA can address", minimum=0, maximum=_ALL_ONES),)

    PARTS = ("_dma",)

    _liveness: int = register(32)
    _factorial: int = register(32)
    _status: int = register(32)
    _irq_status: int = register(32)

    def __init__(self, host: Host, options: Mapping[str, str]) -> None:
        """Raises UsageError."""
        super().__init__(host, options)
        self._dma = DmaEngine(host, self.options["dma_mask"], self._raise_irq)
        self._computing: Timer | None = None

    def reset(self) -> None:
        if self._computing is not None:
            self._computing.cancel()
            self._computing = None
        self._dma.reset()

    def restored(self) -> None:
        if self._status & STATUS_COMPUTING:
            self._computing = self.host.loop.call_later(0, self._computed)
        self._dma.restored()

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        if offset >= _DMA_AREA:
            return self._dma.read(offset) if size in (4, 8) else _ALL_ONES
        if size != 4:
            return _ALL_ONES
        if offset == REG_IRQ_STATUS:
            return self._irq_status
        if offset == REG_STATUS:
            return self._status
        if offset == REG_FACTORIAL:
            return self._factorial
        if offset == REG_LIVENESS:
            return self._liveness
        return IDENTIFICATION if offset == REG_IDENTIFICATION else _ALL_ONES

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset >= _DMA_AREA:
            if size in (4, 8):
                self._dma.write(offset, value)
        elif size != 4:
            return
        elif offset == REG_IRQ_RAISE:
            self._raise_irq(value)
        elif offset == REG_IRQ_ACKNOWLEDGE:
            self._irq_status &= ~value
            if not self._irq_status:
                self.lower_irq()
        elif offset == REG_LIVENESS:
            self._liveness = ~value & _MASK32
        elif offset == REG_STATUS:
            self._status = self._status & STATUS_COMPUTING | value & STATUS_IRQFACT
        elif offset == REG_FACTORIAL:
            self._compute(value)

    def _compute(self, value: int) -> None:
        """Begins a computation, unless one is under way. It ends later: drivers have to wait for it."""
        if not self._status & STATUS_COMPUTING:
            self._factorial = value
            self._status |= STATUS_COMPUTING
            self._computing = self.host.loop.call_later(0, self._computed)

    def _computed(self) -> None:
        self._computing = None
        value = self._factorial
        self._factorial = math.factorial(value) & _MASK32 if value < _FACTORIAL_ENDS else 0
        self._status &= ~STATUS_COMPUTING
        if self._status & STATUS_IRQFACT:
            self._raise_irq(FACT_IRQ)

    def _raise_irq(self, value: int) -> None:
        self._irq_status |= value
        if self._irq_status:
            self.raise_irq()
