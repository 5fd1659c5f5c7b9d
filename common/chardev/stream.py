# SPDX-License-Identifier: GPL-2.0-or-later
"""What pty and unix have in common: one non-blocking fd at a time, read and written.

The fd is registered edge-triggered. A pty whose slave is closed reports EPOLLHUP for as long as that lasts;
edge-triggered, it is reported once. A modify() reports what is still pending again.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT

from common.chardev.base import MAX_OUTPUT, Chardev, Frontend
from common.errors import UsageError
from common.journal import Log, RateLimited
from common.keptfiles import KeptFiles
from common.loop import EventLoop

__all__ = ["StreamChardev"]


class StreamChardev(Chardev):
    """A user is connected from its open() or connect() until both directions are closed (POLLHUP)."""

    connected = False

    def __init__(
        self,
        loop: EventLoop,
        log: Log,
        frontend: Frontend,
        on_connected: Callable[[bool], None],
        files: KeptFiles | None,
    ) -> None:
        """Raises UsageError."""
        try:
            super().__init__(files)
        except OSError as error:
            raise UsageError(str(error.strerror)) from error
        self._files = files
        self._max_output = MAX_OUTPUT if files is None else 0  # what is buffered here dies with the process
        self._loop = loop
        self._log = RateLimited(log)
        self._frontend = frontend
        self._on_connected = on_connected
        self._fd = -1
        self._hup = select.poll()
        self._output = bytearray()
        self._blocked = False  # write() hasn't taken all
        self._paused = False  # there may be input that the device had no room for
        self._dropped_before = 0  # dropped_output at the last change of connected

    def write(self, data: bytes | bytearray) -> int:
        if not self.connected and not self._look_again():
            self.dropped_output += len(data)
            return len(data)
        taken = 0
        if not self._output:
            try:
                taken = os.write(self._fd, data)
            except BlockingIOError:
                pass
            except OSError:
                self.dropped_output += len(data)
                self._on_write_error()
                return len(data)
            if taken == len(data):
                return taken
        is_waiting = self._blocked or bool(self._output)
        kept = data[taken : taken + self._max_output - len(self._output)]
        self._output += kept
        taken += len(kept)
        if taken < len(data):
            self._blocked = True
        if not is_waiting:
            self._rearm()
        return taken

    def resume(self) -> None:
        if self._paused and self._has_input() and self._frontend.can_receive():
            self._paused = False
            self._wake_input()

    def amiss(self) -> Iterator[str]:
        dropped = self.dropped_output - self._dropped_before
        if dropped and not self.connected:
            yield f"{dropped} bytes of output dropped: nobody is connected to {self._name()}"

    def close(self) -> None:
        self.connected = False
        if self._fd >= 0:
            self._close_fd(self._detach())
        self.arrivals.close()

    def _name(self) -> str:
        """The path that a user opens or connects to."""
        raise NotImplementedError

    def _attach(self, fd: int) -> None:
        """Watches a non-blocking fd. Raises OSError, and then the fd is still the caller's."""
        self._loop.add(fd, self._on_event, EPOLLIN | EPOLLET)
        self._hup.register(fd, 0)
        self._fd = fd

    def _detach(self) -> int:
        """Stops to watch the fd, and returns it."""
        fd, self._fd = self._fd, -1
        self._loop.remove(fd)
        self._hup.unregister(fd)
        return fd

    def _close_fd(self, fd: int) -> None:
        os.close(fd)

    def _read(self, size: int) -> bytes:
        """Input, ``size`` bytes at most; empty at its end. Raises OSError."""
        return self.arrivals.read(self._fd, size)

    def _has_input(self) -> bool:
        """Whether there is a source of input; it may have none at present."""
        return self._fd >= 0

    def _wake_input(self) -> None:
        """Lets the loop call _receive() if there is input."""
        self._rearm()

    def _look_again(self) -> bool:
        """Checks for a user that no event has reported; returns ``connected``."""
        return False

    def _hang_up(self) -> None:
        """The user has left."""
        self._drop_output()
        self._set_connected(False)

    def _drop_output(self) -> None:
        self.dropped_output += len(self._output)
        self._output.clear()
        self._unblock()

    def _unblock(self) -> None:
        if self._blocked:
            self._blocked = False
            self._frontend.transmit_ready()

    def _on_write_error(self) -> None:
        """The user has left, or has shut down the direction of output."""
        if self._is_hung_up():
            self._hang_up()
        else:
            self._drop_output()

    def _on_end_of_input(self) -> None:
        """The user has left, or has shut down the direction of input."""
        if self._is_hung_up():
            self._hang_up()

    def _set_connected(self, connected: bool) -> None:
        if connected is not self.connected:
            self.connected = connected
            self._dropped_before = self.dropped_output
            self._on_connected(connected)

    def _is_hung_up(self) -> bool:
        return bool(self._hup.poll(0))

    def _rearm(self) -> None:
        self._loop.modify(self._fd, EPOLLIN | EPOLLET | (EPOLLOUT if self._output or self._blocked else 0))

    def _on_event(self, events: int) -> None:
        if events & EPOLLOUT or self._output:  # only a write tells that a client reads no more
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
                self._on_write_error()
                return
        if self._output:
            return
        is_blocked, self._blocked = self._blocked, False
        self._rearm()
        if is_blocked:
            self._frontend.transmit_ready()

    def _receive(self) -> None:
        while self._has_input():
            room = self._frontend.can_receive()
            if not room:
                self._paused = True
                if self._is_hung_up():
                    self._hang_up()
                return
            try:
                data = self._read(room)
            except BlockingIOError:
                return
            except OSError:  # EIO from a pty without a slave, ECONNRESET
                data = b""
            if not data:
                self._on_end_of_input()
                return
            if not self.connected:
                self._look_again()
            self._frontend.receive(data)
            self.arrivals.done(len(data))
