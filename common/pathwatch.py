# SPDX-License-Identifier: GPL-2.0-or-later
"""Tells when somebody begins to listen at the path of a UNIX socket, by inotify(7) on its directory.

It is an addition to polling, not a replacement: a directory that isn't there, or a system without inotify
instances to spare, is no error, and then nothing is told.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from select import EPOLLIN

from common import inotify
from common.loop import Loop
from common.socketpath import lock_path

__all__ = ["PathWatch"]

# <sys/inotify.h>
_IN_MOVED_TO = 0x00000080
_IN_CREATE = 0x00000100
_IN_DELETE = 0x00000200
_IN_Q_OVERFLOW = 0x00004000
_IN_IGNORED = 0x00008000
_IN_ONLYDIR = 0x01000000
_EVENT = struct.Struct("iIII")
"""struct inotify_event: wd, mask, cookie, length of the name that follows"""

_READ_SIZE = 4096
_READS = 16
_WINDOW_SECONDS = 0.02
"""A user who can write to the directory can cause events endlessly: at most so many reads in this time."""


class PathWatch:
    """Watches any number of paths. Belongs to the loop's thread."""

    def __init__(self, loop: Loop, on_listening: Callable[[str], None]) -> None:
        """``on_listening(path)``: there is a new socket at a watched path, to which one may connect by now.

        A socket of common.listen.UnixListener listens by then. Another one may still be between bind(2) and
        listen(2). What is there need not be a socket, and may be gone again.
        """
        self._loop = loop
        self._on_listening = on_listening
        self._directories: dict[int, dict[str, str]] = {}
        """by watch descriptor: the paths, by their own names and by those of their lock files"""
        self._window = 0.0
        self._reads = 0
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = inotify.init()
            loop.add(self._fd, self._on_events)

    def watch(self, path: str) -> None:
        """Watches the path from now on.

        To be called before each attempt to connect: the directory may have been made, or made anew, since the last
        call. Does nothing if it can't be watched.
        """
        if self._fd == -1:
            return
        directory, name = os.path.split(path)
        mask = _IN_CREATE | _IN_MOVED_TO | _IN_DELETE | _IN_ONLYDIR
        with contextlib.suppress(OSError):
            descriptor = inotify.add_watch(self._fd, directory or ".", mask)
            paths = self._directories.setdefault(descriptor, {})
            paths[name] = paths[os.path.basename(lock_path(path))] = path

    def close(self) -> None:
        """Watches nothing any more. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd != -1:
            self._loop.remove(fd)
            os.close(fd)

    def _on_events(self, _events: int) -> None:
        now = self._loop.time()
        if now - self._window >= _WINDOW_SECONDS:
            self._window, self._reads = now, 0
        self._reads += 1
        if self._reads == _READS:
            self._loop.modify(self._fd, 0)
            self._loop.call_later(_WINDOW_SECONDS, self._go_on)
        try:
            events = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return
        for path in dict.fromkeys(self._listening(events)):
            self._on_listening(path)

    def _go_on(self) -> None:
        if self._fd != -1:
            self._loop.modify(self._fd, EPOLLIN)

    def _listening(self, events: bytes) -> Iterator[str]:
        """The watched paths that the events concern."""
        start = 0
        while start < len(events):
            descriptor, mask, _, length = _EVENT.unpack_from(events, start)
            start += _EVENT.size + length
            if mask & _IN_Q_OVERFLOW:
                for paths in self._directories.values():
                    yield from paths.values()
            elif mask & _IN_IGNORED:
                self._directories.pop(descriptor, None)
            else:
                name = os.fsdecode(events[start - length : start].rstrip(b"\0"))
                path = self._directories.get(descriptor, {}).get(name)
                if path is not None and _listens(path, name, mask):
                    yield path


def _listens(path: str, name: str, mask: int) -> bool:
    """Whether the event of that name tells that there is a listener: the lock file goes when there is one."""
    lock = lock_path(path)
    if name == os.path.basename(lock):
        return bool(mask & _IN_DELETE)
    return not mask & _IN_DELETE and not os.path.lexists(lock)
