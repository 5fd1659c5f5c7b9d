# SPDX-License-Identifier: GPL-2.0-or-later
"""The accesses to a function: config space and BARs, decoded, and guarded against errors of the device's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common import pci
from common.pci import Bar
from remoted.configspace import ConfigSpace
from remoted.guard import CONFIG_SPACE, DEVICE_ERRORS, Guard, as_int
from remoted.windows import Area, Window, decode, is_cut, without_areas

__all__ = ["ALL_ONES", "BusTarget"]

ALL_ONES = 0xFFFFFFFFFFFFFFFF
_MASKS = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8)}
"""of the sizes that an access may have"""
_CONFIG_SIZES = frozenset((1, 2, 4))


class BusTarget:
    """What a bus, or a client that decodes BARs itself, does with a function."""

    # Attributes with two underscores are renamed by the compiler: a subclass may have its own of the same name.

    def __init__(
        self,
        guard: Guard,
        space: ConfigSpace,
        bars: Mapping[int, Bar],
        areas: Mapping[int, Sequence[Area]],
    ) -> None:
        """``areas`` are those that the device's code does not serve, by BAR, in order of offset."""
        self.__guard = guard
        self.__watchdog = guard.watchdog
        self.__space = space
        self.__config = space.data
        self.__config_size = len(space.data)
        self.__wmask = space.wmask
        self.__watched_end = space.watched_end
        self.__bars = bars
        self.__areas = areas
        self.__sizes: dict[int, int] = {}
        """of the BARs, while the function decodes any"""
        self.__windows: list[Window] = []
        """what the device's code serves"""
        self.__memory_windows: list[Window] = []
        """of the BARs that have areas"""
        self.__is_decoded = False
        self.__has_config_read = type(self).config_read is not BusTarget.config_read

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """The little-endian value of ``size`` (1, 2, 4 or 8) bytes at an offset that lies within the BAR."""
        raise LookupError(f"no register at offset {offset:#x} of BAR {bar}")

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Writes ``size`` (1, 2, 4 or 8) bytes at an offset that lies within the BAR."""
        raise LookupError(f"no register at offset {offset:#x} of BAR {bar}")

    def config_read(self, addr: int, size: int) -> int:
        """``size`` (1, 2 or 4) bytes of config space, which lie within its ``config_size``."""
        return int.from_bytes(self.__config[addr : addr + size], "little")

    def config_write(self, addr: int, size: int, value: int) -> None:
        """Writes ``size`` (1, 2 or 4) bytes of config space, within ``config_size``, through their write masks."""
        config, wmask = self.__config, self.__wmask
        for offset in range(addr, addr + size):
            byte = value & 0xFF
            mask = wmask[offset]
            config[offset] = config[offset] & ~mask | byte & mask
            value >>= 8
        if addr < self.__watched_end and addr + size > pci.PCI_COMMAND:
            self.config_written()

    def config_written(self) -> None:
        """For the base class: what has an effect on it may have changed in config space."""

    @property
    def config_size(self) -> int:
        """Bytes of config space, 256 or 4096."""
        return self.__config_size

    @property
    def bars(self) -> Mapping[int, Bar]:
        """The BARs that config space shows: those of the class, and that of MSI-X if it has one of its own."""
        return self.__bars

    @property
    def is_decoded(self) -> bool:
        """Whether the guest has placed and enabled one of its BARs, without which no driver reaches the device."""
        return self.__is_decoded or not self.__bars

    def decode_bars(self) -> None:
        """For the base class: decodes the BARs as config space says, or none at all in D3hot."""
        is_awake = self.__space.is_awake
        windows = decode(self.__config, self.__bars) if is_awake else []
        self.__is_decoded = bool(windows)
        self.__sizes = {number: bar.size for number, bar in self.__bars.items()} if is_awake else {}
        if self.__areas:
            self.__memory_windows = [window for window in windows if window.bar in self.__areas]
            windows = list(without_areas(windows, self.__areas))
        self.__windows = windows

    def bus_config_read(self, addr: int, size: int) -> int:
        """Reads config space; all ones when the bytes don't lie within its size, or the device's code failed."""
        if size not in _CONFIG_SIZES or addr + size > self.__config_size:
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
        """Writes config space; False when the bytes don't lie within its size, or the device's code failed."""
        if size not in _CONFIG_SIZES or addr + size > self.__config_size:
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
                    offset = addr - window.base
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
        if memory:
            for window in self.__memory_windows:
                if window.start <= addr < window.end:
                    return self.region_read(window.bar, addr - window.base, size)
        elif size in _MASKS and is_cut(self.__windows, addr, size):
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
                    offset = addr - window.base
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
        if memory:
            for window in self.__memory_windows:
                if window.start <= addr < window.end:
                    return self.region_write(window.bar, addr - window.base, size, value)
        elif size in _MASKS and is_cut(self.__windows, addr, size):
            half = size // 2
            low = self.bus_write(memory, addr, half, value)
            high = self.bus_write(memory, addr + half, half, value >> 8 * half)
            return low or high
        return False

    def region_read(self, bar: int, offset: int, size: int) -> int:
        """Reads at an offset in a BAR, wherever the guest has placed it; all ones as for bus_read().

        ``size`` is 1, 2, 4 or 8. An access that lies partly within an area of the base class is not done.
        """
        mask = _MASKS.get(size)
        if mask is None or not 0 <= offset <= self.__sizes.get(bar, 0) - size:
            return ALL_ONES
        if bar in self.__areas:
            for area in self.__areas[bar]:
                if area.start < offset + size and offset < area.end:
                    is_within = area.start <= offset and offset + size <= area.end
                    return area.read(offset, size) if is_within else ALL_ONES
        watchdog = self.__watchdog
        watchdog.doing = (self.__guard, "reading", bar, offset, size)
        if watchdog.is_parked:
            watchdog.unpark()
        try:
            value = self.bar_read(bar, offset, size)
            if type(value) is not int:
                value = as_int(value)
            return value & mask
        except DEVICE_ERRORS:
            self.__guard.report(self.__guard.access("reading", bar, offset, size))
            return ALL_ONES
        finally:
            watchdog.doing = None

    def region_write(self, bar: int, offset: int, size: int, value: int) -> bool:
        """Writes at an offset in a BAR, wherever the guest has placed it; False as for bus_write()."""
        mask = _MASKS.get(size)
        if mask is None or not 0 <= offset <= self.__sizes.get(bar, 0) - size:
            return False
        if bar in self.__areas:
            for area in self.__areas[bar]:
                if area.start < offset + size and offset < area.end:
                    is_within = area.start <= offset and offset + size <= area.end
                    if is_within:
                        area.write(offset, size, value & mask)
                    return is_within
        watchdog = self.__watchdog
        watchdog.doing = (self.__guard, "writing", bar, offset, size)
        if watchdog.is_parked:
            watchdog.unpark()
        try:
            self.bar_write(bar, offset, size, value & mask)
            return True
        except DEVICE_ERRORS:
            self.__guard.report(self.__guard.access("writing", bar, offset, size))
            return False
        finally:
            watchdog.doing = None
