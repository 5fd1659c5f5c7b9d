# SPDX-License-Identifier: GPL-2.0-or-later
"""Output that a chardev has taken and its file has not: in memory that may outlive the process."""

from __future__ import annotations

import mmap
import os

from common.chardev.base import MAX_OUTPUT
from common.keptfiles import KeptFiles

__all__ = ["PendingOutput"]

_NAME = "output"
_HEADER = 24
_TAKEN, _WRITTEN, _DROPPED = range(3)


class PendingOutput:
    """A ring of MAX_OUTPUT bytes, and the numbers of bytes that have come and gone.

    Each number changes by one store, which a kill can't divide, and only when what it counts is in place.
    """

    def __init__(self, files: KeptFiles | None) -> None:
        """Takes up the memory of the previous process, if there is one. Raises OSError."""
        fd = -1 if files is None else files.take(_NAME)
        if files is not None and fd == -1:
            fd = os.memfd_create("iohub-output", os.MFD_CLOEXEC)
            os.ftruncate(fd, _HEADER + MAX_OUTPUT)
            files.put(_NAME, fd)
        self._map = mmap.mmap(fd, _HEADER + MAX_OUTPUT)
        if fd != -1:
            os.close(fd)
        self._numbers = memoryview(self._map)[:_HEADER].cast("Q")
        self._ring = memoryview(self._map)[_HEADER:]

    def close(self) -> None:
        """Unmaps the memory."""
        self._numbers.release()
        self._ring.release()
        self._map.close()

    def __len__(self) -> int:
        return self._numbers[_TAKEN] - self._numbers[_WRITTEN]

    @property
    def position(self) -> int:
        """How many bytes were written into the file before."""
        return self._numbers[_WRITTEN] - self._numbers[_DROPPED]

    def begin_file(self) -> None:
        """What is to be written next goes to the beginning of a file."""
        self._numbers[_DROPPED] = self._numbers[_WRITTEN]

    def put(self, data: bytes | bytearray) -> int:
        """Takes as much as there is room for; returns how much."""
        data = data[: MAX_OUTPUT - len(self)]
        start = self._numbers[_TAKEN] % MAX_OUTPUT
        first = data[: MAX_OUTPUT - start]
        self._ring[start : start + len(first)] = first
        self._ring[: len(data) - len(first)] = data[len(first) :]
        self._numbers[_TAKEN] += len(data)
        return len(data)

    def peek(self, limit: int) -> bytes:
        """What is to be written next, ``limit`` bytes at most."""
        start = self._numbers[_WRITTEN] % MAX_OUTPUT
        return bytes(self._ring[start : start + min(len(self), limit)])

    def done(self, count: int, *, is_dropped: bool = False) -> None:
        """So many bytes are in the file, or are dropped."""
        self._numbers[_WRITTEN] += count
        if is_dropped:
            self._numbers[_DROPPED] += count
