# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM as a client describes it, and DMA to it.

An mpqemu client sends the whole table each time (SYNC_SYSMEM), up to eight regions with one fd each. A vfio-user
client maps and unmaps single regions (DMA_MAP, DMA_UNMAP), thousands at most, nearly all of them parts of the same
few files: of each file one fd is kept. What is replaced or unmapped is no longer used when the next message is
handled. One memory serves one client: with its session the files go.

The files stay the client's, which may truncate them at any time, make them larger than any address space, or leave
them sparse. So what a client can make this process hold is bounded: RAM is read with pread(2), and a part of it is
mapped for a write, or for a device to look at it. A process that touches a mapped page that is gone dies of
SIGBUS, while the kernel, copying on its behalf, answers EFAULT. So RAM is only shown, written directly, and kept
mapped, where a seal keeps it from shrinking (memfd_create(2), fcntl(2)); otherwise bytes are copied into a mapping
of the pages concerned from a file of our own. pwrite(2) would take the file's lock, which fallocate(2) in the
client may hold for seconds. Huge pages from hugetlbfs are not shown at all: their owner may still punch a hole,
and the pool that fills it again may be empty (hugetlb_no_page() in mm/hugetlb.c).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from common import mpqemu
from common.errors import IohubError, ProtocolError, ShortageError
from remoted.mappings import Mappings
from remoted.ramregions import FileKey, MapError, Region, check_range, check_region, file_key

__all__ = ["DmaError", "GuestMemory", "MapError"]


_CHUNK = 1 << 16
_MAX_FILES = 256
"""of which regions may be mapped: QEMU has at most that many pieces of RAM (ACPI_MAX_RAM_SLOTS)"""
_WITHOUT_FD = "has no file descriptor: QEMU needs -object memory-backend-memfd,id=ID,size=SIZE,share=on and \
-machine memory-backend=ID"


class DmaError(IohubError):
    """An address that isn't RAM, or bus mastering is off."""


class _Piece(NamedTuple):
    """A part of a region: offsets into its file."""

    region: Region
    start: int
    end: int


