# SPDX-License-Identifier: GPL-2.0-or-later
"""BAR sizing, on a config space that answers as a function's registers would."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from common import pci
from common.errors import ProtocolError
from common.pci import Bar, BarKind
from proxyd.pci.bars import ROM, DecodedBar, Window, decoded_windows, size_bars

COMMAND = pci.PCI_COMMAND_IO | pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER | pci.PCI_COMMAND_INTX_DISABLE
ADDRESSES = 0xA5A5_5A5A
"""what the address bits hold before, as far as they can be written"""
GiB = 1 << 30


class Register(NamedTuple):
    """A base address register: the bits that can be written, and the ones that are fixed."""

    writable: int
    fixed: int = 0


NOTHING = Register(0)


class Function:
    """Six BARs and the ROM's; notes every write while an address was decoded."""

    def __init__(self, registers: dict[int, Register]) -> None:
        """``registers`` by offset."""
        self._registers = registers
        self.values = {
            offset: ADDRESSES & known.writable | known.fixed for offset, known in registers.items()
        }
        self.command = COMMAND
        self.probed_while_decoding: list[int] = []

    def read(self, offset: int, size: int) -> int:
        if offset == pci.PCI_COMMAND:
            assert size == 2
            return self.command
        assert size == 4
        return self.values.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == pci.PCI_COMMAND:
            assert size == 2
            self.command = value
            return
        assert size == 4
        if self.command & (pci.PCI_COMMAND_IO | pci.PCI_COMMAND_MEMORY):
            self.probed_while_decoding.append(offset)
        register = self._registers.get(offset, NOTHING)
        self.values[offset] = value & register.writable | register.fixed


def bar(number: int) -> int:
    return pci.PCI_BASE_ADDRESS_0 + 4 * number


def probe(registers: dict[int, Register]) -> list[DecodedBar]:
    """Sizes them, and checks that the function has come to no harm."""
    function = Function(registers)
    before = dict(function.values)
    found = size_bars(function.read, function.write)
    assert function.probed_while_decoding == []
    assert {offset: function.values[offset] for offset in before} == before
    assert not any(value for offset, value in function.values.items() if offset not in before)
    assert function.command == COMMAND
    return found


IO = pci.PCI_BASE_ADDRESS_SPACE_IO
MEM64 = pci.PCI_BASE_ADDRESS_MEM_TYPE_64
PREFETCH = pci.PCI_BASE_ADDRESS_MEM_PREFETCH

BARS = {
    "nothing": ({}, []),
    "I/O 4": ({bar(0): Register(0xFFFFFFFC, IO)}, [(0, bar(0), Bar(BarKind.IO, 4))]),
    "I/O 8": ({bar(0): Register(0xFFFFFFF8, IO)}, [(0, bar(0), Bar(BarKind.IO, 8))]),
    "I/O 16": ({bar(1): Register(0xFFFFFFF0, IO)}, [(1, bar(1), Bar(BarKind.IO, 16))]),
    "I/O 256": ({bar(5): Register(0xFFFFFF00, IO)}, [(5, bar(5), Bar(BarKind.IO, 256))]),
    "I/O 256, upper half zero": (
        {bar(0): Register(0x0000FF00, IO)},
        [(0, bar(0), Bar(BarKind.IO, 256))],
    ),
    "I/O 64 KiB, all there is": ({bar(0): Register(0xFFFF0000, IO)}, [(0, bar(0), Bar(BarKind.IO, 1 << 16))]),
    "memory 16": ({bar(0): Register(0xFFFFFFF0)}, [(0, bar(0), Bar(BarKind.MEM32, 16))]),
    "memory 4 KiB, prefetchable": (
        {bar(2): Register(0xFFFFF000, PREFETCH)},
        [(2, bar(2), Bar(BarKind.MEM32, 4096, prefetchable=True))],
    ),
    "memory below 1 MiB": ({bar(0): Register(0xFFFFF000, 0x2)}, [(0, bar(0), Bar(BarKind.MEM32, 4096))]),
    "memory 2 GiB": ({bar(0): Register(0x80000000)}, [(0, bar(0), Bar(BarKind.MEM32, 2 * GiB))]),
    "64-bit 4 KiB": (
        {bar(0): Register(0xFFFFF000, MEM64), bar(1): Register(0xFFFFFFFF)},
        [(0, bar(0), Bar(BarKind.MEM64, 4096))],
    ),
    "64-bit 4 GiB": (
        {bar(0): Register(0, MEM64), bar(1): Register(0xFFFFFFFF)},
        [(0, bar(0), Bar(BarKind.MEM64, 4 * GiB))],
    ),
    "64-bit 8 GiB, prefetchable, in the last two": (
        {bar(4): Register(0, MEM64 | PREFETCH), bar(5): Register(0xFFFFFFFE)},
        [(4, bar(4), Bar(BarKind.MEM64, 8 * GiB, prefetchable=True))],
    ),
    "ROM 2 KiB": (
        {pci.PCI_ROM_ADDRESS: Register(0xFFFFF801)},
        [(ROM, pci.PCI_ROM_ADDRESS, Bar(BarKind.MEM32, 2048))],
    ),
    "one after a 64-bit one": (
        {
            bar(0): Register(0xFFFF0000, MEM64),
            bar(1): Register(0xFFFFFFFF),
            bar(2): Register(0xFFFFFFE0, IO),
            pci.PCI_ROM_ADDRESS: Register(0xFFFF0001),
        },
        [
            (0, bar(0), Bar(BarKind.MEM64, 1 << 16)),
            (2, bar(2), Bar(BarKind.IO, 32)),
            (ROM, pci.PCI_ROM_ADDRESS, Bar(BarKind.MEM32, 1 << 16)),
        ],
    ),
}


