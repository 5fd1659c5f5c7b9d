# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's console: a 16550A at COM1 whose line is a UNIX socket, as QEMU's ``-serial unix:`` is."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from select import EPOLLIN, EPOLLOUT

from common.listen import UnixListener
from common.loop import Loop
from common.uart import Uart16550

__all__ = ["COM1_IRQ", "COM1_PORTS", "Console"]

COM1_PORTS = range(0x3F8, 0x400)
COM1_IRQ = 4

_MAX_PENDING = 1 << 16
"""bytes kept for a client that isn't there yet, or doesn't read; later ones are lost"""


class _LoopTimer:
    """A timer of the loop, set from any thread."""

    def __init__(self, loop: Loop, seconds: float, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback
        self._loop = loop
        self._seconds = seconds
        loop.call_soon_threadsafe(self._arm)

    def cancel(self) -> None:
        self._callback = None

    def _arm(self) -> None:
        self._loop.call_later(self._seconds, self._fire)

    def _fire(self) -> None:
        if self._callback is not None:
            self._callback()


class Console:
    """COM1. Register accesses come from the vCPU's thread, characters from the loop's; one client at a time."""

    def __init__(self, loop: Loop, path: str, set_irq: Callable[[bool], None]) -> None:
        """Listens at the path. Raises UsageError."""
        self._loop = loop
        self._lock = threading.RLock()
        self._client: socket.socket | None = None
        self._output = bytearray()
        self._flushing = False
        self._uart = Uart16550(
            set_irq,
            self._transmit,
            lambda seconds, callback: _LoopTimer(loop, seconds, self._locked(callback)),
            lambda: loop.call_soon_threadsafe(self._update_events),
        )
        self._listener = UnixListener(path)
        loop.add(self._listener.fileno(), self._on_connect)

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
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        self._hang_up()

    def _locked(self, callback: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            with self._lock:
                callback()

        return call

    def _transmit(self, byte: int) -> bool:
        if len(self._output) < _MAX_PENDING:
            self._output.append(byte)
            if not self._flushing:
                self._flushing = True
                self._loop.call_soon_threadsafe(self._flush)
        return True

    def _on_connect(self, _events: int) -> None:
        sock = self._listener.accept()
        if sock is None:
            return
        if self._client is not None:
            sock.close()
            return
        sock.setblocking(False)
        self._client = sock
        self._loop.add(sock.fileno(), self._on_client, EPOLLIN)
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
            self._flushing = False
            if self._client is None:
                return
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
            if self._client is not None:
                wanted = EPOLLIN if self._uart.can_receive() else 0
                self._loop.modify(self._client.fileno(), wanted | (EPOLLOUT if self._output else 0))

    def _hang_up(self) -> None:
        client, self._client = self._client, None
        self._output.clear()
        if client is not None:
            self._loop.remove(client.fileno())
            with contextlib.suppress(OSError):
                client.close()
