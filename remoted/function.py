# SPDX-License-Identifier: GPL-2.0-or-later
"""The PCI function: config space, BARs, INTx. What device authors subclass.

A subclass declares its identity and BARs as class attributes, and overrides reset(), bar_read() and
bar_write(); it drives its line by set_intx(). Everything else is here: the config space, the decoding of BAR
addresses, the interrupt status bit, and INTX_DISABLE. The line that reaches the IOHub is a boolean,
``level and not INTX_DISABLE``: QEMU's remote counts calls instead, and a line that counts wrong storms or loses
interrupts.

The daemon calls a function only by what declaration.py reserves. These methods guard the subclass's code; it can't
redefine them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from common import pci
from common.amiss import Amiss
from common.fields import fields_of, set_to_reset_values
from common.pci import Bar
from remoted.configspace import power_on_config, write_masks
from remoted.declaration import check_declaration
from remoted.guard import CONFIG_SPACE, DEVICE_ERRORS, GuardedAmiss, as_int
from remoted.host import Host, PeriodicTimer
from remoted.options import Option, parse_options
from remoted.windows import Window, decode, is_cut

__all__ = ["PciFunction"]

ALL_ONES = 0xFFFFFFFFFFFFFFFF
_MASKS = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8)}
"""of the sizes that an access may have"""
_CONFIG_SIZES = frozenset((1, 2, 4))
_BARS_END = pci.PCI_BASE_ADDRESS_0 + 4 * pci.PCI_NUM_BARS


class PciFunction:
    """One PCI function of header type 0.

    A subclass may raise from any of the methods it overrides, and from its callbacks: the request is answered
    with all ones, the error is counted and logged, and the daemon goes on.
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
    """names by BAR number and offset, for the log; not every register needs one"""
    OPTIONS: ClassVar[Sequence[Option]] = ()
    """the model's own options for --device and the TOML file"""
    PARTS: ClassVar[tuple[str, ...]] = ()
    """attributes whose objects declare fields of their own, such as ``_uart``"""
    IS_DRIVABLE: ClassVar[bool] = False
    """whether `iohubctl raise` and `lower` may drive the INTx line"""

    # Attributes with two underscores are renamed by the compiler: a subclass may have its own of the same name.
    __config = bytearray()

    def __init__(self, host: Host, options: Mapping[str, str]) -> None:
        """``options`` holds a text for those of OPTIONS that were given. Raises UsageError."""
        check_declaration(self, PciFunction)
        self.options: Mapping[str, Any] = parse_options(self.OPTIONS, options)
        """the value of each of OPTIONS by name: what was given, or else the default"""
        self.__host = host
        self.__guard = host.guard
        self.__watchdog = host.guard.watchdog
        self.__amiss = GuardedAmiss(host.guard)
        self.__level = False
        self.__asserted = False
        self.__has_config_read = type(self).config_read is not PciFunction.config_read
        self.__has_pin = self.INTERRUPT_PIN != 0
        self.__bars = dict(self.BARS)
        self.__windows: list[Window] = []
        self.__timers: list[PeriodicTimer] = []
        host.guard.names = {
            (bar, offset): name for bar, names in self.REGISTERS.items() for offset, name in names.items()
        }
        self.__wmask = write_masks(self.__bars)
        self.__config = power_on_config(self)
        host.memory.is_bus_master = False
        set_to_reset_values(self)

    def reset(self) -> None:
        """Sets the device's registers to their power-on values. The line is low already."""

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """The little-endian value of ``size`` (1, 2, 4 or 8) bytes at an offset that lies within the BAR."""
        raise LookupError(f"no register at offset {offset:#x} of BAR {bar}")

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Writes ``size`` (1, 2, 4 or 8) bytes at an offset that lies within the BAR."""
        raise LookupError(f"no register at offset {offset:#x} of BAR {bar}")

    def config_read(self, addr: int, size: int) -> int:
        """``size`` (1, 2 or 4) bytes of config space, which lie within its 256."""
        return int.from_bytes(self.__config[addr : addr + size], "little")

    def config_write(self, addr: int, size: int, value: int) -> None:
        """Writes ``size`` (1, 2 or 4) bytes of config space, within its 256, through their write masks."""
        config, wmask = self.__config, self.__wmask
        for offset in range(addr, addr + size):
            byte = value & 0xFF
            mask = wmask[offset]
            config[offset] = config[offset] & ~mask | byte & mask
            value >>= 8
        if addr < _BARS_END and addr + size > pci.PCI_COMMAND:
            self.__config_changed()

    def close(self) -> None:
        """Releases what the device opened. Called once, at the end of the daemon."""

    def restored(self) -> None:
        """Called instead of reset() when the previous process has left its registers: the fields have them.

        Everything else is to be created again: timers, and attributes that are computed from the fields.
        """

    @property
    def counters(self) -> Mapping[str, int]:
        """What the model counts by itself, by name, for the status."""
        return {}

    def set_intx(self, level: bool) -> None:
        """Drives the INTx line; setting the level that it has does nothing."""
        level = bool(level)
        if level is not self.__level:
            self.__level = level
            if level:
                self.__config[pci.PCI_STATUS] |= pci.PCI_STATUS_INTERRUPT
            else:
                self.__config[pci.PCI_STATUS] &= ~pci.PCI_STATUS_INTERRUPT
            self.__update_line()

    def call_every(self, seconds: float, callback: Callable[[], None]) -> PeriodicTimer:
        """Calls ``callback()`` every so many seconds (0.001 or more), until the timer's cancel() or a reset.

        To be called in reset() and restored(): the first reset stops what __init__() has started. Raises
        ValueError.
        """
        timer = PeriodicTimer(self.__host.loop, seconds, callback)
        self.__timers = [each for each in self.__timers if each.is_active]
        self.__timers.append(timer)
        return timer

    @property
    def host(self) -> Host:
        """What the daemon gives to the device: loop, log, guest RAM."""
        return self.__host

    @property
    def is_bus_master(self) -> bool:
        """Whether the guest has set bus mastering in the command register, without which all DMA fails."""
        return bool(self.__config[pci.PCI_COMMAND] & pci.PCI_COMMAND_MASTER)

    @property
    def intx_level(self) -> bool:
        """The level that the device drives, whatever INTX_DISABLE says; status bit 3."""
        return self.__level

    @property
    def is_decoded(self) -> bool:
        """Whether the guest has placed and enabled one of its BARs, without which no driver reaches the device."""
        return bool(self.__windows) or not self.__bars

    @property
    def amiss(self) -> Amiss:
        """The problems of this function that `iohubctl status` reports."""
        return self.__amiss

    @property
    def errors(self) -> int:
        """How often the device's code has raised."""
        return self.__guard.errors

    @property
    def last_error(self) -> str:
        """What it raised last, in one line; empty if it never has."""
        return self.__guard.last_error

    @property
    def last_place(self) -> str:
        """What it was doing then, such as ``reading 4 bytes at BAR 0 + 0x8 (STATUS)``."""
        return self.__guard.last_place

    @property
    def stall(self) -> str:
        """What has kept the daemon for seconds since the last reset, and for how long; empty if nothing has."""
        return self.__guard.stall

    @property
    def is_initialised(self) -> bool:
        """Whether the subclass's __init__() has called this class's."""
        return bool(self.__config)

    def full_reset(self) -> bool:
        """What a conventional reset does: lowers the line, config space to power-on values, then reset().

        False when the device's own code failed. The order is that of pci_do_device_reset() in QEMU's
        hw/pci/pci.c; device-specific config space (0x40 and up) is left alone there too.
        """
        self.__guard.forgive()
        for timer in self.__timers:
            timer.cancel()
        is_lowered = self.drive_intx(False)
        PciFunction.set_intx(self, False)
        for start, length in (
            (pci.PCI_COMMAND, 2),
            (pci.PCI_CACHE_LINE_SIZE, 1),
            (pci.PCI_BASE_ADDRESS_0, 4 * pci.PCI_NUM_BARS),
            (pci.PCI_INTERRUPT_LINE, 1),
        ):
            for offset in range(start, start + length):
                self.__config[offset] &= ~self.__wmask[offset]
        self.__config_changed()
        set_to_reset_values(self)
        with self.__guard.running("reset") as run:
            self.reset()
        return is_lowered and not run.failed

    @property
    def keeps_registers(self) -> bool:
        """Whether a restart of the daemon loses nothing: the registers are fields, or there are none."""
        return bool(self.PARTS or fields_of(type(self))) or type(self).reset is PciFunction.reset

    @property
    def state(self) -> tuple[bytearray, bool]:
        """Config space and the level that the device drives: what resume() takes, besides the fields."""
        return self.__config, self.__level

    def resume(self, config: bytes, level: bool) -> bool:
        """Restores config space and level of the previous process, whose values the fields have already.

        Drives no line, and calls no code of the device; that is for go_on(). Returns the level that was asserted.
        """
        self.__config[:] = config
        self.__decode()
        self.__level = level
        self.__asserted = self.__effective_level()
        return self.__asserted

    def go_on(self) -> None:
        """After resume(): the device goes on, or starts from reset if its class doesn't keep its registers."""
        with self.__guard.running("restored" if self.keeps_registers else "reset"):
            if self.keeps_registers:
                self.restored()
            else:
                PciFunction.set_intx(self, False)
                self.reset()

    def shut_down(self) -> None:
        """Lets the device close what it opened."""
        with self.__guard.running("close"):
            self.close()

    def drive_intx(self, level: bool) -> bool:
        """Lets the device drive its line to a level; False when its code failed."""
        with self.__guard.running("setting the INTx line") as run:
            self.set_intx(level)
        return not run.failed

    @property
    def is_multifunction(self) -> bool:
        """Whether it tells guests that the slot has other functions."""
        return bool(self.__config[pci.PCI_HEADER_TYPE] & pci.PCI_HEADER_TYPE_MULTIFUNCTION)

    def set_multifunction(self) -> None:
        """Tells guests that the slot has other functions (PCI Local Bus 3.0, 6.2.1); for each of them."""
        self.__config[pci.PCI_HEADER_TYPE] |= pci.PCI_HEADER_TYPE_MULTIFUNCTION

    def bus_config_read(self, addr: int, size: int) -> int:
        """Reads config space; all ones when the bytes don't lie within its 256, or the device's code failed."""
        if size not in _CONFIG_SIZES or addr + size > pci.PCI_CONFIG_SIZE:
            return ALL_ONES
        if not self.__has_config_read:
            return int.from_bytes(self.__config[addr : addr + size], "little")
        watchdog = self.__watchdog
        watchdog.doing = (self.__guard, "reading", CONFIG_SPACE, addr, size)
        if watchdog.is_parked:
            watchdog.unpark()
        try:
            value = self.config_read(addr, size)
            if type(value) is not int:
                value = as_int(value)
            return value & _MASKS[size]
        except DEVICE_ERRORS:
            self.__guard.report(self.__guard.access("reading", CONFIG_SPACE, addr, size))
            return ALL_ONES
        finally:
            watchdog.doing = None

    def bus_config_write(self, addr: int, size: int, value: int) -> bool:
        """Writes config space; False when the bytes don't lie within its 256, or the device's code failed."""
        if size not in _CONFIG_SIZES or addr + size > pci.PCI_CONFIG_SIZE:
            return False
        watchdog = self.__watchdog
        watchdog.doing = (self.__guard, "writing", CONFIG_SPACE, addr, size)
        if watchdog.is_parked:
            watchdog.unpark()
        try:
            self.config_write(addr, size, value)
            return True
        except DEVICE_ERRORS:
            self.__guard.report(self.__guard.access("writing", CONFIG_SPACE, addr, size))
            return False
        finally:
            watchdog.doing = None

    def bus_read(self, memory: bool, addr: int, size: int) -> int:
        """Reads at a bus address; all ones where the function decodes nothing, or the device's code failed."""
        for window in self.__windows:
            if window.start <= addr < window.end and window.memory is memory:
                mask = _MASKS.get(size)
                if mask is not None and addr + size <= window.end:
                    offset = addr - window.start
                    watchdog = self.__watchdog
                    watchdog.doing = (self.__guard, "reading", window.bar, offset, size)
                    if watchdog.is_parked:
                        watchdog.unpark()
                    try:
                        value = self.bar_read(window.bar, offset, size)
                        if type(value) is not int:
                            value = as_int(value)
                        return value & mask
                    except DEVICE_ERRORS:
                        self.__guard.report(self.__guard.access("reading", window.bar, offset, size))
                        return ALL_ONES
                    finally:
                        watchdog.doing = None
                break
        if not memory and size in _MASKS and is_cut(self.__windows, addr, size):
            half = size // 2
            ones = (1 << 8 * half) - 1
            low, high = (self.bus_read(memory, part, half) & ones for part in (addr, addr + half))
            return high << 8 * half | low
        return ALL_ONES

    def bus_write(self, memory: bool, addr: int, size: int, value: int) -> bool:
        """Writes at a bus address; False where the function decodes nothing, or the device's code failed."""
        for window in self.__windows:
            if window.start <= addr < window.end and window.memory is memory:
                mask = _MASKS.get(size)
                if mask is not None and addr + size <= window.end:
                    offset = addr - window.start
                    watchdog = self.__watchdog
                    watchdog.doing = (self.__guard, "writing", window.bar, offset, size)
                    if watchdog.is_parked:
                        watchdog.unpark()
                    try:
                        self.bar_write(window.bar, offset, size, value & mask)
                        return True
                    except DEVICE_ERRORS:
                        self.__guard.report(self.__guard.access("writing", window.bar, offset, size))
                        return False
                    finally:
                        watchdog.doing = None
                break
        if not memory and size in _MASKS and is_cut(self.__windows, addr, size):
            half = size // 2
            low = self.bus_write(memory, addr, half, value)
            high = self.bus_write(memory, addr + half, half, value >> 8 * half)
            return low or high
        return False

    def __config_changed(self) -> None:
        """Command or a BAR was written: decode anew, and let bus mastering and INTX_DISABLE take effect."""
        self.__decode()
        self.__update_line()

    def __decode(self) -> None:
        self.__windows = decode(self.__config, self.__bars)
        self.__host.memory.is_bus_master = self.is_bus_master

    def __update_line(self) -> None:
        """Hands the effective level to the IOHub when it changed."""
        asserted = self.__effective_level()
        if asserted is not self.__asserted:
            self.__asserted = asserted
            self.__host.set_irq(asserted)

    def __effective_level(self) -> bool:
        disabled = self.__config[pci.PCI_COMMAND + 1] << 8 & pci.PCI_COMMAND_INTX_DISABLE
        return self.__level and not disabled and self.__has_pin