class GuestMemory:
    """The guest-physical address space as far as it is RAM. Addresses and sizes are in bytes."""

    def __init__(self) -> None:
        self.is_bus_master = True
        """whether its function may access RAM: the bus master bit, which the function keeps up to date"""
        self._regions: list[Region] = []
        self._starts: list[int] = []
        self._uses: dict[int, int] = {}
        """how many regions use an fd"""
        self._files: dict[FileKey, int] = {}
        """the fd that is kept of a file, of those that were mapped"""
        self._unreachable = 0
        """how many regions are writable and have no fd"""
        self._mappings = Mappings()
        self._copy = -1
        """a memfd that bytes to be written go through, as long as there is RAM"""

    @property
    def regions(self) -> list[tuple[int, int]]:
        """Start and size of every region, by address."""
        return [(region.start, region.end - region.start) for region in self._regions]

    def mapping(self, start: int) -> tuple[int, int, int, bool, bool] | None:
        """What map() has got for the region at that address: size, offset, fd, can_read, can_write."""
        index = bisect_left(self._starts, start)
        if index == len(self._starts) or self._starts[index] != start:
            return None
        each = self._regions[index]
        return each.end - start, each.offset, each.fd, each.can_read, each.can_write

    @property
    def is_empty(self) -> bool:
        """Whether there is no region."""
        return not self._regions

    @property
    def fds(self) -> list[int]:
        """The fds of all regions, each once."""
        return list(self._uses)

    @property
    def complaint(self) -> str:
        """Why the guest's RAM can't be reached although the client has mapped it; empty if it can."""
        if self._uses or not self._unreachable:
            return ""
        return f"the guest's RAM {_WITHOUT_FD}"

    def sync(self, payload: bytes | memoryview, fds: Sequence[int]) -> list[int]:
        """Replaces all regions by those of a SYNC_SYSMEM payload, one for each fd.

        Takes ownership of the fds, and returns those that it had before for the caller to close. Raises
        ProtocolError unless each region is page-aligned and lies within its file, which can be written and is on
        tmpfs or hugetlbfs as memfds are, and none overlaps another; ShortageError. After both everything is as it
        was, and the fds are the caller's.
        """
        table = mpqemu.SYSMEM.unpack_from(payload)
        limit = mpqemu.MAX_FDS
        wanted = [(table[i], table[limit + i], table[2 * limit + i], fd) for i, fd in enumerate(fds)]
        regions = sorted(check_region(start, size, offset, fd) for start, size, offset, fd in wanted)
        for region, following in pairwise(regions):
            if region.end > following.start:
                raise ProtocolError(f"RAM regions overlap at {following.start:#x}")
        if regions:
            self._make_copy()
        old = self.unmap_all()
        self._regions = regions
        self._starts = [region.start for region in regions]
        self._uses = dict.fromkeys(fds, 1)
        return old

    def map(
        self, start: int, size: int, offset: int, fd: int, *, can_read: bool = True, can_write: bool = True
    ) -> list[int]:
        """Adds a region: ``size`` bytes of RAM at address ``start``, from an offset of the file on.

        An ``fd`` of -1 stands for RAM that this process can't reach. Otherwise it takes ownership of the fd, and
        returns those that the caller is to close: this one, if another of the same file is kept already. Raises
        MapError for a region that sync() would refuse, that needs more rights than the fd has, overlaps another
        (EEXIST), or is one too many (ENOSPC); ShortageError as sync(). After both everything is as it was, and the
        fd is the caller's.
        """
        from common.vfiouser import MAX_DMA_MAPS  # which only devices with that transport load

        if len(self._regions) >= MAX_DMA_MAPS:
            raise MapError(errno.ENOSPC, f"more than {MAX_DMA_MAPS} regions of RAM")
        try:
            if fd == -1:
                check_range(start, size, offset)
                region = Region(start, start + size, -1, offset, mmap.PAGESIZE, True, can_read, can_write)
            else:
                region = check_region(start, size, offset, fd, can_write)._replace(
                    can_read=can_read, can_write=can_write
                )
        except ProtocolError as error:
            raise MapError(errno.EINVAL, str(error)) from error
        index = bisect_right(self._starts, start)
        if (index and self._regions[index - 1].end > start) or (
            index < len(self._starts) and self._starts[index] < region.end
        ):
            raise MapError(
                errno.EEXIST, f"RAM at {start:#x}, {size:#x} bytes: overlaps a region that is mapped"
            )
        surplus = []
        if fd == -1:
            self._unreachable += can_write
        else:
            kept = self._keep_file(fd)
            if kept != fd:
                surplus.append(fd)
                region = region._replace(fd=kept)
        self._regions.insert(index, region)
        self._starts.insert(index, start)
        return surplus

    def unmap(self, start: int, size: int) -> list[int]:
        """Removes a region, exactly as it was mapped. Returns fds for the caller to close.

        Raises MapError (ENOENT) if there is none of that address and size.
        """
        index = bisect_left(self._starts, start)
        if index == len(self._starts) or self._regions[index][:2] != (start, start + size):
            raise MapError(errno.ENOENT, f"no RAM of {size:#x} bytes is mapped at {start:#x}")
        region = self._regions.pop(index)
        del self._starts[index]
        self._mappings.drop(region.fd)
        if region.fd == -1:
            self._unreachable -= region.can_write
            return []
        self._uses[region.fd] -= 1
        if self._uses[region.fd]:
            return []
        del self._uses[region.fd]
        del self._files[file_key(region.fd)]
        return [region.fd]

    def unmap_all(self) -> list[int]:
        """Removes all regions. Returns their fds for the caller to close."""
        self._mappings.drop_all()
        old, self._uses = list(self._uses), {}
        self._regions, self._starts, self._files, self._unreachable = [], [], {}, 0
        return old

    def clear(self) -> list[int]:
        """Forgets all regions, at the end of a session. Returns their fds for the caller to close."""
        copy, self._copy = self._copy, -1
        if copy != -1:
            os.close(copy)
        return self.unmap_all()

    def read(self, address: int, size: int) -> bytes:
        """Copies bytes out of RAM; they may span regions that adjoin. Raises DmaError, for all or nothing."""
        pieces = self._pieces(address, size)
        for piece in pieces:
            if not piece.region.can_read:
                raise DmaError(f"RAM at {address:#x} can't be read by devices")
        return b"".join(self._read_piece(piece) for piece in pieces)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copies bytes into RAM; they may span regions that adjoin.

        Raises DmaError: nothing is written then, unless it is because a file was truncated.
        """
        view = memoryview(data).cast("B")
        done = 0
        pieces = self._pieces(address, len(view))
        for piece in pieces:
            if not piece.region.can_write:
                raise DmaError(f"RAM at {address:#x} can't be written by devices")
        for piece in pieces:
            size = piece.end - piece.start
            self._write_piece(piece, view[done : done + size])
            done += size

    def view(self, address: int, size: int) -> memoryview:
        """RAM itself, within one region.

        Raises DmaError, also for RAM whose file isn't sealed against shrinking (that of QEMU's
        memory-backend-memfd is, by default), or consists of huge pages from hugetlbfs.

        Valid until the device's handler returns, and to be released by then (use it in a with statement): a view
        that is kept keeps its pages mapped, and those around it.
        """
        pieces = self._pieces(address, size)
        if len(pieces) != 1:
            raise DmaError(f"no single region of RAM holds {size} bytes at {address:#x}")
        region, start, end = pieces[0]
        if not (region.can_read and region.can_write):
            raise DmaError(f"RAM at {address:#x} can't be both read and written by devices")
        if region.can_vanish:
            raise DmaError(f"RAM at {address:#x} may be taken away, it can't be viewed")
        with _as_dma_error(address):
            return self._map_lasting(region, start, end)

    def _make_copy(self) -> None:
        if self._copy == -1:
            try:
                self._copy = os.memfd_create("dma", os.MFD_CLOEXEC)
            except OSError as error:
                raise ShortageError(f"no buffer for DMA: {error.strerror}") from error

    def _keep_file(self, fd: int) -> int:
        """Counts a use of the fd that is kept of this fd's file: the fd itself, if there is none yet."""
        key = file_key(fd)
        kept = self._files.get(key, fd)
        if kept == fd and len(self._files) >= _MAX_FILES:
            raise MapError(errno.ENOSPC, f"RAM of more than {_MAX_FILES} files")
        self._make_copy()
        self._files[key] = kept
        self._uses[kept] = self._uses.get(kept, 0) + 1
        return kept

    def _pieces(self, address: int, size: int) -> list[_Piece]:
        """The parts of regions that make up a range, which must be covered without a gap."""
        if not self.is_bus_master:
            raise DmaError("the guest has not set bus mastering in the command register")
        pieces = []
        position, end = address, address + size
        while position < end:
            index = bisect_right(self._starts, position) - 1
            if index < 0 or position >= self._regions[index].end:
                raise DmaError(f"no RAM at {position:#x}")
            region = self._regions[index]
            if region.fd == -1:
                raise DmaError(f"RAM at {position:#x} {_WITHOUT_FD}")
            stop = min(end, region.end)
            base = region.offset - region.start
            pieces.append(_Piece(region, base + position, base + stop))
            position = stop
        return pieces

    def _read_piece(self, piece: _Piece) -> bytes:
        region, start, end = piece
        chunks = []
        for offset in range(start, end, _CHUNK):
            size = min(_CHUNK, end - offset)
            with _as_dma_error(region.start + offset - region.offset):
                chunk = os.pread(region.fd, size, offset)
                _expect(len(chunk), size)
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _map_lasting(self, region: Region, start: int, end: int) -> memoryview:
        """As _map(), of a region that can't vanish; what is mapped is kept for the next time."""
        limit = region.offset + region.end - region.start
        view = self._mappings.view(region.fd, start, end, limit)
        return _map(region, start, end) if view is None else view

    def _write_piece(self, piece: _Piece, data: memoryview) -> None:
        region, start, end = piece
        if not region.can_vanish:
            with (
                _as_dma_error(region.start + start - region.offset),
                self._map_lasting(region, start, end) as view,
            ):
                view[:] = data
            return
        for offset in range(start, end, _CHUNK):
            size = min(_CHUNK, end - offset)
            with _as_dma_error(region.start + offset - region.offset):
                os.pwrite(self._copy, data[offset - start : offset - start + size], 0)
                with _map(region, offset, offset + size) as chunk:
                    _expect(os.preadv(self._copy, [chunk], 0), size)


@contextlib.contextmanager
def _as_dma_error(address: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "is gone" if error.errno == errno.EFAULT else "can't be reached"
        raise DmaError(f"RAM at {address:#x} {what}: {error.strerror}") from error


def _expect(copied: int, wanted: int) -> None:
    if copied != wanted:  # the file was truncated: the kernel copied up to its end
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def _map(region: Region, start: int, end: int) -> memoryview:
    """The bytes between two offsets of the file, mapped until the view is released. Raises OSError."""
    first = start - start % region.page_size
    length = end - first
    length += -length % region.page_size
    try:
        pages = mmap.mmap(region.fd, length, offset=first)
    except ValueError as error:  # the file was truncated
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT)) from error
    pages.madvise(mmap.MADV_DONTDUMP)
    with memoryview(pages) as whole:
        return whole[start - first : end - first]
