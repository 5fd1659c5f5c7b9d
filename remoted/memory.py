# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM as SYNC_SYSMEM describes it, and DMA to it.

A client sends the whole table each time, up to eight regions with one fd each; what it replaces is unmapped
before the next message is looked at. One memory serves one client: with its session the mappings go.

The files stay the client's, which may truncate them at any time. A process that touches a page that is gone
dies of SIGBUS, while the kernel, copying on its behalf, answers EFAULT: so bytes go through a file of our own,
and RAM itself is only shown where a seal keeps it from shrinking (memfd_create(2), fcntl(2)). Huge pages from
hugetlbfs are not shown at all: their owner may still punch a hole, and the pool that fills it again may be empty
(hugetlb_no_page() in mm/hugetlb.c).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from common import mpqemu
from common.disposal import is_memory
from common.errors import IohubError, ProtocolError

__all__ = ["DmaError", "GuestMemory"]


_COPY_SIZE = 1 << 16


class DmaError(IohubError):
    """An address that isn't RAM."""


class _Region(NamedTuple):
    start: int
    end: int
    ram: mmap.mmap
    can_vanish: bool
    """whether its file's owner can take pages away for good"""


class _Piece(NamedTuple):
    """A part of a region: offsets into it."""

    region: _Region
    start: int
    end: int


class GuestMemory:
    """The guest-physical address space as far as it is RAM. Addresses and sizes are in bytes."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._starts: list[int] = []
        self._copy = -1
        """a memfd that bytes go through, as long as there is RAM"""

    @property
    def regions(self) -> list[tuple[int, int]]:
        """Start and size of every region, by address."""
        return [(region.start, region.end - region.start) for region in self._regions]

    def sync(self, payload: bytes | memoryview, fds: Sequence[int]) -> None:
        """Replaces all regions by those of a SYNC_SYSMEM payload, one for each fd; the fds stay the caller's.

        Raises ProtocolError, with everything as it was, unless each region is page-aligned, lies within its
        file, which is on tmpfs or hugetlbfs as memfds are, and none overlaps another.
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
                ram = mmap.mmap(fd, size, offset=offset)
                regions.append(_Region(start, start + size, ram, _can_vanish(fd)))
            if self._copy == -1 and regions:
                self._copy = os.memfd_create("dma", os.MFD_CLOEXEC)
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
        copy, self._copy = self._copy, -1
        if copy != -1:
            os.close(copy)

    def read(self, address: int, size: int) -> bytes:
        """Copies bytes out of RAM; they may span regions that adjoin. Raises DmaError, for all or nothing."""
        return b"".join(self._read_piece(piece) for piece in self._pieces(address, size))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copies bytes into RAM; they may span regions that adjoin.

        Raises DmaError: nothing is written then, unless it is because a file was truncated.
        """
        view = memoryview(data).cast("B")
        done = 0
        for piece in self._pieces(address, len(view)):
            size = piece.end - piece.start
            self._write_piece(piece, view[done : done + size])
            done += size

    def view(self, address: int, size: int) -> memoryview:
        """RAM itself, within one region.

        Raises DmaError, also for RAM whose file isn't sealed against shrinking (that of QEMU's
        memory-backend-memfd is, by default), or consists of huge pages from hugetlbfs.

        Valid until the device's handler returns, and to be released by then (use it in a with statement): a view
        that is kept keeps an old mapping alive.
        """
        pieces = self._pieces(address, size)
        if len(pieces) != 1:
            raise DmaError(f"no single region of RAM holds {size} bytes at {address:#x}")
        region, start, end = pieces[0]
        if region.can_vanish:
            raise DmaError(f"RAM at {address:#x} may be taken away, it can't be viewed")
        with memoryview(region.ram) as whole:
            return whole[start:end]

    def _pieces(self, address: int, size: int) -> list[_Piece]:
        """The parts of regions that make up a range, which must be covered without a gap."""
        pieces = []
        position, end = address, address + size
        while position < end:
            index = bisect_right(self._starts, position) - 1
            if index < 0 or position >= self._regions[index].end:
                raise DmaError(f"no RAM at {position:#x}")
            region = self._regions[index]
            stop = min(end, region.end)
            pieces.append(_Piece(region, position - region.start, stop - region.start))
            position = stop
        return pieces

    def _read_piece(self, piece: _Piece) -> bytes:
        region, start, end = piece
        chunks = []
        with memoryview(region.ram) as ram:
            for offset in range(start, end, _COPY_SIZE):
                with ram[offset : min(offset + _COPY_SIZE, end)] as chunk, _as_dma_error(region, offset):
                    _expect(os.pwrite(self._copy, chunk, 0), len(chunk))
                    chunks.append(os.pread(self._copy, len(chunk), 0))
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _write_piece(self, piece: _Piece, data: memoryview) -> None:
        region, start, end = piece
        with memoryview(region.ram) as ram:
            for offset in range(start, end, _COPY_SIZE):
                with ram[offset : min(offset + _COPY_SIZE, end)] as chunk, _as_dma_error(region, offset):
                    done = offset - start
                    os.pwrite(self._copy, data[done : done + len(chunk)], 0)
                    _expect(os.preadv(self._copy, [chunk], 0), len(chunk))


@contextlib.contextmanager
def _as_dma_error(region: _Region, offset: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DmaError(f"RAM at {region.start + offset:#x} is gone: {error.strerror}") from error


def _expect(copied: int, wanted: int) -> None:
    if copied != wanted:  # the kernel got as far as the file still goes
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def _can_vanish(fd: int) -> bool:
    """Whether the file, one that has seals, lacks the one that is wanted, or is made of huge pages."""
    is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    # st_blksize is that of huge pages on tmpfs, too, where transparent ones are enabled.
    return not is_sealed or os.fstatvfs(fd).f_bsize != mmap.PAGESIZE


def _check_region(start: int, size: int, offset: int, fd: int) -> None:
    where = f"RAM at {start:#x}, {size:#x} bytes from offset {offset:#x}"
    if size == 0 or offset < 0 or start + size > 1 << 64:
        raise ProtocolError(f"{where}: impossible")
    if (start | size | offset) % mmap.PAGESIZE:
        raise ProtocolError(f"{where}: not page-aligned")
    if not is_memory(fd):  # any other filesystem might never answer fstat() or a fault
        raise ProtocolError(f"{where}: the fd is no memfd, and no file on tmpfs or hugetlbfs")
    file_size = os.fstat(fd).st_size
    if offset + size > file_size:
        raise ProtocolError(f"{where}: the file has only {file_size:#x} bytes")


def _unmap(regions: list[_Region]) -> None:
    for region in regions:
        # A device that has kept a view keeps its mapping, until it lets go.
        with contextlib.suppress(BufferError):
            region.ram.close()
