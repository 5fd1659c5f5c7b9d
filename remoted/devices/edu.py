# SPDX-License-Identifier: GPL-2.0-or-later
"""edu: the device for driver lessons of QEMU's docs/specs/edu.rst, INTx only; details as in hw/misc/edu.c."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

from common.loop import Loop, Timer
from remoted.function import Bar, BarKind, Host, PciFunction

__all__ = ["Edu"]

REG_IDENTIFICATION = 0x00
REG_LIVENESS = 0x04
REG_FACTORIAL = 0x08
REG_STATUS = 0x20
REG_IRQ_STATUS = 0x24
REG_IRQ_RAISE = 0x60
REG_IRQ_ACKNOWLEDGE = 0x64
REG_DMA_SOURCE = 0x80
REG_DMA_DESTINATION = 0x88
REG_DMA_COUNT = 0x90
REG_DMA_COMMAND = 0x98

IDENTIFICATION = 0x010000ED
STATUS_COMPUTING = 0x01
STATUS_IRQFACT = 0x80
FACT_IRQ = 0x00000001
DMA_IRQ = 0x00000100
DMA_RUN = 0x1
DMA_RAISE_IRQ = 0x4

_DMA_AREA = 0x80
"""from here on accesses may have 8 bytes"""
_ALL_ONES = 0xFFFFFFFFFFFFFFFF
_MASK32 = 0xFFFFFFFF
_FACTORIAL_ENDS = 34
"""34! is the first that is a multiple of 2 to the 32nd, so it and every later one is 0 in 32 bits"""


class DmaEngine:
    """The DMA registers of a device that reaches no memory.

    A started transfer ends at once and moves nothing, as when every cycle ends in a master abort; the run bit
    and the interrupt behave as after a transfer, so that no driver waits for ever.
    """

    def __init__(self, loop: Loop, raise_irq: Callable[[int], None]) -> None:
        self._loop = loop
        self._raise_irq = raise_irq
        self._registers: dict[int, int] = {}
        self._running: Timer | None = None
        self.reset()

    def reset(self) -> None:
        """Stops a transfer and clears the registers."""
        self._registers = dict.fromkeys(
            (REG_DMA_SOURCE, REG_DMA_DESTINATION, REG_DMA_COUNT, REG_DMA_COMMAND), 0
        )
        if self._running is not None:
            self._running.cancel()
            self._running = None

    def read(self, offset: int) -> int:
        """The 64-bit register; all ones where there is none."""
        return self._registers.get(offset, _ALL_ONES)

    def write(self, offset: int, value: int) -> None:
        """Writes a register. Nothing can be written while a transfer runs, nor a command that starts none."""
        if offset not in self._registers or self._running is not None:
            return
        if offset == REG_DMA_COMMAND:
            if not value & DMA_RUN:
                return
            self._running = self._loop.call_later(0, self._finish)
        self._registers[offset] = value

    def _finish(self) -> None:
        self._running = None
        command = self._registers[REG_DMA_COMMAND] = self._registers[REG_DMA_COMMAND] & ~DMA_RUN
        if command & DMA_RAISE_IRQ:
            self._raise_irq(DMA_IRQ)


class Edu(PciFunction):
    """One edu device. The INTx line is high while the interrupt status is not 0."""

    VENDOR_ID = 0x1234
    DEVICE_ID = 0x11E8
    REVISION = 0x10
    CLASS_CODE = 0x00FF00
    BARS: ClassVar = {0: Bar(BarKind.MEM32, 1 << 20)}

    def __init__(self, host: Host, properties: Mapping[str, str]) -> None:
        super().__init__(host, properties)
        self._dma = DmaEngine(host.loop, self._raise_irq)
        self._computing: Timer | None = None
        self.reset()

    def reset(self) -> None:
        self._liveness = 0
        self._factorial = 0
        self._status = 0
        self._irq_status = 0
        if self._computing is not None:
            self._computing.cancel()
            self._computing = None
        self._dma.reset()

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
            self.set_intx(self._irq_status != 0)
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
        self.set_intx(self._irq_status != 0)
