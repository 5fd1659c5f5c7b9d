# SPDX-License-Identifier: GPL-2.0-or-later
"""The PCI function: config space, BARs, INTx. What device authors subclass.

A subclass declares its identity and BARs as class attributes, and overrides reset(), bar_read() and
bar_write(); it drives its line by set_intx(). Everything else is here: write masks and reset values of the
config space as QEMU's hw/pci/pci.c has them, the decoding of BAR addresses, the interrupt status bit, and
INTX_DISABLE. The line that reaches the IOHub is a boolean, ``level and not INTX_DISABLE``: QEMU's remote
counts calls instead, and a line that counts wrong storms or loses interrupts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from common import pci
from common.amiss import Amiss
from common.errors import UsageError
from common.pci import Bar, BarKind
from remoted.host import DEVICE_ERRORS, Failures, Host

__all__ = ["PciFunction"]

ALL_ONES = 0xFFFFFFFFFFFFFFFF
_BAR_SIZES = {BarKind.IO: (4, 1 << 16), BarKind.MEM32: (16, 1 << 31), BarKind.MEM64: (16, 1 << 63)}
"""the smallest and the largest; a PC has 16 bits of I/O addresses"""
_NUMBERS = (
    ("VENDOR_ID", 16),
    ("DEVICE_ID", 16),
    ("REVISION", 8),
    ("CLASS_CODE", 24),
    ("SUBSYSTEM_VENDOR_ID", 16),
    ("SUBSYSTEM_ID", 16),
)
"""class attributes that config space shows, and their bits"""
_ACCESS_SIZES = frozenset((1, 2, 4, 8))
_BARS_END = pci.PCI_BASE_ADDRESS_0 + 4 * pci.PCI_NUM_BARS


@dataclass(slots=True)
class _Window:
    """Where a BAR is decoded at present."""

    memory: bool
    start: int
    end: int
    bar: int


class PciFunction:
    """One PCI function of header type 0.

    A subclass may raise from any of the methods it overrides: the request is answered with all ones, the error
    is logged, and the daemon goes on.
    """

    VENDOR_ID: ClassVar[int]
    DEVICE_ID: ClassVar[int]
    REVISION: ClassVar[int] = 0
    CLASS_CODE: ClassVar[int] = 0xFF0000
    """class, subclass and programming interface, 24 bits"""
    SUBSYSTEM_VENDOR_ID: ClassVar[int] = 0x1AF4
    SUBSYSTEM_ID: ClassVar[int] = 0x1100
    INTERRUPT_PIN: ClassVar[int] = 1
    """0: none, 1 to 4: INTA to INTD"""
    BARS: ClassVar[Mapping[int, Bar]] = {}
    """by BAR number, 0 to 5; one of kind MEM64 occupies the next number too"""
    REGISTERS: ClassVar[Mapping[int, Mapping[int, str]]] = {}
    """names by BAR number and offset, for those who read the log; a register need not have one"""
    PROPERTIES: ClassVar[frozenset[str]] = frozenset()
    """names of the options that the model takes besides those of every device"""
    IS_DRIVABLE: ClassVar[bool] = False
    """whether an operator may raise and lower the INTx line at the control socket"""

    def __init__(self, host: Host, properties: Mapping[str, str]) -> None:
        """``properties`` holds a text for those of PROPERTIES that were given. Raises UsageError."""
        self.host = host
        self.properties = properties
        self.amiss = Amiss()
        """what an operator is to be told of this function"""
        self._level = False
        self._asserted = False
        self._windows: list[_Window] = []
        self._failures = Failures(host.log)
        self._check_declaration()
        self._names = {
            (bar, offset): name for bar, names in self.REGISTERS.items() for offset, name in names.items()
        }
        self._config = bytearray(pci.PCI_CONFIG_SIZE)
        self._wmask = bytearray(pci.PCI_CONFIG_SIZE)
        self._init_config()

    def reset(self) -> None:
        """Sets the device's registers to their power-on values. The line is low already."""

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """The little-endian value of ``size`` (1, 2, 4 or 8) bytes at an offset that lies within the BAR."""
        raise LookupError(f"no register at offset {offset:#x} of BAR {bar}")

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Writes ``size`` (1, 2, 4 or 8) bytes at an offset that lies within the BAR."""
        raise LookupError(f"no register at offset {offset:#x} of BAR {bar}")

    def close(self) -> None:
        """Releases what the device opened. Called once, at the end of the daemon."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What the model counts by itself, by name, for the status."""
        return {}

    def set_intx(self, level: bool) -> None:
        """Drives the INTx line; setting the level that it has does nothing."""
        level = bool(level)
        if level is not self._level:
            self._level = level
            if level:
                self._config[pci.PCI_STATUS] |= pci.PCI_STATUS_INTERRUPT
            else:
                self._config[pci.PCI_STATUS] &= ~pci.PCI_STATUS_INTERRUPT
            self._update_line()

    @property
    def intx_level(self) -> bool:
        """The level that the device drives, whatever INTX_DISABLE says; status bit 3."""
        return self._level

    def full_reset(self) -> bool:
        """What a conventional reset does: lowers the line, config space to power-on values, then reset().

        False when the device's own reset() failed. The order is that of pci_do_device_reset() in QEMU's
        hw/pci/pci.c; device-specific config space (0x40 and up) is left alone there too.
        """
        self.set_intx(False)
        for start, length in (
            (pci.PCI_COMMAND, 2),
            (pci.PCI_CACHE_LINE_SIZE, 1),
            (pci.PCI_BASE_ADDRESS_0, 4 * pci.PCI_NUM_BARS),
            (pci.PCI_INTERRUPT_LINE, 1),
        ):
            for offset in range(start, start + length):
                self._config[offset] &= ~self._wmask[offset]
        self._config_changed()
        try:
            self.reset()
        except DEVICE_ERRORS:
            self._failures.report("reset")
            return False
        return True

    def set_multifunction(self) -> None:
        """Tells guests that the slot has other functions (PCI Local Bus 3.0, 6.2.1); for each of them."""
        self._config[pci.PCI_HEADER_TYPE] |= pci.PCI_HEADER_TYPE_MULTIFUNCTION

    def config_read(self, addr: int, size: int) -> int:
        """``size`` (1, 2 or 4) bytes of config space; all ones when they don't lie within its 256 bytes."""
        if size not in (1, 2, 4) or addr + size > pci.PCI_CONFIG_SIZE:
            return ALL_ONES
        return int.from_bytes(self._config[addr : addr + size], "little")

    def config_write(self, addr: int, size: int, value: int) -> bool:
        """Writes ``size`` (1, 2 or 4) bytes of config space through its write masks; False out of range."""
        if size not in (1, 2, 4) or addr + size > pci.PCI_CONFIG_SIZE:
            return False
        config, wmask = self._config, self._wmask
        for offset in range(addr, addr + size):
            byte = value & 0xFF
            mask = wmask[offset]
            config[offset] = config[offset] & ~mask | byte & mask
            value >>= 8
        if addr < _BARS_END and addr + size > pci.PCI_COMMAND:
            self._config_changed()
        return True

    def bus_read(self, memory: bool, addr: int, size: int) -> int:
        """Reads at a bus address; all ones where the function decodes nothing."""
        for window in self._windows:
            if window.start <= addr < window.end and window.memory is memory:
                if size in _ACCESS_SIZES and addr + size <= window.end:
                    offset = addr - window.start
                    try:
                        return self.bar_read(window.bar, offset, size) & ((1 << 8 * size) - 1)
                    except DEVICE_ERRORS:
                        self._failures.report(f"reading {size} bytes at {self._place(window.bar, offset)}")
                        return ALL_ONES
                break
        if self._is_cut(memory, addr, size):
            half = size // 2
            ones = (1 << 8 * half) - 1
            low, high = (self.bus_read(memory, part, half) & ones for part in (addr, addr + half))
            return high << 8 * half | low
        return ALL_ONES

    def bus_write(self, memory: bool, addr: int, size: int, value: int) -> bool:
        """Writes at a bus address; False where the function decodes nothing."""
        for window in self._windows:
            if window.start <= addr < window.end and window.memory is memory:
                if size in _ACCESS_SIZES and addr + size <= window.end:
                    offset = addr - window.start
                    try:
                        self.bar_write(window.bar, offset, size, value & ((1 << 8 * size) - 1))
                    except DEVICE_ERRORS:
                        self._failures.report(f"writing {size} bytes at {self._place(window.bar, offset)}")
                        return False
                    return True
                break
        if self._is_cut(memory, addr, size):
            half = size // 2
            low = self.bus_write(memory, addr, half, value)
            high = self.bus_write(memory, addr + half, half, value >> 8 * half)
            return low or high
        return False

    def _is_cut(self, memory: bool, addr: int, size: int) -> bool:
        """Whether an I/O access lies within a BAR with one part and outside with another.

        A host bridge makes two of it (PCI Local Bus 3.0, 3.2.2.1, and no BAR ends within a dword), so that a
        function sees only what is its own; what is nobody's reads as all ones.
        """
        return (
            not memory
            and size in _ACCESS_SIZES
            and any(
                not window.memory
                and window.start < addr + size
                and addr < window.end
                and not window.start <= addr <= addr + size <= window.end
                for window in self._windows
            )
        )

    def _place(self, bar: int, offset: int) -> str:
        """``BAR 0 + 0x8``, with the register's name if it has one."""
        name = self._names.get((bar, offset))
        return f"BAR {bar} + {offset:#x}" if name is None else f"BAR {bar} + {offset:#x} ({name})"

    def _check_declaration(self) -> None:
        """Raises UsageError when the class attributes describe no possible function."""
        for name, bits in _NUMBERS:
            value = getattr(self, name, None)
            if value is None:
                raise UsageError(f"its class has no {name}")
            if not isinstance(value, int) or value >> bits:
                raise UsageError(f"{name} {value!r} is no number of {bits} bits")
        if self.INTERRUPT_PIN not in range(5):
            raise UsageError(f"INTERRUPT_PIN {self.INTERRUPT_PIN} is not 0 to 4")
        taken: set[int] = set()
        for number, bar in self.BARS.items():
            smallest, largest = _BAR_SIZES[bar.kind]
            if not smallest <= bar.size <= largest or bar.size & bar.size - 1:
                raise UsageError(
                    f"BAR {number}: a size of {bar.size} is no power of two from {smallest} to {largest:#x}"
                )
            occupied = {number, number + 1} if bar.kind is BarKind.MEM64 else {number}
            if occupied & taken or not occupied <= set(range(pci.PCI_NUM_BARS)):
                raise UsageError(f"BAR {number} has no room among the {pci.PCI_NUM_BARS} BARs")
            taken |= occupied

    def _init_config(self) -> None:
        config, wmask = self._config, self._wmask
        _put(config, pci.PCI_VENDOR_ID, 2, self.VENDOR_ID)
        _put(config, pci.PCI_DEVICE_ID, 2, self.DEVICE_ID)
        _put(config, pci.PCI_REVISION_ID, 4, self.CLASS_CODE << 8 | self.REVISION)
        _put(config, pci.PCI_SUBSYSTEM_VENDOR_ID, 2, self.SUBSYSTEM_VENDOR_ID)
        _put(config, pci.PCI_SUBSYSTEM_ID, 2, self.SUBSYSTEM_ID)
        config[pci.PCI_INTERRUPT_PIN] = self.INTERRUPT_PIN
        _put(
            wmask,
            pci.PCI_COMMAND,
            2,
            pci.PCI_COMMAND_IO
            | pci.PCI_COMMAND_MEMORY
            | pci.PCI_COMMAND_MASTER
            | pci.PCI_COMMAND_SERR
            | pci.PCI_COMMAND_INTX_DISABLE,
        )
        wmask[pci.PCI_CACHE_LINE_SIZE] = 0xFF
        wmask[pci.PCI_INTERRUPT_LINE] = 0xFF
        for offset in range(pci.PCI_STD_HEADER_SIZE, pci.PCI_CONFIG_SIZE):
            wmask[offset] = 0xFF
        for number, bar in self.BARS.items():
            offset = pci.PCI_BASE_ADDRESS_0 + 4 * number
            config[offset] = pci.bar_flags(bar)
            _put(wmask, offset, 8 if bar.kind is BarKind.MEM64 else 4, ~(bar.size - 1))

    def _config_changed(self) -> None:
        """Command or a BAR was written: decode anew, and let INTX_DISABLE take effect."""
        command = self._config[pci.PCI_COMMAND]
        self._windows = []
        for number, bar in self.BARS.items():
            memory = bar.kind is not BarKind.IO
            if not command & (pci.PCI_COMMAND_MEMORY if memory else pci.PCI_COMMAND_IO):
                continue
            width = 8 if bar.kind is BarKind.MEM64 else 4
            offset = pci.PCI_BASE_ADDRESS_0 + 4 * number
            start = int.from_bytes(self._config[offset : offset + width], "little") & ~(bar.size - 1)
            end = start + bar.size
            # pci_bar_address() in QEMU's hw/pci/pci.c: at 0, and where sizing has left all ones, is nothing.
            if start and end <= (ALL_ONES if width == 8 else 0xFFFFFFFF):
                self._windows.append(_Window(memory, start, end, number))
        self._update_line()

    def _update_line(self) -> None:
        """Hands the effective level to the IOHub when it changed."""
        disabled = self._config[pci.PCI_COMMAND + 1] << 8 & pci.PCI_COMMAND_INTX_DISABLE
        asserted = self._level and not disabled and self.INTERRUPT_PIN != 0
        if asserted is not self._asserted:
            self._asserted = asserted
            self.host.set_irq(asserted)


def _put(buffer: bytearray, offset: int, size: int, value: int) -> None:
    buffer[offset : offset + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
