# SPDX-License-Identifier: GPL-2.0-or-later
"""Functions that remoted serves, and that a proxy must be kept from, or from waiting for."""

from __future__ import annotations

import os
import signal
from typing import ClassVar

from common import pci
from remoted.device import Bar, BarKind, PciFunction
from remoted.devices.edu import REG_IRQ_RAISE, Edu


class _Odd(PciFunction):
    VENDOR_ID = 0x1234
    DEVICE_ID = 0x0DD0


class PinB(_Odd):
    INTERRUPT_PIN = 2


class TwoGigabytes(_Odd):
    """QEMU keeps the size in an int."""

    BARS: ClassVar = {0: Bar(BarKind.MEM32, 1 << 31)}


class HalfDecoded(_Odd):
    """An I/O BAR whose upper half reads as zeros, as the specification allows it."""

    BARS: ClassVar = {0: Bar(BarKind.IO, 64)}

    def config_read(self, addr: int, size: int) -> int:
        value = super().config_read(addr, size)
        return value & 0xFFFF if addr == pci.PCI_BASE_ADDRESS_0 and size == 4 else value


class _SecondClient(_Odd):
    """Does something when it is identified for the second time: proxyd looks before QEMU does."""

    _identified = 0

    def config_read(self, addr: int, size: int) -> int:
        if addr == pci.PCI_VENDOR_ID:
            self._identified += 1
            if self._identified == 2:
                self.turn_bad()
        return super().config_read(addr, size)

    def turn_bad(self) -> None: ...


class Dies(_SecondClient):
    def turn_bad(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Hangs(_SecondClient):
    def turn_bad(self) -> None:
        signal.pause()


class HangsWithItsLineHigh(Edu):
    """Stops the whole daemon, once, between its tenth interrupt and the answer to the access that raised it."""

    _raised = 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        super().bar_write(bar, offset, size, value)
        if offset == REG_IRQ_RAISE:
            self._raised += 1
            if self._raised == 10:
                os.kill(os.getpid(), signal.SIGSTOP)


class Huge(_Odd):
    """BARs of which some fit nowhere below 4 GiB, and no interrupt."""

    INTERRUPT_PIN = 0
    BARS: ClassVar = {
        0: Bar(BarKind.MEM64, 1 << 33),
        2: Bar(BarKind.MEM32, 1 << 29),
        3: Bar(BarKind.IO, 1 << 13),
        4: Bar(BarKind.MEM32, 4096),
    }
