# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM as SYNC_SYSMEM describes it, and DMA to it.

A client sends the whole table each time, up to eight regions with one fd each; what it replaces is unmapped
before the next message is looked at. One memory serves one client: with its session the mappings go.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from common import mpqemu
from common.errors import IohubError, ProtocolError

__all__ = ["DmaError", "GuestMemory"]


class DmaError(IohubError):
    """An address that isn't RAM."""


class _Region(NamedTuple):
    start: int
    end: int
    ram: mmap.mmap


class GuestMemory:
    """The guest-physical address space as far as it is RAM. Addresses and sizes are in bytes."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._starts: list[int] = []

    @property
    def regions(self) -> list[tuple[int, int]]:
        """Start and size of every region, by address."""
        return [(region.start, region.end - region.start) for region in self._regions]

    def sync(self, payload: bytes | memoryview, fds: Sequence[int]) -> None:
        """Replaces all regions by those of a SYNC_SYSMEM payload, one for each fd; the fds stay the caller's.

        Raises ProtocolError, with everything as it was, unless each region is page-aligned, lies within its
        file, and none overlaps another.
        """
        table = mpqemu.SYSMEM.unpack_from(payload)
        limit = mpqemu.MAX_FDS
        wanted = [(table[i], table[limit + i], table[2 * limit + i], fd) for i, fd in enumerate(fds)]
        for start, size, offset, fd in wanted:
            _check_region(start, size, offset, fd)
        wanted.sort()
        for (start, size, _, _), (following, _, _, _) in pairwise(wanted):
            if start + size > following:
                raise ProtocolError(f"RAM regions overlap at {following:#x}")
        regions: list[_Region] = []
        try:
            for start, size, offset, fd in wanted:
                regions.append(_Region(start, start + size, mmap.mmap(fd, size, offset=offset)))
        except (OSError, ValueError, OverflowError) as error:
            _unmap(regions)
            raise ProtocolError(f"RAM at {start:#x}: {error}") from error
        old, self._regions = self._regions, regions
        self._starts = [region.start for region in regions]
        _unmap(old)

    def clear(self) -> None:
        """Unmaps everything."""
        old, self._regions, self._starts = self._regions, [], []
        _unmap(old)

    def read(self, address: int, size: int) -> bytes:
        """Copies bytes out of RAM; they may span regions that adjoin. Raises DmaError, for all or nothing."""
        return b"".join(bytes(ram[start:end]) for ram, start, end in self._pieces(address, size))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copies bytes into RAM; they may span regions that adjoin. Raises DmaError, and writes nothing then."""
        view = memoryview(data).cast("B")
        done = 0
        for ram, start, end in self._pieces(address, len(view)):
            ram[start:end] = view[done : done + end - start]
            done += end - start

    def view(self, address: int, size: int) -> memoryview:
        """RAM itself, within one region. Raises DmaError.

        Valid until the device's handler returns, and to be released by then (use it in a with statement): a view
        that is kept keeps an old mapping alive.
        """
        pieces = self._pieces(address, size)
        if len(pieces) != 1:
            raise DmaError(f"no single region of RAM holds {size} bytes at {address:#x}")
        ram, start, end = pieces[0]
        with memoryview(ram) as whole:
            return whole[start:end]

    def _pieces(self, address: int, size: int) -> list[tuple[mmap.mmap, int, int]]:
        """The parts of regions that make up a range, which must be covered without a gap."""
        pieces = []
        position, end = address, address + size
        while position < end:
            index = bisect_right(self._starts, position) - 1
            if index < 0 or position >= self._regions[index].end:
                raise DmaError(f"no RAM at {position:#x}")
            region = self._regions[index]
            stop = min(end, region.end)
            pieces.append((region.ram, position - region.start, stop - region.start))
            position = stop
        return pieces


def _check_region(start: int, size: int, offset: int, fd: int) -> None:
    where = f"RAM at {start:#x}, {size:#x} bytes from offset {offset:#x}"
    if size == 0 or offset < 0 or start + size > 1 << 64:
        raise ProtocolError(f"{where}: impossible")
    if (start | size | offset) % mmap.PAGESIZE:
        raise ProtocolError(f"{where}: not page-aligned")
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ProtocolError(f"{where}: the fd is no file")
    if offset + size > status.st_size:
        raise ProtocolError(f"{where}: the file has only {status.st_size:#x} bytes")


def _unmap(regions: list[_Region]) -> None:
    for region in regions:
        # A device that has kept a view keeps its mapping, until it lets go.
        with contextlib.suppress(BufferError):
            region.ram.close()
