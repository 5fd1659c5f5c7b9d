# SPDX-License-Identifier: GPL-2.0-or-later
"""Regions of the guest's RAM: what a client may tell of one, checked before anything is done with its file."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import NamedTuple

from common.disposal import is_memory
from common.errors import ProtocolError

__all__ = ["FileKey", "MapError", "Region", "check_range", "check_region", "file_key"]

_F_SEAL_FUTURE_WRITE = 0x0010  # include/uapi/linux/fcntl.h
_READ_ONLY_SEALS = fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE

FileKey = tuple[int, int, bool]
"""device, inode, whether it can be written"""


class MapError(ProtocolError):
    """A region that can't be mapped or unmapped; ``code`` is the errno for the client."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Region(NamedTuple):
    """Addresses of the guest's RAM, and where it is."""

    start: int
    end: int
    """the address behind it"""
    fd: int
    """-1 for one that this process can't reach"""
    offset: int
    """of the start in the file"""
    page_size: int
    """of the filesystem"""
    can_vanish: bool
    """whether its file's owner can take pages away for good"""
    can_read: bool = True
    """whether devices may read it"""
    can_write: bool = True
    """whether devices may write it"""


def file_key(fd: int) -> FileKey:
    """What fds have in common that can stand for each other: the file, and whether they can write.

    Raises OSError.
    """
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def _describe(start: int, size: int, offset: int) -> str:
    return f"RAM at {start:#x}, {size:#x} bytes from offset {offset:#x}"


def check_range(start: int, size: int, offset: int) -> None:
    """Raises ProtocolError for a region that is impossible or not page-aligned, wherever it is."""
    if size == 0 or offset < 0 or start + size > 1 << 64:
        raise ProtocolError(f"{_describe(start, size, offset)}: impossible")
    if (start | size | offset) % mmap.PAGESIZE:
        raise ProtocolError(f"{_describe(start, size, offset)}: not page-aligned")


def check_region(start: int, size: int, offset: int, fd: int, must_write: bool = True) -> Region:
    """The region of these bytes of a file. Asks nothing of a filesystem other than tmpfs and hugetlbfs.

    Raises ProtocolError unless it is page-aligned and lies within the file, which is on one of these, can be read,
    and can be written if it ``must``.
    """
    where = _describe(start, size, offset)
    check_range(start, size, offset)
    if not is_memory(fd):  # any other filesystem might never answer fstat() or a fault
        raise ProtocolError(f"{where}: the fd is neither a memfd nor a file on tmpfs or hugetlbfs")
    file_size = os.fstat(fd).st_size
    if offset + size > file_size:
        raise ProtocolError(f"{where}: the file has only {file_size:#x} bytes")
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if mode == os.O_WRONLY:
        raise ProtocolError(f"{where}: the file can only be written")
    if must_write and (mode != os.O_RDWR or seals & _READ_ONLY_SEALS):
        raise ProtocolError(f"{where}: the file can only be read")
    # st_blksize is that of huge pages on tmpfs, too, where transparent ones are enabled.
    page_size = os.fstatvfs(fd).f_bsize
    can_vanish = not seals & fcntl.F_SEAL_SHRINK or page_size != mmap.PAGESIZE
    return Region(start, start + size, fd, offset, page_size, can_vanish)
