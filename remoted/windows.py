# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a function decodes its BARs, as its config space says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from common import pci
from common.pci import Bar, BarKind

__all__ = ["Area", "Window", "decode", "is_cut", "without_areas"]

_MEM64_END = (1 << 64) - 1
_MEM32_END = (1 << 32) - 1


class Window:
    """Where a BAR is decoded at present: from ``start`` to before ``end``."""

    __slots__ = ("bar", "base", "end", "memory", "start")

    def __init__(self, memory: bool, start: int, end: int, bar: int, base: int) -> None:
        """``base`` is the address of the BAR's offset 0; the window may be a part of the BAR."""
        self.memory = memory
        self.start = start
        self.end = end
        self.bar = bar
        self.base = base


class Area(Protocol):
    """A part of a memory BAR that the base class serves, not the device's code: its offsets within the BAR."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    def read(self, offset: int, size: int) -> int:
        """The value of an access that lies within the area; the offset is that in the BAR."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """As read()."""
        ...


def decode(config: bytearray, bars: Mapping[int, Bar]) -> list[Window]:
    """The windows that the command register and the BARs of a config space open.

    As pci_bar_address() in QEMU's hw/pci/pci.c: at 0, or as sizing leaves it, a BAR is not decoded.
    """
    command = config[pci.PCI_COMMAND]
    windows = []
    for number, bar in bars.items():
        memory = bar.kind is not BarKind.IO
        if not command & (pci.PCI_COMMAND_MEMORY if memory else pci.PCI_COMMAND_IO):
            continue
        is_wide = bar.kind is BarKind.MEM64
        offset = pci.PCI_BASE_ADDRESS_0 + 4 * number
        start = int.from_bytes(config[offset : offset + (8 if is_wide else 4)], "little") & ~(bar.size - 1)
        end = start + bar.size
        if start and end <= (_MEM64_END if is_wide else _MEM32_END):
            windows.append(Window(memory, start, end, number, start))
    return windows


def without_areas(windows: Sequence[Window], areas: Mapping[int, Sequence[Area]]) -> Iterator[Window]:
    """The parts of the windows that the device's code serves; the areas of each BAR are in order of offset."""
    for window in windows:
        start = window.base
        for area in areas.get(window.bar, ()):
            if window.base + area.start > start:
                yield Window(window.memory, start, window.base + area.start, window.bar, window.base)
            start = window.base + area.end
        if start < window.end:
            yield Window(window.memory, start, window.end, window.bar, window.base)


def is_cut(windows: Sequence[Window], addr: int, size: int) -> bool:
    """Whether an I/O access lies within a BAR with one part and outside with another.

    A host bridge splits it (PCI Local Bus 3.0, 3.2.2.1, and no BAR ends within a dword). The function decodes its
    own part only; the other part is read as all ones.
    """
    return any(
        not window.memory
        and window.start < addr + size
        and addr < window.end
        and not window.start <= addr <= addr + size <= window.end
        for window in windows
    )
