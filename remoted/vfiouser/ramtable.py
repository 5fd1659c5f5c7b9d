# SPDX-License-Identifier: GPL-2.0-or-later
"""The regions of RAM that a vfio-user client has mapped, in memory that outlives the process.

A client may map thousands of regions, one by one, so a request changes a single row. Each row has the number of
the change that added it, and of the one that dropped it, 0 as long as there is none. The number of the last valid
change is kept elsewhere: a row is valid if it was added up to then, and not dropped up to then. Each of the two
numbers is written by one store, which a kill can't divide.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from common.vfiouser import MAX_DMA_MAPS
from remoted.ramregions import FileKey

__all__ = ["TABLE_SIZE", "RamEntry", "RamTable"]

_ROW = Struct("<QQQQQ???5x16x")
"""an entry, and room for two numbers"""
_WORDS = _ROW.size // 8
_ADDED, _DROPPED = _WORDS - 2, _WORDS - 1
_ENTRY = Struct("<QQQQQ???")
_ALWAYS_DROPPED = 1
"""no row was added before the first change"""
TABLE_SIZE = _ROW.size * (MAX_DMA_MAPS + 1)
"""in bytes; the last row is never used, and ends the table"""


class RamEntry(NamedTuple):
    """A region of RAM."""

    start: int
    size: int
    offset: int
    device: int
    inode: int
    """of the file; device and inode are 0 for a region without one"""
    is_writable: bool
    """whether the file can be written"""
    can_read: bool
    can_write: bool

    @property
    def file(self) -> FileKey | None:
        """The region's file; None for one without."""
        return (self.device, self.inode, self.is_writable) if self.device or self.inode else None


class RamTable:
    """The rows, and which of them are in use."""

    def __init__(self, view: memoryview) -> None:
        """``view`` is the memory, TABLE_SIZE bytes, zeros at first."""
        self._view = view
        self._words = view.cast("Q")
        self._entries: dict[int, tuple[int, RamEntry]] = {}
        """by address: number of the row, and what it holds"""
        self._free: list[int] = []
        self._end = 0
        """the first row that was never used"""

    def close(self) -> None:
        """Releases the memory."""
        self._words.release()
        self._view.release()

    def __iter__(self) -> Iterator[int]:
        """The addresses of all regions."""
        return iter(list(self._entries))

    def get(self, start: int) -> RamEntry | None:
        """The region at that address."""
        return self._entries[start][1] if start in self._entries else None

    def add(self, entry: RamEntry, change: int) -> None:
        """Adds a region, which is valid from that change on, in place of another at its address.

        The change before is valid.
        """
        old = self._entries.get(entry.start)
        row = self._free.pop() if self._free else self._end
        self._words[row * _WORDS + _ADDED] = change  # which takes the row out of use, whatever it has held
        _ENTRY.pack_into(self._view, row * _ROW.size, *entry)
        self._words[row * _WORDS + _DROPPED] = 0
        self._end = max(self._end, row + 1)
        self._entries[entry.start] = row, entry
        if old is not None:
            self._leave(old[0], change)

    def drop(self, start: int, change: int) -> RamEntry:
        """Drops the region at that address, which is not valid from that change on. Returns it.

        Its row is used again by the next change at the earliest.
        """
        row, entry = self._entries.pop(start)
        self._leave(row, change)
        return entry

    def clear(self) -> None:
        """Makes all rows unused. None may be valid."""
        self._find_end()
        self._view[: self._end * _ROW.size] = bytes(self._end * _ROW.size)
        self._entries, self._free, self._end = {}, [], 0

    def resume(self, change: int) -> list[RamEntry]:
        """The regions that are valid with that change. What a later one has begun is undone."""
        self._find_end()
        for row in range(self._end):
            added, dropped = self._words[row * _WORDS + _ADDED], self._words[row * _WORDS + _DROPPED]
            if added <= change and (not dropped or dropped > change):
                self._words[row * _WORDS + _DROPPED] = 0
                entry = RamEntry._make(_ENTRY.unpack_from(self._view, row * _ROW.size))
                self._entries[entry.start] = row, entry
            else:
                self._words[row * _WORDS + _DROPPED] = _ALWAYS_DROPPED
                self._free.append(row)
        return [entry for _, entry in self._entries.values()]

    def _leave(self, row: int, change: int) -> None:
        self._words[row * _WORDS + _DROPPED] = change
        self._free.append(row)

    def _find_end(self) -> None:
        self._end = 0
        while self._words[self._end * _WORDS + _ADDED]:
            self._end += 1
