# SPDX-License-Identifier: GPL-2.0-or-later
"""inotify(7), which Python's library doesn't have."""

from __future__ import annotations

import ctypes
import os

__all__ = ["IN_OPEN", "add_watch", "init"]

# <sys/inotify.h>
IN_OPEN = 0x00000020

_libc = ctypes.CDLL(None, use_errno=True)
_inotify_init1 = _libc.inotify_init1
_inotify_init1.argtypes = (ctypes.c_int,)
_inotify_add_watch = _libc.inotify_add_watch
_inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


def init() -> int:
    """A new instance: a non-blocking fd that becomes readable with events. Raises OSError, EMFILE by user."""
    fd = int(_inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if fd == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return fd


def add_watch(fd: int, path: str, mask: int) -> int:
    """The watch descriptor of a path, whose mask is set to this one. Raises OSError."""
    descriptor = int(_inotify_add_watch(fd, os.fsencode(path), mask))
    if descriptor == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), path)
    return descriptor
