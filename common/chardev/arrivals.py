# SPDX-License-Identifier: GPL-2.0-or-later
"""Input on its way from a chardev's user to the device: delivered once, whenever the process is killed.

Where files outlive the process, there is a pipe between the two that does so as well. Input goes these steps:

1. splice(2) moves it from the user's fd into the pipe.
2. tee(2) copies it out of the pipe, and the device takes it.
3. The number of its bytes, ``delivered``, and of those in the pipe, ``held``, become valid together with the
   device's state.
4. It is taken out of the pipe.
5. ``delivered`` becomes 0 again.

A successor that finds input in the pipe delivers it, but for what was delivered and has not been taken out yet.
"""

from __future__ import annotations

import ctypes
import os

from common.disposal import count_unread
from common.fields import register, set_to_reset_values
from common.keptfiles import KeptFiles
from common.splice_h import SPLICE_F_NONBLOCK

__all__ = ["Arrivals"]

_NAMES = ("input-read", "input-write")
_PORTION_BITS = 8
_MAX_PORTION = (1 << _PORTION_BITS) - 1

_tee = ctypes.CDLL(None, use_errno=True).tee
_tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
_tee.restype = ctypes.c_ssize_t


class Arrivals:
    """The way in for one chardev's input; without files that outlive the process, a plain read(2)."""

    delivered: int = register(_PORTION_BITS)
    held: int = register(_PORTION_BITS)

    def __init__(self, files: KeptFiles | None) -> None:
        """Takes up the pipe of the previous process, or makes one. Raises OSError."""
        set_to_reset_values(self)
        self.waiting = 0
        """bytes in the pipe"""
        self._files = files
        self._pipe: tuple[int, int] | None = None
        if files is not None:
            self._copies = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                self._pipe = _take_pipe(files) or _new_pipe(files)
            except OSError:
                _close(self._copies)
                raise
            self.waiting = count_unread(self._pipe[0])

    def catch_up(self) -> None:
        """Drops what the previous process had delivered, after the registers were restored."""
        if self._pipe is not None and self.delivered:
            left = self.held - self.delivered
            if self.waiting > left:
                self._drain(self.waiting - left)
            self.delivered = 0

    def read(self, fd: int, size: int) -> bytes:
        """Up to ``size`` bytes of a non-blocking fd, or of what waits; empty at the fd's end.

        done() is to be called when the device has taken them. Raises OSError.
        """
        if self._pipe is None:
            return os.read(fd, size)
        read_end, write_end = self._pipe
        if not self.waiting:
            self.waiting = os.splice(fd, write_end, min(size, _MAX_PORTION), flags=SPLICE_F_NONBLOCK)
            if not self.waiting:
                return b""
        count: int = _tee(read_end, self._copies[1], min(size, self.waiting, _MAX_PORTION), SPLICE_F_NONBLOCK)
        if count < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return os.read(self._copies[0], count)

    def done(self, count: int) -> None:
        """The device has taken the ``count`` bytes of the last read()."""
        if self.waiting and self._files is not None:
            self.delivered, self.held = count, self.waiting
            self._files.commit()
            self._drain(count)
            self.delivered = 0
            self._files.commit()

    def close(self) -> None:
        """Closes what this process has of the pipe."""
        if self._pipe is not None:
            _close(self._pipe)
            _close(self._copies)
            self._pipe = None
            self.waiting = 0

    def _drain(self, count: int) -> None:
        assert self._pipe is not None
        self.waiting -= len(os.read(self._pipe[0], count))


def _take_pipe(files: KeptFiles) -> tuple[int, int] | None:
    read_end, write_end = (files.take(name) for name in _NAMES)
    if -1 not in (read_end, write_end):
        return read_end, write_end
    _close([fd for fd in (read_end, write_end) if fd != -1])
    for name in _NAMES:
        files.remove(name)
    return None


def _new_pipe(files: KeptFiles) -> tuple[int, int]:
    pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for name, fd in zip(_NAMES, pipe, strict=True):
            files.put(name, fd)
    except OSError:
        _close(pipe)
        raise
    return pipe


def _close(fds: tuple[int, ...] | list[int]) -> None:
    for fd in fds:
        os.close(fd)
