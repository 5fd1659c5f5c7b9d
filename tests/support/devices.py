# SPDX-License-Identifier: GPL-2.0-or-later
"""One function on a real loop, without hub and session: the test is the bus and watches the line."""

from __future__ import annotations

import logging
from typing import Generic, TypeVar

from common import pci
from common.loop import Loop
from remoted.device import Bar, BarKind, PciFunction
from remoted.host import Host
from remoted.memory import GuestMemory
from remoted.msi import VectorPort

F = TypeVar("F", bound=PciFunction)

BAR_STRIDE = 1 << 24


class FunctionBench(Generic[F]):
    """The function, powered on, with I/O and memory enabled and its BARs placed."""

    def __init__(
        self, model: type[F], loop: Loop, vectors: VectorPort | None = None, /, **properties: str
    ) -> None:
        """Raises what the model raises."""
        self.lines: list[bool] = []
        log = logging.getLogger("test.device")
        self.function = model(
            Host("dev0", loop, log, GuestMemory(), self.lines.append, vectors=vectors), properties
        )
        self.function.full_reset()
        self.place_bars()

    def place_bars(self) -> None:
        """Gives each BAR an address and enables the decoders."""
        for number in self.function.BARS:
            self.function.config_write(pci.PCI_BASE_ADDRESS_0 + 4 * number, 4, self._base(number))
        self.function.config_write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_IO | pci.PCI_COMMAND_MEMORY)

    @property
    def line(self) -> bool:
        """The level that has reached the hub."""
        return bool(self.lines) and self.lines[-1]

    def read(self, offset: int, size: int, bar: int = 0) -> int:
        """A bus read within a BAR."""
        return self.function.bus_read(self._is_memory(bar), self._base(bar) + offset, size)

    def write(self, offset: int, size: int, value: int, bar: int = 0) -> None:
        """A bus write within a BAR."""
        assert self.function.bus_write(self._is_memory(bar), self._base(bar) + offset, size, value)

    def _base(self, bar: int) -> int:
        return BAR_STRIDE * (bar + 1) if self._is_memory(bar) else 0x1000 * (bar + 1)

    def _is_memory(self, bar: int) -> bool:
        description: Bar = self.function.BARS[bar]
        return description.kind is not BarKind.IO