@pytest.mark.parametrize(("registers", "found"), BARS.values(), ids=BARS)
def test_a_bar_is_what_its_mask_says(
    registers: dict[int, Register], found: list[tuple[int, int, Bar]]
) -> None:
    assert probe(registers) == [DecodedBar(*expected) for expected in found]


IMPOSSIBLE = {
    "I/O with a hole": ({bar(0): Register(0xFFFFF0F0, IO)}, "BAR 0 has the impossible mask"),
    "I/O of nothing writable": ({bar(1): Register(0, IO)}, "BAR 1 has the impossible mask"),
    "I/O of 16 MiB": ({bar(0): Register(0xFF000000, IO)}, "BAR 0 asks for 0x1000000 bytes of I/O"),
    "memory with a hole": ({bar(2): Register(0xF0FFF000)}, "BAR 2 has the impossible mask"),
    "memory without high bits": ({bar(0): Register(0x0FFFF000)}, "BAR 0 has the impossible mask"),
    "prefetchable nothing": ({bar(0): Register(0, PREFETCH)}, "BAR 0 has the impossible mask"),
    "64-bit at BAR 5": (
        {bar(5): Register(0xFFFFF000, MEM64)},
        "BAR 5 is 64 bits wide and has no room",
    ),
    "64-bit with a hole": (
        {bar(0): Register(0xFFFFF000, MEM64), bar(1): Register(0xFFFF0FFF)},
        "BAR 0 has the impossible mask",
    ),
    "64-bit of nothing writable": ({bar(0): Register(0, MEM64)}, "BAR 0 has the impossible mask"),
    "64-bit of 2 TiB": (
        {bar(0): Register(0, MEM64), bar(1): Register(0xFFFFFE00)},
        "BAR 0 asks for 0x20000000000 bytes of memory",
    ),
    "ROM with a hole": (
        {pci.PCI_ROM_ADDRESS: Register(0xFF0FF801)},
        "the expansion ROM has the impossible mask",
    ),
    "all ones, as an error is": ({bar(0): Register(0, 0xFFFFFFFF)}, "BAR 0 reads as all ones"),
    "a ROM of all ones": (
        {pci.PCI_ROM_ADDRESS: Register(0, 0xFFFFFFFF)},
        "the expansion ROM reads as all ones",
    ),
}


@pytest.mark.parametrize(("registers", "line"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_bar_is_refused(registers: dict[int, Register], line: str) -> None:
    with pytest.raises(ProtocolError, match=line):
        probe(registers)


IO_BAR, MEMORY_BAR, LONG_BAR = (
    DecodedBar(0, 0x10, Bar(BarKind.IO, 32)),
    DecodedBar(1, 0x14, Bar(BarKind.MEM32, 4096)),
    DecodedBar(2, 0x18, Bar(BarKind.MEM64, 1 << 16, True)),
)
EXPANSION_ROM = DecodedBar(ROM, 0x30, Bar(BarKind.MEM32, 2048))
IO_ON, MEMORY_ON = pci.PCI_COMMAND_IO, pci.PCI_COMMAND_MEMORY


@pytest.mark.parametrize(
    ("bar", "command", "register", "window"),
    [
        (IO_BAR, IO_ON, 0xC021, Window(False, 0xC020, 0xC040)),
        (IO_BAR, MEMORY_ON, 0xC021, None),
        (IO_BAR, IO_ON, 0x0001, None),
        (MEMORY_BAR, MEMORY_ON, 0xE0000000, Window(True, 0xE0000000, 0xE0001000)),
        (MEMORY_BAR, IO_ON, 0xE0000000, None),
        (MEMORY_BAR, MEMORY_ON, 0, None),
        (LONG_BAR, MEMORY_ON, 0x12_8000000C, Window(True, 0x12_80000000, 0x12_80010000)),
        (LONG_BAR, 0, 0x12_8000000C, None),
        (EXPANSION_ROM, MEMORY_ON, 0xE0000001, Window(True, 0xE0000000, 0xE0000800)),
        (EXPANSION_ROM, MEMORY_ON, 0xE0000000, None),
        (EXPANSION_ROM, IO_ON, 0xE0000001, None),
    ],
)
def test_a_bar_decodes_where_it_is_placed_and_while_it_is_enabled(
    bar: DecodedBar, command: int, register: int, window: Window | None
) -> None:
    config = bytearray(pci.PCI_CONFIG_SIZE)
    config[pci.PCI_COMMAND] = command
    config[bar.offset : bar.offset + bar.width] = register.to_bytes(bar.width, "little")
    assert decoded_windows([bar], config) == (() if window is None else (window,))
