# SPDX-License-Identifier: GPL-2.0-or-later
"""The scripted guest's drivers: the accesses of guest/drivers.c."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from proxyd.vm.soft.machine import SoftMachine

__all__ = ["DRIVERS", "Driver"]

_COOKIE = 0x1A6E57D3


class Driver(ABC):
    """One function's driver; ``base`` is the address of its BAR 0."""

    name: ClassVar[str]
    """vendor and device id"""
    model: ClassVar[str]

    def __init__(self, machine: SoftMachine, base: int) -> None:
        self._machine = machine
        self.base = base

    @abstractmethod
    def init(self) -> None:
        """Quiet, and with the cookie by which a later reset can be told."""

    @abstractmethod
    def is_alive(self) -> bool:
        """Whether the cookie is still there."""

    @abstractmethod
    def raise_line(self) -> None:
        """Makes the device assert its line."""

    @abstractmethod
    def claim(self) -> bool:
        """Acknowledges at the device; whether it had asserted."""


class _Edu(Driver):
    name = "1234:11e8"
    model = "edu"

    def init(self) -> None:
        self._machine.mmio_write(self.base + 0x20, 4, 0)
        self.claim()
        self._machine.mmio_write(self.base + 0x04, 4, _COOKIE)

    def is_alive(self) -> bool:
        return self._machine.mmio_read(self.base + 0x04, 4) == _COOKIE ^ 0xFFFFFFFF

    def raise_line(self) -> None:
        self._machine.mmio_write(self.base + 0x60, 4, 1)

    def claim(self) -> bool:
        status = self._machine.mmio_read(self.base + 0x24, 4)
        if status in (0, 0xFFFFFFFF):
            return False
        self._machine.mmio_write(self.base + 0x64, 4, status)
        return True


class _Serial(Driver):
    name = "1b36:0002"
    model = "pci-serial"

    def init(self) -> None:
        for register, value in ((3, 0x03), (1, 0x00), (4, 0x00)):
            self._machine.outp(self.base + register, value)
        self._machine.inp(self.base + 2)
        self._machine.outp(self.base + 7, _COOKIE & 0xFF)

    def is_alive(self) -> bool:
        return self._machine.inp(self.base + 7) == _COOKIE & 0xFF

    def raise_line(self) -> None:
        self._machine.outp(self.base + 1, 0x02)

    def claim(self) -> bool:
        if self._machine.inp(self.base + 2) & 0x01:
            return False
        self._machine.outp(self.base + 1, 0x00)
        return True


DRIVERS: dict[int, type[Driver]] = {0x11E81234: _Edu, 0x00021B36: _Serial}
"""by device and vendor id, as the first doubleword of config space has them"""
