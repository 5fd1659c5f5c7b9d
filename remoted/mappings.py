# SPDX-License-Identifier: GPL-2.0-or-later
"""Parts of the guest's RAM that stay mapped, as devices access the same ones again and again.

To map and unmap a page costs several times what a small transfer does. What stays mapped is bounded, and only of
files that can't shrink: a process that touches a mapped page that is gone dies of SIGBUS.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import OrderedDict
from collections.abc import Iterable

__all__ = ["Mappings"]

_SHIFT = 21
_SIZE = 1 << _SHIFT
"""bytes of one mapping"""
_MAX_MAPPINGS = 16
"""of which the least recently used makes room"""


class Mappings:
    """The mappings of one memory; offsets and sizes are in bytes."""

    def __init__(self) -> None:
        self._windows: OrderedDict[tuple[int, int], tuple[mmap.mmap, memoryview]] = OrderedDict()
        """by fd and number of the part of the file"""

    def view(self, fd: int, start: int, end: int, limit: int) -> memoryview | None:
        """The bytes between two offsets of a file, to be released by the caller; None if one mapping can't have
        them all.

        The file is sealed against shrinking, and has at least ``limit`` bytes, whole pages. Raises OSError.
        """
        number = start >> _SHIFT
        base = number << _SHIFT
        key = fd, number
        pages, window = self._windows.get(key, (None, b""))
        if end - base > len(window):
            if end - base > _SIZE:
                return None
            if pages is not None:
                self._drop([key])
            elif len(self._windows) >= _MAX_MAPPINGS:
                self._drop([next(iter(self._windows))])
            pages = mmap.mmap(fd, min(_SIZE, limit - base), offset=base)
            pages.madvise(mmap.MADV_DONTDUMP)
            window = memoryview(pages)
            self._windows[key] = pages, window
        else:
            self._windows.move_to_end(key)
        return memoryview(window)[start - base : end - base]

    def drop(self, fd: int) -> None:
        """Unmaps what is mapped of a file, but for views that a device has kept."""
        self._drop([key for key in self._windows if key[0] == fd])

    def drop_all(self) -> None:
        """Unmaps everything, but for views that a device has kept."""
        self._drop(list(self._windows))

    def _drop(self, keys: Iterable[tuple[int, int]]) -> None:
        for key in keys:
            pages, window = self._windows.pop(key)
            window.release()
            with contextlib.suppress(BufferError):  # it is unmapped with its last view
                pages.close()
