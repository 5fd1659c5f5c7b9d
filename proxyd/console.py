# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's console: a 16550A at COM1 whose line is a UNIX socket, as QEMU's ``-serial unix:`` is."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from select import EPOLLIN, EPOLLOUT

from common.journal import Log, RateLimited
from common.listen import UnixListener
from common.loop import Loop, Timer
from common.uart import Uart16550

__all__ = ["COM1_IRQ", "COM1_PORTS", "Console"]

COM1_PORTS = range(0x3F8, 0x400)
COM1_IRQ = 4

_MAX_PENDING = 1 << 16
"""bytes kept for a client that isn't there yet, or doesn't read; later ones are lost"""


class _Alarm:
    """The chip's timer, set from any thread: however often a guest sets it, the loop has one timer for it."""

    def __init__(self, loop: Loop, lock: threading.RLock) -> None:
        """``lock`` is held by who sets or cancels it, and when it goes off."""
        self._loop = loop
        self._lock = lock
        self._callback: Callable[[], None] | None = None
        self._due = 0.0
        self._timer: Timer | None = None
        self._is_queued = False

    def set(self, seconds: float, callback: Callable[[], None]) -> _Alarm:
        """Calls ``callback()`` once, in the loop's thread."""
        self._callback = callback
        self._due = self._loop.time() + seconds
        if not self._is_queued:
            self._is_queued = True
            self._loop.call_soon_threadsafe(self._arm)
        return self

    def cancel(self) -> None:
        self._callback = None

    def _arm(self) -> None:
        with self._lock:
            self._is_queued = False
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            if self._callback is not None:
                self._timer = self._loop.call_later(self._due - self._loop.time(), self._fire)

    def _fire(self) -> None:
        with self._lock:
            self._timer = None
            callback = self._callback
            if callback is not None and not self._is_queued:
                self._callback = None
                callback()


class Console:
    """COM1. Register accesses come from the vCPU's thread, characters from the loop's; one client at a time."""

    def __init__(self, loop: Loop, path: str, set_irq: Callable[[bool], None], log: Log) -> None:
        """Listens at the path. Raises UsageError."""
        self._loop = loop
        self._lock = threading.RLock()
        self._client: socket.socket | None = None
        self._events = 0
        """what the loop watches the client for; it doesn't know the client while that is nothing"""
        self._output = bytearray()
        self._is_flush_queued = False
        self._is_update_queued = False
        self._uart = Uart16550(set_irq, self._transmit, _Alarm(loop, self._lock).set, self._input_ready)
        self._listener = UnixListener(loop, path, self._on_connect, RateLimited(log))

    def read(self, port: int) -> int:
        """One byte of a register, from the vCPU's thread."""
        with self._lock:
            return self._uart.read(port & 7)

    def write(self, port: int, value: int) -> None:
        """One byte to a register, from the vCPU's thread."""
        with self._lock:
            self._uart.write(port & 7, value)

    def reset(self) -> None:
        """Resets the chip; the line stays connected."""
        with self._lock:
            self._uart.reset()

    def close(self) -> None:
        """Hangs up and unlinks the socket."""
        self._listener.close()
        self._hang_up()

    def _transmit(self, byte: int) -> bool:
        if len(self._output) < _MAX_PENDING:
            self._output.append(byte)
            if not self._is_flush_queued:
                self._is_flush_queued = True
                self._loop.call_soon_threadsafe(self._flush)
        return True

    def _input_ready(self) -> None:
        if not self._is_update_queued:
            self._is_update_queued = True
            self._loop.call_soon_threadsafe(self._update_events)

    def _on_connect(self, sock: socket.socket) -> None:
        if self._client is not None:
            if not _has_hung_up(self._client):
                sock.close()
                return
            self._hang_up()  # the guest hasn't read all it said
        self._client = sock
        self._flush()

    def _on_client(self, events: int) -> None:
        if self._client is None:
            return
        if events & EPOLLOUT:
            self._flush()
        if events & ~EPOLLOUT:
            self._receive()

    def _receive(self) -> None:
        with self._lock:
            room = self._uart.can_receive()
            if room and self._client is not None:
                try:
                    data = self._client.recv(room)
                except BlockingIOError:
                    return
                except OSError:
                    data = b""
                if data:
                    self._uart.receive(data)
                else:
                    self._hang_up()
        self._update_events()

    def _flush(self) -> None:
        with self._lock:
            self._is_flush_queued = False
            if self._client is not None and self._output:
                try:
                    del self._output[: self._client.send(self._output)]
                except BlockingIOError:
                    pass
                except OSError:
                    self._hang_up()
        self._update_events()

    def _update_events(self) -> None:
        """Reads the client only while the chip has room, and waits for it only while something is pending."""
        with self._lock:
            self._is_update_queued = False
            if self._client is not None:
                wanted = EPOLLIN if self._uart.can_receive() else 0
                self._watch(wanted | (EPOLLOUT if self._output else 0))

    def _watch(self, events: int) -> None:
        """A client that has hung up is always ready: without anything to do for it the loop must not know it."""
        if self._client is None or events == self._events:
            return
        fd = self._client.fileno()
        if not self._events:
            self._loop.add(fd, self._on_client, events)
        elif events:
            self._loop.modify(fd, events)
        else:
            self._loop.remove(fd)
        self._events = events

    def _hang_up(self) -> None:
        self._watch(0)
        client, self._client = self._client, None
        self._output.clear()
        if client is not None:
            client.close()


def _has_hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))
