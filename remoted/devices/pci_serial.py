# SPDX-License-Identifier: GPL-2.0-or-later
"""pci-serial: a 16550A behind one I/O BAR, as QEMU's hw/char/serial-pci.c."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from common.chardev import open_chardev
from common.serial_reg import UART_MSR_CTS, UART_MSR_DCD, UART_MSR_DSR
from common.uart import Uart16550
from remoted.device import Bar, BarKind, Host, Option, PciFunction

__all__ = ["PciSerial"]


class PciSerial(PciFunction):
    """A 16550A UART behind one I/O BAR, as QEMU's pci-serial.

    ``chardev`` is its far end: null (the default), pty, file:PATH or unix:PATH. With ``carrier=on`` the modem
    inputs DCD and DSR are on while a user is connected; otherwise, as in QEMU, they are always on.
    """

    VENDOR_ID = 0x1B36
    DEVICE_ID = 0x0002
    REVISION = 1
    CLASS_CODE = 0x070002
    BARS: ClassVar = {0: Bar(BarKind.IO, 8)}
    OPTIONS = (
        Option("chardev", str, "null", "its other end: null, pty, file:PATH or unix:PATH"),
        Option("carrier", bool, False, "whether DCD and DSR are on only while a user is connected"),
    )

    PARTS = ("_uart", "_uart.modem", "_chardev.arrivals")

    def __init__(self, host: Host, options: Mapping[str, str]) -> None:
        """Opens the chardev. Raises UsageError."""
        super().__init__(host, options)
        self._carrier = self.options["carrier"]
        self._in_access = False
        self._uart = Uart16550(self._on_irq, self._transmit, host.loop.call_later, self._input_ready)
        self._chardev = open_chardev(
            self.options["chardev"], host.loop, host.log, self._uart, self._on_connected, host.files
        )
        self.amiss.add(self._chardev.amiss)
        self._on_connected(self._chardev.connected)

    @property
    def counters(self) -> Mapping[str, int]:
        chardev = self._chardev
        return {"dropped_output": chardev.dropped_output, "dropped_input": chardev.dropped_input}

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        uart = self._uart
        self._in_access = True
        try:
            if size == 1:
                return uart.read(offset)
            return int.from_bytes([uart.read(offset + i) for i in range(size)], "little")
        finally:
            self._in_access = False
            self.set_intx(uart.irq)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        uart = self._uart
        self._in_access = True
        try:
            if size == 1:
                uart.write(offset, value)
            else:
                for i in range(size):
                    uart.write(offset + i, value >> 8 * i)
        finally:
            self._in_access = False
            self.set_intx(uart.irq)

    def reset(self) -> None:
        self._uart.reset()

    def restored(self) -> None:
        self._chardev.restored()
        self._uart.restored()
        self._on_connected(self._chardev.connected)

    def close(self) -> None:
        self._chardev.close()

    def _on_irq(self, level: bool) -> None:
        # A write to THR takes INTR down and up again. On a level-triggered line that is only one more irqfd
        # write, and if KVM carries that out after the guest's EOI, a spurious interrupt.
        if not self._in_access:
            self.set_intx(level)

    def _transmit(self, byte: int) -> bool:
        return self._chardev.write(bytes((byte,))) > 0

    def _input_ready(self) -> None:
        self._chardev.resume()

    def _on_connected(self, connected: bool) -> None:
        if self._carrier:
            lines = UART_MSR_DCD | UART_MSR_DSR if connected else 0
            self._uart.set_modem_lines(UART_MSR_CTS | lines)
