# SPDX-License-Identifier: GPL-2.0-or-later
"""``pty``: the line ends in a pseudo-terminal, which a user opens."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import termios
import tty
from collections.abc import Callable

from common import inotify
from common.chardev.base import Frontend
from common.chardev.stream import StreamChardev
from common.errors import UsageError
from common.journal import Log
from common.keptfiles import KeptFiles
from common.loop import EventLoop
from common.messages import Event

__all__ = ["PtyChardev"]

_READ_SIZE = 4096
_MASTER = "pty"
"""its name in the fd store"""
_TIOCGPTN = 0x80045430  # include/uapi/asm-generic/ioctls.h; os.ptsname() is there since Python 3.13


class PtyChardev(StreamChardev):
    """The master of a pseudo-terminal in raw mode. A user is connected while the slave is open.

    The master's fd reports when the last slave is closed, but not when one is opened: inotify reports that. When a
    user has left, the output that was not read is dropped and raw mode is set again: the user may have set echo.
    """

    def __init__(
        self,
        loop: EventLoop,
        log: Log,
        frontend: Frontend,
        on_connected: Callable[[bool], None],
        files: KeptFiles | None = None,
    ) -> None:
        """Opens the pseudo-terminal, or takes up that of the previous process, and logs its name.

        Raises UsageError.
        """
        super().__init__(loop, log, frontend, on_connected, files)
        self._inotify = -1
        master = -1
        try:
            if files is not None:
                master = files.take(_MASTER)
            is_new = master == -1
            if is_new:
                master = _open()
            self._path = _slave_path(master)
            if is_new and files is not None:
                files.put(_MASTER, master)
            self._attach(master)
        except OSError as error:
            if master != -1:
                os.close(master)
            self.arrivals.close()
            raise UsageError(str(error.strerror)) from error
        self._log.info("char device redirected to %s", self._path, event=Event.CHARDEV_AT)
        self._watch_opens()
        if not is_new:
            self._look_again()
            if self.arrivals.waiting:
                loop.call_later(0, self._receive)

    def close(self) -> None:
        super().close()
        if self._inotify != -1:
            self._loop.remove(self._inotify)
            os.close(self._inotify)

    def _name(self) -> str:
        return self._path

    def _watch_opens(self) -> None:
        fd = -1
        try:
            fd = inotify.init()
            inotify.add_watch(fd, self._path, inotify.IN_OPEN)
            self._loop.add(fd, self._on_open)
        except OSError as error:
            self._log.warning(
                "%s: a user is noticed at the first byte in either direction, not at open(): %s",
                self._path,
                error.strerror,
                event=Event.CHARDEV_LIMITED,
            )
            if fd != -1:
                os.close(fd)
        else:
            self._inotify = fd

    def _on_open(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._inotify, _READ_SIZE)
        if not self.connected:
            self._look_again()

    def _look_again(self) -> bool:
        self._set_connected(not self._is_hung_up())
        return self.connected

    def _hang_up(self) -> None:
        try:
            # TCSAFLUSH would wait for a next user who is blocked in a write (set_termios() in tty_ioctl.c).
            tty.setraw(self._fd, termios.TCSANOW)
            if self.connected:
                self._drop_unread()
        except (OSError, termios.error) as error:
            self._log.warning(
                "%s can't be reset after its user: %s", self._path, error, event=Event.CHARDEV_LIMITED
            )
        super()._hang_up()

    def _drop_unread(self) -> None:
        """Drops the output in the terminal. Only once for each user: the close() here causes another EPOLLHUP."""
        termios.tcflush(self._fd, termios.TCOFLUSH)
        slave = os.open(self._path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            termios.tcflush(slave, termios.TCIFLUSH)
        finally:
            os.close(slave)

    def _on_end_of_input(self) -> None:
        # The slave had been closed when the read failed; the next user may have opened it since.
        self._hang_up()
        self._look_again()


def _open() -> int:
    """The master of a new pseudo-terminal in raw mode. Raises OSError."""
    master, slave = os.openpty()
    tty.setraw(slave)
    os.close(slave)
    os.set_blocking(master, False)
    return master


def _slave_path(master: int) -> str:
    number = array.array("i", [0])
    fcntl.ioctl(master, _TIOCGPTN, number)
    return f"/dev/pts/{number[0]}"
