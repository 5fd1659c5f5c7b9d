# SPDX-License-Identifier: GPL-2.0-or-later
"""Locks on an image, the same as QEMU's: neither QEMU nor another iohub opens an image that is in use.

QEMU's block/file-posix.c (raw_apply_lock_bytes(), raw_check_lock_bytes()) stands for each permission by two bytes
of the file: one is locked for reading by who uses the permission, the other by who does not share it. All locks
are shared ones; a conflict is found by looking at the other byte. They are open file description locks
(fcntl(2)), which end with the fd.
"""

from __future__ import annotations

import errno
import fcntl
import struct

from remoted.device import UsageError

__all__ = ["lock_image"]

_F_OFD_GETLK, _F_OFD_SETLK = 36, 37  # include/uapi/asm-generic/fcntl.h
_FLOCK = struct.Struct("@hhqqi4x")
"""struct flock: type, whence, start, length, pid"""

# RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE there
_USED = 100
_UNSHARED = 200
# BLK_PERM_* of include/block/block-common.h, as bit numbers
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3


def lock_image(fd: int, *, is_read_only: bool) -> None:
    """Locks the image for as long as the fd is open.

    One that may only be read shares it with other readers. Raises UsageError if it is in use, OSError.
    """
    used = (_CONSISTENT_READ,) if is_read_only else (_CONSISTENT_READ, _WRITE)
    unshared = (_WRITE, _RESIZE)
    for byte in (*(_USED + each for each in used), *(_UNSHARED + each for each in unshared)):
        try:
            fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UsageError("is in use by another process") from error
            raise
    for byte in (*(_UNSHARED + each for each in used), *(_USED + each for each in unshared)):
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
        if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            raise UsageError("is in use by another process")
