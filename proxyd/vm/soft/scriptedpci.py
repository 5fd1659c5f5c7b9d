# SPDX-License-Identifier: GPL-2.0-or-later
"""The scripted guest's view of the PCI bus: what guest/pci.c and guest/access.c do, in Python."""

from __future__ import annotations

from collections.abc import Iterator

from common import pci
from common.pci import format_devfn, parse_devfn
from proxyd.vm.soft.machine import SoftMachine
from proxyd.vm.soft.scriptedparse import CommandError, parse_address, parse_number, parse_width

__all__ = ["RUNNING", "Accesses", "Windows", "functions", "is_asserting", "is_device", "pirq_of"]

RUNNING = pci.PCI_COMMAND_IO | pci.PCI_COMMAND_MEMORY

_DEVFNS = 256
_NO_VENDOR = 0xFFFF
_ROUTER = parse_devfn("01.0")
_CLASS_BASE = 0x0B
_BRIDGE = 0x06

_IO = range(0xD000, 0xE000)
_MEMORY = range(0xE0000000, 0xF0000000)
_IO_ROOM, _MEMORY_ROOM = 0x20, 0x1000


def functions(machine: SoftMachine) -> Iterator[int]:
    """The devfns of bus 0 that answer; a slot without a multi-function device has function 0 only."""
    single = -1
    for devfn in range(_DEVFNS):
        if devfn >> 3 == single:
            continue
        if devfn & 7 == 1:
            header = machine.config_read(devfn - 1, pci.PCI_HEADER_TYPE, 1)
            if header == 0xFF or not header & pci.PCI_HEADER_TYPE_MULTIFUNCTION:
                single = devfn >> 3
                continue
        if machine.config_read(devfn, pci.PCI_VENDOR_ID, 2) != _NO_VENDOR:
            yield devfn


def is_device(machine: SoftMachine, devfn: int) -> bool:
    """Whether the function isn't one of the chipset, which has its addresses."""
    return (
        devfn >> 3 != _ROUTER >> 3
        and machine.config_read(devfn, pci.PCI_HEADER_TYPE, 1) & ~pci.PCI_HEADER_TYPE_MULTIFUNCTION == 0
        and machine.config_read(devfn, _CLASS_BASE, 1) != _BRIDGE
    )


def is_asserting(machine: SoftMachine, devfn: int) -> bool:
    """The status register's interrupt bit, which INTX_DISABLE does not hide; False for all ones."""
    status = machine.config_read(devfn, pci.PCI_STATUS, 2)
    return status != 0xFFFF and bool(status & pci.PCI_STATUS_INTERRUPT)


def pirq_of(devfn: int, pin: int) -> int:
    """The PIRQ, 0 to 3, that a pin of 1 to 4 is wired to."""
    return (devfn >> 3) - 1 + pin - 1 & 3


class Windows:
    """The addresses that BARs are given, in the order in which they ask."""

    def __init__(self) -> None:
        self._io, self._memory = _IO.start, _MEMORY.start

    def place(self, machine: SoftMachine, devfn: int) -> tuple[dict[str, int], bool]:
        """Sizes every BAR and gives each its place: ``memoryN`` or ``ioN``, N being its number, and the address.

        Decoding is off afterwards. The second is False if one fits no window; it stays at 0.
        """
        command = machine.config_read(devfn, pci.PCI_COMMAND, 2)
        machine.config_write(devfn, pci.PCI_COMMAND, 2, command & ~RUNNING)
        placed: dict[str, int] = {}
        is_complete = True
        number = 0
        while number < pci.PCI_NUM_BARS:
            offset = pci.PCI_BASE_ADDRESS_0 + 4 * number
            machine.config_write(devfn, offset, 4, 0xFFFFFFFF)
            mask = machine.config_read(devfn, offset, 4)
            if mask:
                is_io = bool(mask & pci.PCI_BASE_ADDRESS_SPACE_IO)
                address = self._take(mask)
                machine.config_write(devfn, offset, 4, address)
                if address:
                    placed[f"{'io' if is_io else 'memory'}{number}"] = address
                else:
                    is_complete = False
                if not is_io and mask & pci.PCI_BASE_ADDRESS_MEM_TYPE_64 and number + 1 < pci.PCI_NUM_BARS:
                    number += 1
                    machine.config_write(devfn, offset + 4, 4, 0)
            number += 1
        return placed, is_complete

    def _take(self, mask: int) -> int:
        """An address for a BAR, 0 if there is none."""
        if mask & pci.PCI_BASE_ADDRESS_SPACE_IO:
            size = -((mask | 0xFFFF0000) & pci.PCI_BASE_ADDRESS_IO_MASK) & 0xFFFFFFFF
            window, room, following = _IO, _IO_ROOM, self._io
        else:
            size = -(mask & pci.PCI_BASE_ADDRESS_MEM_MASK) & 0xFFFFFFFF
            window, room, following = _MEMORY, _MEMORY_ROOM, self._memory
        if not size:
            return 0
        size = max(size, room)
        start = following + size - 1 & -size
        if start + size > window.stop:
            return 0
        if mask & pci.PCI_BASE_ADDRESS_SPACE_IO:
            self._io = start + size
        else:
            self._memory = start + size
        return start


