# SPDX-License-Identifier: GPL-2.0-or-later
"""The regions of a function as vfio-user shows them: BARs and config space, accessed by number and offset."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from common.vfiouser import MAX_DATA, NUM_REGIONS, RefusedError, RegionFlag, RegionIndex, sparse_areas
from remoted.function import PciFunction

__all__ = ["Region", "Regions"]

_MASKS = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8)}
_CONFIG = int(RegionIndex.CONFIG)
_MAX_CONFIG_ACCESS = 4


class Region(NamedTuple):
    """What DEVICE_GET_REGION_INFO tells."""

    flags: RegionFlag
    size: int
    """in bytes"""
    capabilities: bytes = b""
    """the areas that the client may map, if that isn't the whole region"""
    fd: int = -1
    """the file to be mapped, in which offsets are those of the region"""


class Regions:
    """The regions of one function."""

    def __init__(self, function: PciFunction) -> None:
        self._function = function
        self._region_read = function.region_read
        self._region_write = function.region_write
        self._sizes = {number: bar.size for number, bar in function.bars.items()}
        self._sizes[_CONFIG] = function.config_size

    def describe(self, index: int) -> Region:
        """What a region is; its size is 0 if it is absent. Raises RefusedError."""
        if index >= NUM_REGIONS:
            raise RefusedError(errno.EINVAL, f"no region {index}")
        size = self._sizes.get(index, 0)
        flags = RegionFlag.READ | RegionFlag.WRITE if size else RegionFlag(0)
        memory = self._function.shared_memory(index)
        if memory is None:
            return Region(flags, size)
        # Without areas the client maps the whole region.
        areas = b"" if memory.areas == ((0, size),) else sparse_areas(memory.areas)
        flags |= RegionFlag.MMAP | (RegionFlag.CAPS if areas else 0)
        return Region(flags, size, areas, memory.fd)

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Reads so many bytes, all ones where the device's code fails; empty if they aren't all in the region."""
        if offset + count > self._sizes.get(region, 0) or count > MAX_DATA:
            return b""
        read: Callable[[int, int], int] = self._function.bus_config_read
        most = _MAX_CONFIG_ACCESS
        if region != _CONFIG:
            mask = _MASKS.get(count)
            if mask is not None:
                return (self._region_read(region, offset, count) & mask).to_bytes(count, "little")
            read, most = partial(self._region_read, region), 8
        return b"".join(
            (read(start, size) & _MASKS[size]).to_bytes(size, "little")
            for start, size in _pieces(offset, count, most)
        )

    def write(self, region: int, offset: int, data: memoryview) -> int:
        """Writes bytes. Returns an errno, 0 for success.

        That is EINVAL if they aren't all in the region, and EIO where the device's code fails.
        """
        count = len(data)
        if not count or offset + count > self._sizes.get(region, 0) or count > MAX_DATA:
            return errno.EINVAL
        write: Callable[[int, int, int], bool] = self._function.bus_config_write
        most = _MAX_CONFIG_ACCESS
        if region != _CONFIG:
            if count in _MASKS:
                is_done = self._region_write(region, offset, count, int.from_bytes(data, "little"))
                return 0 if is_done else errno.EIO
            write, most = partial(self._region_write, region), 8
        done = [
            write(start, size, int.from_bytes(data[start - offset : start - offset + size], "little"))
            for start, size in _pieces(offset, count, most)
        ]
        return 0 if all(done) else errno.EIO


def _pieces(offset: int, count: int, most: int) -> Iterator[tuple[int, int]]:
    """Offset and size of the aligned accesses, of ``most`` bytes at most, that an odd one consists of.

    As the kernel's vfio_pci_core_do_io_rw() (drivers/vfio/pci/vfio_pci_rdwr.c) divides it.
    """
    end = offset + count
    while offset < end:
        size = most
        while offset % size or offset + size > end:
            size //= 2
        yield offset, size
        offset += size
