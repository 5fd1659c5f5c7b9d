# SPDX-License-Identifier: GPL-2.0-or-later
"""Character devices: what the far end of a serial line is. ``null``, ``pty``, ``file:PATH``, ``unix:PATH``.

A line has back-pressure in both directions: a chardev reads no more than the device has room for, and when a
reader falls behind by the size of the output buffer, write() says so and the device waits. What is written
while nobody is there is lost, as it is on a line without a plug; what somebody said who has left is still
heard. Nothing blocks.

Streams are registered edge-triggered. A pty whose slave is closed reports EPOLLHUP for as long as that lasts,
so does a client that left while the device has no room for its last characters; edge-triggered, each is
reported once, and a modify() reports what is still pending again.
"""

from __future__ import annotations

import os
import select
import socket
import termios
import tty
from collections.abc import Callable
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import Protocol

from common.errors import UsageError
from common.journal import Log, RateLimited
from common.link import peer_credentials
from common.listen import UnixListener
from common.loop import EventLoop

__all__ = ["Chardev", "Frontend", "UnixChardev", "open_chardev"]

MAX_OUTPUT = 4096
"""bytes kept for a reader that is slow"""


class Frontend(Protocol):
    """The device's side of the line."""

    def can_receive(self) -> int:
        """How many characters the device has room for."""

    def receive(self, data: bytes) -> None:
        """Characters for the device, no more than it has room for."""

    def transmit_ready(self) -> None:
        """write() takes characters again."""


class Chardev:
    """A line's far end. This one is ``null``: nothing comes, everything is lost."""

    connected = True
    """whether somebody is there"""

    def write(self, data: bytes | bytearray) -> int:
        """Takes characters and answers how many; if not all, Frontend.transmit_ready() tells when to go on."""
        return len(data)

    def resume(self) -> None:
        """The device may have room again."""

    def close(self) -> None:
        """Releases the far end. Called once."""


def open_chardev(
    spec: str, loop: EventLoop, log: Log, frontend: Frontend, on_connected: Callable[[bool], None]
) -> Chardev:
    """Opens the far end that the text describes. ``on_connected`` is told when somebody comes or goes.

    Raises UsageError for another text and for a path that can't be used.
    """
    kind, _, path = spec.partition(":")
    try:
        if spec == "null":
            return Chardev()
        if spec == "pty":
            return PtyChardev(loop, log, frontend, on_connected)
        if kind == "file" and path:
            return FileChardev(path, log)
        if kind == "unix" and path:
            return UnixChardev(path, loop, log, frontend, on_connected)
        raise UsageError("must be null, pty, file:PATH or unix:PATH")
    except UsageError as error:
        raise UsageError(f"chardev={spec}: {error}") from error


class FileChardev(Chardev):
    """Output into a file, truncated first, as QEMU's ``-chardev file``."""

    def __init__(self, path: str, log: Log) -> None:
        """Creates or truncates the file. Raises UsageError."""
        self._path = path
        self._log = RateLimited(log)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o666)
        except (OSError, ValueError) as error:
            raise UsageError(str(getattr(error, "strerror", error))) from error

    def write(self, data: bytes | bytearray) -> int:
        try:
            os.write(self._fd, data)
        except OSError as error:
            self._log.warning("chardev file %s: character lost: %s", self._path, error.strerror)
        return len(data)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)