class Accesses:
    """The commands for single accesses, and the listing of the bus. Each returns what follows ``ok``."""

    def __init__(self, machine: SoftMachine) -> None:
        self._machine = machine

    def read_port(self, words: list[str]) -> str:
        """in WIDTH PORT"""
        size = parse_width(words[0])
        return _value(self._machine.inp(parse_number(words[1], 0xFFFF), size))

    def write_port(self, words: list[str]) -> str:
        """out WIDTH PORT VALUE"""
        size = parse_width(words[0])
        port = parse_number(words[1], 0xFFFF)
        self._machine.outp(port, parse_number(words[2], _ones(size)), size)
        return ""

    def read_memory(self, words: list[str]) -> str:
        """read WIDTH ADDRESS"""
        size = parse_width(words[0])
        return _value(self._machine.mmio_read(parse_number(words[1]), size))

    def write_memory(self, words: list[str]) -> str:
        """write WIDTH ADDRESS VALUE"""
        size = parse_width(words[0])
        address = parse_number(words[1])
        self._machine.mmio_write(address, size, parse_number(words[2], _ones(size)))
        return ""

    def config(self, words: list[str]) -> str:
        """config read WIDTH ADDR OFFSET, config write WIDTH ADDR OFFSET VALUE"""
        if words[0] not in ("read", "write"):
            raise CommandError("read or write")
        if len(words) != (5 if words[0] == "write" else 4):
            raise CommandError("wrong number of arguments")
        size = parse_width(words[1])
        devfn = parse_address(words[2])
        offset = parse_number(words[3], 0xFF)
        if (offset & 3) + size > 4:
            raise CommandError("the access crosses a doubleword")
        if words[0] == "read":
            return _value(self._machine.config_read(devfn, offset, size))
        self._machine.config_write(devfn, offset, size, parse_number(words[4], _ones(size)))
        return ""

    def list_functions(self, _words: list[str]) -> str:
        """lspci"""
        count = 0
        for devfn in functions(self._machine):
            ids = self._machine.config_read(devfn, pci.PCI_VENDOR_ID, 4)
            revision = self._machine.config_read(devfn, pci.PCI_REVISION_ID, 4)
            pin = self._machine.config_read(devfn, pci.PCI_INTERRUPT_PIN, 1)
            line = self._machine.config_read(devfn, pci.PCI_INTERRUPT_LINE, 1)
            self._machine.write_line(
                f"* pci addr={format_devfn(devfn)} id={ids & 0xFFFF:04x}:{ids >> 16:04x} "
                f"class={revision >> 8:#x} revision={revision & 0xFF:#x} pin={pin} line={line}"
            )
            count += 1
        return f"count={count}"


def _ones(size: int) -> int:
    return (1 << 8 * size) - 1


def _value(value: int) -> str:
    return f"value={value:#x}"
