# SPDX-License-Identifier: GPL-2.0-or-later
"""The board of --vm soft, and the CPU as far as a scripted guest needs one.

The interrupt controllers are those of softirqchip.py. A scripted guest stands in for the CPU: Python code that
uses the board by port I/O and MMIO as a driver would. All of it runs in the daemon's one thread: the event loop
runs where a CPU would halt, and after an access that took long, such as one to a remote that hangs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from common.loop import Loop
from proxyd.machine.console import COM1_PORTS, Console
from proxyd.pci.pcihost import RESET_CPU, RESET_PORT, PciHost
from proxyd.vm.soft.i8259 import I8259Pair

__all__ = ["LINE_MAX", "TICK_SECONDS", "TSC_KHZ", "MachineReset", "PowerOff", "SoftMachine"]

LINE_MAX = 127
"""characters of a command line"""
TICK_SECONDS = 0.01
TSC_KHZ = 1_000_000
"""the scripted guest's time stamps are nanoseconds"""

_LOOP_MAY_WAIT_SECONDS = 0.1
"""a guest that doesn't halt lets the loop run every so often, between two accesses"""

_PIC_PORTS = frozenset((0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1))
_COM1 = COM1_PORTS.start
_LSR = _COM1 + 5
_LSR_DATA_READY = 0x01


class PowerOff(Exception):
    """The daemon ends; unwinds the guest."""


class MachineReset(Exception):
    """The guest has written the reset control register; unwinds it to its entry."""


class SoftMachine:
    """The board, and the CPU as far as a scripted guest needs one: ports, memory, interrupts, halting."""

    def __init__(self, loop: Loop, pic: I8259Pair, host: PciHost, console: Console) -> None:
        self._loop = loop
        self._pic = pic
        self._host = host
        self._console = console
        self._loop_ran_at = time.monotonic()

    def inp(self, port: int, size: int = 1) -> int:
        """An I/O port read. Raises PowerOff when the daemon ends."""
        self._begin_access()
        if port in _PIC_PORTS:
            return self._pic.port_in(port, size)
        if port in COM1_PORTS and size == 1:
            return self._console.read(port)
        return self._host.pio_read(port, size)

    def outp(self, port: int, value: int, size: int = 1) -> None:
        """An I/O port write. Raises MachineReset for a reset, PowerOff when the daemon ends."""
        self._begin_access()
        if port == RESET_PORT and size == 1:
            if value & RESET_CPU:
                self._host.reset()
                self._console.reset()
                raise MachineReset
        elif port in _PIC_PORTS:
            self._pic.port_out(port, size, value)
        elif port in COM1_PORTS and size == 1:
            self._console.write(port, value)
        else:
            self._host.pio_write(port, size, value)

    def mmio_read(self, addr: int, size: int) -> int:
        """A memory read. Raises PowerOff when the daemon ends."""
        self._begin_access()
        return self._host.mmio_read(addr, size)

    def mmio_write(self, addr: int, size: int, value: int) -> None:
        """A memory write. Raises PowerOff when the daemon ends."""
        self._begin_access()
        self._host.mmio_write(addr, size, value)

    def set_level_triggered(self, irq: int, level: bool = True) -> None:
        """Sets the IRQ's ELCR bit, or clears it."""
        port = 0x4D0 + (irq >> 3)
        bits = self.inp(port)
        self.outp(port, bits | 1 << (irq & 7) if level else bits & ~(1 << (irq & 7)))

    def mask(self, irq: int, masked: bool) -> None:
        """Masks or unmasks an IRQ at the 8259s."""
        port = 0x21 if irq < 8 else 0xA1
        mask = self.inp(port)
        self.outp(port, mask | 1 << (irq & 7) if masked else mask & ~(1 << (irq & 7)))

    def is_in_service(self, irq: int) -> bool:
        """Whether the IRQ is in service: a 7 or 15 that isn't is spurious."""
        command = 0x20 if irq < 8 else 0xA0
        self.outp(command, 0x0B)
        return bool(self.inp(command) >> (irq & 7) & 1)

    def eoi(self, irq: int) -> None:
        """Specific EOI, to the slave and the cascade if the IRQ is the slave's."""
        if irq >= 8:
            self.outp(0xA0, 0x60 | irq & 7)
            self.outp(0x20, 0x62)
        else:
            self.outp(0x20, 0x60 | irq)

    def config_read(self, devfn: int, offset: int, size: int) -> int:
        """Reads config space by mechanism 1."""
        self.outp(0xCF8, 1 << 31 | devfn << 8 | offset & ~3, 4)
        return self.inp(0xCFC + (offset & 3), size)

    def config_write(self, devfn: int, offset: int, size: int, value: int) -> None:
        """Writes config space by mechanism 1."""
        self.outp(0xCF8, 1 << 31 | devfn << 8 | offset & ~3, 4)
        self.outp(0xCFC + (offset & 3), value, size)

    def halt(self, until: float, take: Callable[[int], None]) -> None:
        """STI, HLT, CLI: waits for interrupts until ``time.monotonic()`` is ``until``; ``take(vector)`` serves
        each one that is pending. Raises PowerOff when the daemon ends."""
        self._wait(0)
        while not self._pic.intr and (remaining := until - time.monotonic()) > 0:
            self._wait(remaining)
        self._serve(take)

    def read_line(self, take: Callable[[int], None]) -> str:
        """The next line from the console, without its end, and cut if it is longer than LINE_MAX + 1.

        Serves interrupts meanwhile, as halt(). Raises PowerOff when the daemon ends.
        """
        line = bytearray()
        while True:
            while not self.inp(_LSR) & _LSR_DATA_READY:
                if not self._serve(take):
                    self._wait(None)
            byte = self.inp(_COM1)
            if byte == ord("\n"):
                return line.decode("ascii", "replace")
            if byte != ord("\r"):
                line.append(byte)
                del line[LINE_MAX + 1 :]

    def write_line(self, text: str) -> None:
        """Prints a line on the console."""
        for byte in (text + "\n").encode("ascii", "replace"):
            self.outp(_COM1, byte)

    def _serve(self, take: Callable[[int], None]) -> bool:
        """Takes the interrupts that are pending; whether there was one."""
        is_served = False
        while self._pic.intr:
            take(self._pic.acknowledge())
            is_served = True
        return is_served

    def _begin_access(self) -> None:
        """Runs the loop if the accesses before took long, as those to a remote that hangs do."""
        now = time.monotonic()
        if now - self._loop_ran_at > _LOOP_MAY_WAIT_SECONDS:
            expires = now + TICK_SECONDS  # time for a call at the control socket, which takes several passes
            while (remaining := expires - time.monotonic()) > 0:
                self._wait(remaining)
        if self._loop.is_stopped:
            raise PowerOff

    def _wait(self, seconds: float | None) -> None:
        self._loop.step(seconds)
        self._loop_ran_at = time.monotonic()
        if self._loop.is_stopped:
            raise PowerOff