class StreamChardev(Chardev):
    """What pty and unix have in common: one non-blocking fd at a time, read and written."""

    connected = False

    def __init__(
        self, loop: EventLoop, log: Log, frontend: Frontend, on_connected: Callable[[bool], None]
    ) -> None:
        self._loop = loop
        self._log = RateLimited(log)
        self._frontend = frontend
        self._on_connected = on_connected
        self._fd = -1
        self._hup = select.poll()
        self._output = bytearray()
        self._blocked = False  # write() hasn't taken all
        self._paused = False  # there may be input that the device had no room for

    def write(self, data: bytes | bytearray) -> int:
        if not self.connected and not self._look_again():
            return len(data)
        taken = 0
        if not self._output:
            try:
                taken = os.write(self._fd, data)
            except BlockingIOError:
                pass
            except OSError:
                self._hang_up()
                return len(data)
            if taken == len(data):
                return taken
        kept = data[taken : taken + MAX_OUTPUT - len(self._output)]
        self._output += kept
        if len(self._output) == len(kept):
            self._rearm()
        taken += len(kept)
        if taken < len(data):
            self._blocked = True
        return taken

    def resume(self) -> None:
        if self._paused and self._fd >= 0 and self._frontend.can_receive():
            self._paused = False
            self._rearm()

    def close(self) -> None:
        self.connected = False
        if self._fd >= 0:
            self._detach()

    def _attach(self, fd: int) -> None:
        """Takes ownership of a non-blocking fd."""
        self._fd = fd
        self._hup.register(fd, 0)
        self._loop.add(fd, self._on_event, EPOLLIN | EPOLLET)

    def _detach(self) -> None:
        fd, self._fd = self._fd, -1
        self._loop.remove(fd)
        self._hup.unregister(fd)
        os.close(fd)

    def _look_again(self) -> bool:
        """Whether somebody is there although nobody was."""
        return False

    def _hang_up(self) -> None:
        """Nobody is there any more."""
        self._output.clear()
        self._set_connected(False)
        if self._blocked:
            self._blocked = False
            self._frontend.transmit_ready()

    def _end_input(self) -> None:
        """Nothing more comes from who was there."""
        self._hang_up()

    def _set_connected(self, connected: bool) -> None:
        if connected is not self.connected:
            self.connected = connected
            self._on_connected(connected)

    def _is_hung_up(self) -> bool:
        return bool(self._hup.poll(0))

    def _rearm(self) -> None:
        self._loop.modify(self._fd, EPOLLIN | EPOLLET | (EPOLLOUT if self._output else 0))

    def _on_event(self, events: int) -> None:
        if events & EPOLLOUT:
            self._flush()
        if events & (EPOLLIN | EPOLLHUP | EPOLLERR):
            self._receive()

    def _flush(self) -> None:
        if self._output:
            try:
                del self._output[: os.write(self._fd, self._output)]
            except BlockingIOError:
                return
            except OSError:
                self._hang_up()
                return
        if self._output:
            return
        self._rearm()
        if self._blocked:
            self._blocked = False
            self._frontend.transmit_ready()

    def _receive(self) -> None:
        while self._fd >= 0:
            room = self._frontend.can_receive()
            if not room:
                self._paused = True
                if self._is_hung_up():
                    self._hang_up()
                return
            try:
                data = os.read(self._fd, room)
            except BlockingIOError:
                return
            except OSError:  # EIO from a pty without a slave, ECONNRESET
                data = b""
            if not data:
                self._end_input()
                return
            if not self.connected:
                self._look_again()
            self._frontend.receive(data)


class PtyChardev(StreamChardev):
    """The master of a pseudo-terminal in raw mode. Somebody is there while the slave is open.

    The kernel tells when the last slave is closed, not when one is opened: that shows when something is read
    or is to be written. When a user has gone, what he didn't read is dropped and raw mode is set again, as he
    may have left echo on.
    """

    def __init__(
        self, loop: EventLoop, log: Log, frontend: Frontend, on_connected: Callable[[bool], None]
    ) -> None:
        """Opens the pseudo-terminal and logs its name. Raises UsageError."""
        super().__init__(loop, log, frontend, on_connected)
        try:
            master, slave = os.openpty()
        except OSError as error:
            raise UsageError(str(error.strerror)) from error
        tty.setraw(slave)
        log.info("char device redirected to %s", os.ttyname(slave))
        os.close(slave)
        os.set_blocking(master, False)
        self._attach(master)

    def _look_again(self) -> bool:
        self._set_connected(not self._is_hung_up())
        return self.connected

    def _hang_up(self) -> None:
        try:
            termios.tcflush(self._fd, termios.TCOFLUSH)
            tty.setraw(self._fd)
        except termios.error as error:
            self._log.warning("chardev pty: can't be set to raw mode: %s", error)
        super()._hang_up()


class UnixChardev(StreamChardev):
    """A listening UNIX socket. One client at a time; the next one waits until the first has gone."""

    def __init__(
        self, path: str, loop: EventLoop, log: Log, frontend: Frontend, on_connected: Callable[[bool], None]
    ) -> None:
        """Binds and listens. Raises UsageError."""
        super().__init__(loop, log, frontend, on_connected)
        self._listener = UnixListener(loop, path, self._on_client, self._log)

    def close(self) -> None:
        super().close()
        self._listener.close()

    def _on_client(self, sock: socket.socket) -> None:
        self._listener.hold()
        self._log.info("%s: connected", self._listener.path, peer=str(peer_credentials(sock)))
        if self._fd >= 0:
            self._detach()  # of one that has gone, the device hasn't taken all that it said
        self._attach(sock.detach())
        self._set_connected(True)

    def _hang_up(self) -> None:
        if self.connected:
            self._listener.resume()
        super()._hang_up()

    def _end_input(self) -> None:
        super()._end_input()
        self._detach()
