# SPDX-License-Identifier: GPL-2.0-or-later
"""The base address registers of a function whose config space is elsewhere: their sizes, and what they decode.

Sizing follows the PCI Local Bus Specification 3.0, section 6.2.5.1: write all ones, read back, restore.
Decoding is off meanwhile, so that the function answers at no wrong address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from common import pci
from common.errors import ProtocolError
from common.pci import Bar, BarKind

__all__ = ["ROM", "DecodedBar", "Window", "decoded_windows", "size_bars"]

ROM = 6
"""the number that the expansion ROM has among the BARs"""
_MAX_MEMORY = 1 << 40
_MAX_IO = 1 << 16
_ALL_ONES = 0xFFFFFFFF
"""what a failed read returns; a BAR never reads so, since its type bits are fixed"""


class DecodedBar(NamedTuple):
    """A BAR that a function has: where in config space it is, and what it decodes."""

    number: int
    """0 to 5, or ROM"""
    offset: int
    bar: Bar

    @property
    def width(self) -> int:
        """Bytes of config space that it occupies: 4 or 8."""
        return 8 if self.bar.kind is BarKind.MEM64 else 4


class Window(NamedTuple):
    """A range of bus addresses that a function decodes."""

    memory: bool
    """memory, else I/O ports"""
    start: int
    end: int
    """the first address that is not in it"""


def size_bars(read: Callable[[int, int], int], write: Callable[[int, int, int], None]) -> list[DecodedBar]:
    """The BARs and the ROM of a function, by ``read(offset, size)`` and ``write(offset, size, value)``.

    Command register and addresses are as before afterwards. Raises ProtocolError for a register that no real
    device can have: holes in its mask, a 64-bit BAR without room, an absurd size, all ones.
    """
    command = read(pci.PCI_COMMAND, 2)
    write(pci.PCI_COMMAND, 2, command & ~(pci.PCI_COMMAND_IO | pci.PCI_COMMAND_MEMORY))
    found = []
    number = 0
    while number < pci.PCI_NUM_BARS:
        decoded = _size_one(number, read, write)
        if decoded is not None:
            found.append(decoded)
            number += decoded.width // 4 - 1
        number += 1
    name = "the expansion ROM"
    rom = _probe(pci.PCI_ROM_ADDRESS, _ALL_ONES & ~pci.PCI_ROM_ADDRESS_ENABLE, read, write)
    _check_answer(rom, name)
    if rom & pci.PCI_ROM_ADDRESS_MASK:
        size = _size_of_mask(rom & pci.PCI_ROM_ADDRESS_MASK, 32, name)
        found.append(DecodedBar(ROM, pci.PCI_ROM_ADDRESS, Bar(BarKind.MEM32, size)))
    write(pci.PCI_COMMAND, 2, command)
    return found


def decoded_windows(bars: Iterable[DecodedBar], config: bytes | bytearray) -> tuple[Window, ...]:
    """What the BARs decode with these registers (``config``: config space, command register and BARs of it).

    A BAR decodes if the command register enables its space and it isn't 0; the ROM by its own enable bit, too.
    """
    command = config[pci.PCI_COMMAND]
    windows = []
    for decoded in bars:
        raw = int.from_bytes(config[decoded.offset : decoded.offset + decoded.width], "little")
        memory = decoded.bar.kind is not BarKind.IO
        start = raw & ~(decoded.bar.size - 1) & ((1 << 8 * decoded.width) - 1)
        enabled = command & (pci.PCI_COMMAND_MEMORY if memory else pci.PCI_COMMAND_IO)
        if decoded.number == ROM:
            enabled = enabled and raw & pci.PCI_ROM_ADDRESS_ENABLE
        if enabled and start:
            windows.append(Window(memory, start, start + decoded.bar.size))
    return tuple(windows)


def _size_one(
    number: int, read: Callable[[int, int], int], write: Callable[[int, int, int], None]
) -> DecodedBar | None:
    offset = pci.PCI_BASE_ADDRESS_0 + 4 * number
    low = _probe(offset, _ALL_ONES, read, write)
    if low == 0:
        return None
    name = f"BAR {number}"
    _check_answer(low, name)
    if low & pci.PCI_BASE_ADDRESS_SPACE_IO:
        mask = low & pci.PCI_BASE_ADDRESS_IO_MASK
        if 0 < mask < _MAX_IO:  # the upper half may read as zeros: a PC has 16 bits of I/O addresses
            mask |= _ALL_ONES & -_MAX_IO
        size = _size_of_mask(mask, 32, name)
        if size > _MAX_IO:
            raise ProtocolError(f"{name} asks for {size:#x} bytes of I/O")
        return DecodedBar(number, offset, Bar(BarKind.IO, size))
    prefetchable = bool(low & pci.PCI_BASE_ADDRESS_MEM_PREFETCH)
    if low & pci.PCI_BASE_ADDRESS_MEM_TYPE_MASK != pci.PCI_BASE_ADDRESS_MEM_TYPE_64:
        size = _size_of_mask(low & pci.PCI_BASE_ADDRESS_MEM_MASK, 32, name)
        return DecodedBar(number, offset, Bar(BarKind.MEM32, size, prefetchable))
    if number == pci.PCI_NUM_BARS - 1:
        raise ProtocolError(f"{name} is 64 bits wide and has no room for its upper half")
    high = _probe(offset + 4, _ALL_ONES, read, write)
    size = _size_of_mask(high << 32 | low & pci.PCI_BASE_ADDRESS_MEM_MASK, 64, name)
    if size > _MAX_MEMORY:
        raise ProtocolError(f"{name} asks for {size:#x} bytes of memory")
    return DecodedBar(number, offset, Bar(BarKind.MEM64, size, prefetchable))


def _probe(
    offset: int, ones: int, read: Callable[[int, int], int], write: Callable[[int, int, int], None]
) -> int:
    before = read(offset, 4)
    write(offset, 4, ones)
    mask = read(offset, 4)
    write(offset, 4, before)
    return mask


def _check_answer(mask: int, name: str) -> None:
    if mask == _ALL_ONES:
        raise ProtocolError(f"{name} reads as all ones")


def _size_of_mask(mask: int, bits: int, name: str) -> int:
    size = (1 << bits) - mask
    if not mask or size & size - 1:
        raise ProtocolError(f"{name} has the impossible mask {mask:#x}")
    return size
