# SPDX-License-Identifier: GPL-2.0-or-later
"""edu's DMA engine: one transfer at a time between guest RAM and a buffer of 4096 bytes.

As in QEMU's hw/misc/edu.c, with three differences. A transfer is over in the pass of the loop that follows the
command, not after 100 ms. One that leaves the buffer ends the transfer, not the process. And one that can't be
done (out of the buffer, no RAM at some of its addresses, bus mastering off) moves nothing at all, where QEMU moves
what there is and reads the rest as zeros; the run bit and the interrupt behave as after a transfer, so that no
driver waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable

from common.messages import Event
from remoted.device import DmaError, Host, RateLimited, Timer, buffer, register, set_to_reset_values

__all__ = ["DEFAULT_MASK", "DMA_IRQ", "DmaEngine"]

REG_SOURCE = 0x80
REG_DESTINATION = 0x88
REG_COUNT = 0x90
REG_COMMAND = 0x98

COMMAND_RUN = 0x1
COMMAND_FROM_DEVICE = 0x2
COMMAND_RAISE_IRQ = 0x4

DMA_IRQ = 0x00000100
DEFAULT_MASK = (1 << 28) - 1

BUFFER_START = 0x40000
"""where the buffer is for the device itself; the guest can't access it"""
BUFFER_SIZE = 4096

_ALL_ONES = 0xFFFFFFFFFFFFFFFF


_REGISTERS = {
    REG_SOURCE: "_source",
    REG_DESTINATION: "_destination",
    REG_COUNT: "_count",
    REG_COMMAND: "_command",
}


class DmaEngine:
    """Registers, buffer and transfers."""

    _source: int = register(64)
    _destination: int = register(64)
    _count: int = register(64)
    _command: int = register(64)
    _buffer: bytearray = buffer(BUFFER_SIZE, bytes(BUFFER_SIZE))

    def __init__(self, host: Host, mask: int, raise_irq: Callable[[int], None]) -> None:
        """``mask`` is what addresses of RAM are cut to."""
        self._host = host
        self._log = RateLimited(host.log)
        self._mask = mask
        self._raise_irq = raise_irq
        self._running: Timer | None = None
        set_to_reset_values(self)

    def reset(self) -> None:
        """Stops a transfer, clears registers and buffer."""
        set_to_reset_values(self)
        if self._running is not None:
            self._running.cancel()
            self._running = None

    def restored(self) -> None:
        """The registers have been set to those of another process: a transfer that it had not ended is done."""
        if self._command & COMMAND_RUN:
            self._running = self._host.loop.call_later(0, self._run)

    def read(self, offset: int) -> int:
        """The 64-bit register; all ones where there is none."""
        name = _REGISTERS.get(offset)
        return _ALL_ONES if name is None else int(getattr(self, name))

    def write(self, offset: int, value: int) -> None:
        """Writes a register. Nothing can be written while a transfer runs, nor a command that starts none."""
        if offset not in _REGISTERS or self._running is not None:
            return
        if offset == REG_COMMAND:
            if not value & COMMAND_RUN:
                return
            self._running = self._host.loop.call_later(0, self._run)
        setattr(self, _REGISTERS[offset], value)

    def _run(self) -> None:
        self._running = None
        try:
            self._transfer()
        except DmaError as error:
            self._log.warning("DMA failed: %s", error, event=Event.DMA_REFUSED)
        self._command &= ~COMMAND_RUN
        if self._command & COMMAND_RAISE_IRQ:
            self._raise_irq(DMA_IRQ)

    def _transfer(self) -> None:
        source, destination, count = self._source, self._destination, self._count
        from_device = bool(self._command & COMMAND_FROM_DEVICE)
        start = (source if from_device else destination) - BUFFER_START
        if start < 0 or start + count > BUFFER_SIZE:
            raise DmaError(f"{count} bytes at {start + BUFFER_START:#x} are not within the device's buffer")
        if from_device:
            self._host.memory.write(destination & self._mask, self._buffer[start : start + count])
        else:
            self._buffer[start : start + count] = self._host.memory.read(source & self._mask, count)
