# SPDX-License-Identifier: GPL-2.0-or-later
"""What a namespace's blocks are stored in: a raw image, a block device, or memory.

All offsets and sizes are in bytes. Methods raise OSError, and all but try_read() and try_write() may wait for a
disk, or for the server of a filesystem: they are to be called in a thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Sequence

from common.keptfiles import KeptFiles
from remoted.device import UsageError
from remoted.devices.nvme.image import close_image, open_image

__all__ = ["Drive", "open_drive"]

# include/uapi/linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_FALLOC_FL_ZERO_RANGE = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_CHUNK = 1 << 20
_SIZE = r"([1-9][0-9]{0,15})([KMGT]?)"
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_MAX_SIZE = 1 << 62
_KEPT_NAME = "memory"
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""what fallocate(2), or RWF_NOWAIT, is answered with where the filesystem or driver doesn't have it"""

Buffers = Sequence[bytes | bytearray | memoryview]


class Drive:
    """An open image. Owns its fd."""

    def __init__(self, fd: int, size: int, *, is_read_only: bool, is_memory: bool) -> None:
        self._fd = fd
        self.size = size
        self.is_read_only = is_read_only
        self.is_memory = is_memory
        """whether reads and writes never wait"""
        self._flags = 0 if is_memory else os.RWF_NOWAIT
        self._can_try_read = True
        self._can_try_write = not is_read_only

    @property
    def is_closed(self) -> bool:
        return self._fd == -1

    def close(self) -> None:
        """Closes the image, or lets it be closed if that lasts; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd != -1:
            close_image(fd)

    def try_read(self, offset: int, buffers: Sequence[bytearray | memoryview], size: int) -> bool:
        """Fills the buffers, of ``size`` bytes in all, without waiting; False if that isn't possible.

        Never raises OSError: read() tells what is wrong.
        """
        if not self._can_try_read:
            return False
        try:
            return os.preadv(self._fd, buffers, offset, self._flags) == size
        except OSError as error:
            self._can_try_read = error.errno not in _NOT_SUPPORTED
            return False

    def try_write(self, offset: int, buffers: Buffers, size: int) -> bool:
        """Writes the buffers, of ``size`` bytes in all, without waiting; False if that isn't possible.

        Some of it may have been written then. Never raises OSError: write() tells what is wrong.
        """
        if not self._can_try_write:
            return False
        try:
            return os.pwritev(self._fd, buffers, offset, self._flags) == size
        except OSError as error:
            self._can_try_write = error.errno not in _NOT_SUPPORTED
            return False

    def read(self, offset: int, size: int) -> bytearray:
        """So many bytes."""
        data = bytearray(size)
        with memoryview(data) as view:
            done = 0
            while done < size:
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if not count:
                    raise OSError(errno.EIO, "the image has become smaller")
                done += count
        return data

    def write(self, offset: int, buffers: Buffers, *, is_durable: bool) -> None:
        """Writes the buffers, and returns when they are on the medium if ``is_durable``."""
        rest = [memoryview(each) for each in buffers]
        while rest:
            count = os.pwritev(self._fd, rest, offset)
            if not count:
                raise OSError(errno.EIO, "nothing was written")
            offset += count
            while rest and count >= len(rest[0]):
                count -= len(rest.pop(0))
            if count:
                rest[0] = rest[0][count:]
        if is_durable:  # RWF_DSYNC has no effect on some filesystems, FUSE's direct I/O among them
            self.flush()

    def flush(self) -> None:
        """Returns when everything that was written is on the medium."""
        if not self.is_read_only and not self.is_memory:
            os.fdatasync(self._fd)

    def zero(self, offset: int, size: int, *, may_deallocate: bool, is_durable: bool) -> None:
        """Makes a range read as zeros, and gives its space back if ``may_deallocate`` and the image can do it."""
        is_done = may_deallocate and self._allocate(_FALLOC_FL_PUNCH_HOLE, offset, size)
        if not is_done and not self._allocate(_FALLOC_FL_ZERO_RANGE, offset, size):
            zeros = bytes(min(size, _CHUNK))
            for start in range(0, size, _CHUNK):
                self.write(offset + start, [zeros[: size - start]], is_durable=False)
        if is_durable:
            self.flush()

    def deallocate(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Gives the space of ranges (offset, size) back where the image can do it; they read as zeros then."""
        for offset, size in ranges:
            if size and not self._allocate(_FALLOC_FL_PUNCH_HOLE, offset, size):
                return

    def _allocate(self, mode: int, offset: int, size: int) -> bool:
        """fallocate(2); False where the image doesn't have this mode."""
        if _fallocate(self._fd, mode | _FALLOC_FL_KEEP_SIZE, offset, size) == 0:
            return True
        code = ctypes.get_errno()
        if code in _NOT_SUPPORTED:
            return False
        raise OSError(code, os.strerror(code))


def open_drive(text: str, files: KeptFiles | None) -> Drive:
    """The drive of the option ``drive=``: ``file:PATH`` or ``memory:SIZE``. Raises UsageError.

    Memory is kept in ``files``, where there are any, and found there by the next process.
    """
    kind, _, rest = text.partition(":")
    if kind == "memory" and rest:
        return _open_memory(rest, files)
    if kind == "file" and rest:
        return _open_image(rest)
    raise UsageError(f"drive={text}: must be file:PATH or memory:SIZE")


def _open_memory(text: str, files: KeptFiles | None) -> Drive:
    match = re.fullmatch(_SIZE, text)
    if not match:
        raise UsageError(
            f"drive=memory:{text}: must be a number of bytes, or one with K, M, G or T, such as 64M"
        )
    size = int(match[1]) << _UNITS[match[2]]
    if size > _MAX_SIZE:
        raise UsageError(f"drive=memory:{text}: is too large")
    fd = -1
    try:
        if files is not None:
            fd = files.take(_KEPT_NAME)
            if fd != -1 and os.fstat(fd).st_size != size:
                os.close(fd)
                fd = -1
                files.remove(_KEPT_NAME)
        if fd == -1:
            fd = os.memfd_create("nvme", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
            if files is not None:
                files.put(_KEPT_NAME, fd)
    except OSError as error:
        if fd != -1:
            os.close(fd)
        raise UsageError(f"drive=memory:{text}: {error.strerror}") from error
    return Drive(fd, size, is_read_only=False, is_memory=True)


def _open_image(path: str) -> Drive:
    try:
        image = open_image(path)
    except UsageError as error:
        raise UsageError(f"drive=file:{path}: {error}") from error
    return Drive(image.fd, image.size, is_read_only=image.is_read_only, is_memory=False)
