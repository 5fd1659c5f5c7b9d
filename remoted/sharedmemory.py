# SPDX-License-Identifier: GPL-2.0-or-later
"""The shared memory of a BAR: a memfd that the device sees as a memoryview, and that a client may map.

The file is as long as the BAR, so an offset in the BAR is one in the file. Seals keep it from shrinking: no
mapping loses its pages. A reset leaves the contents alone, as that of a board does with its RAM. Where there is an
fd store they survive the process, even if it is killed: each write is in the file at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from typing import TYPE_CHECKING

from common.errors import UsageError
from common.pci import Bar

if TYPE_CHECKING:
    from common.fdstore import FdStore

__all__ = ["SharedArea", "SharedMemory", "bar_memory_name", "take_bar_memory"]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """The memory of one BAR."""

    def __init__(self, number: int, bar: Bar, kept_fd: int) -> None:
        """``kept_fd`` is the file that the previous process had, owned from here on, or -1. Raises UsageError."""
        self.areas: tuple[tuple[int, int], ...] = bar.shared_areas
        """offset and size of what a client may map, in order of offset"""
        self.is_kept = kept_fd != -1
        """whether it has the contents that the previous process left"""
        self.fd = kept_fd
        try:
            if self.is_kept and os.fstat(kept_fd).st_size != bar.size:
                os.close(kept_fd)
                self.is_kept, self.fd = False, -1
            if not self.is_kept:
                self.fd = os.memfd_create(f"iohub-bar{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.ftruncate(self.fd, bar.size)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping = mmap.mmap(self.fd, bar.size)
            self._mapping.madvise(mmap.MADV_DONTDUMP)  # it may hold the guest's data
        except (OSError, OverflowError) as error:
            self._close()
            raise UsageError(f"BAR {number}: no shared memory of {bar.size:#x} bytes: {error}") from error
        self.view = memoryview(self._mapping)
        """the whole BAR"""
        self.units = {1: self.view, 2: self.view.cast("H"), 4: self.view.cast("I"), 8: self.view.cast("Q")}
        """the same, as numbers of so many bytes"""

    def unmap(self) -> list[int]:
        """Ends the views, and returns the file's fd, now the caller's; none at a second call.

        Its close may take long, as it frees the memory. Views that the device has made keep the mapping alive.
        """
        for view in self.units.values():
            view.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()
        fd, self.fd = self.fd, -1
        return [fd] if fd != -1 else []

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd != -1:
            os.close(fd)


class SharedArea:
    """A part of it, for clients that don't map it: an aligned access is a single one of the processor's."""

    def __init__(self, memory: SharedMemory, start: int, size: int) -> None:
        self.start = start
        self.end = start + size
        self._bytes = memory.view
        self._units = memory.units

    def read(self, offset: int, size: int) -> int:
        if offset % size:
            return int.from_bytes(self._bytes[offset : offset + size], "little")
        return self._units[size][offset // size]

    def write(self, offset: int, size: int, value: int) -> None:
        if offset % size:
            self._bytes[offset : offset + size] = value.to_bytes(size, "little")
        else:
            self._units[size][offset // size] = value


def take_bar_memory(store: FdStore, devfn: int, bar: int) -> int:
    """The file with a BAR's shared memory that an earlier process left, now the caller's, or -1."""
    return store.take_one(bar_memory_name(f"{devfn:02x}.", bar))


def bar_memory_name(prefix: str, bar: int) -> str:
    """Its name in the fd store."""
    return f"{prefix}bar{bar}"
