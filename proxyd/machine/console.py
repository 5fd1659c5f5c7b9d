# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's console: a 16550A at COM1 whose line is a UNIX socket, as QEMU's ``-serial unix:`` is."""

from __future__ import annotations

import threading
from collections.abc import Callable

from common.chardev.unix import UnixChardev
from common.journal import Log
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
    """COM1. Register accesses come from the vCPU's thread, characters from the loop's.

    What the guest prints while nobody is connected is kept for the next client. After a client that has sent
    something it is not: that may be the answer, which is no other client's.
    """

    def __init__(self, loop: Loop, path: str, set_irq: Callable[[bool], None], log: Log) -> None:
        """Listens at the path. Raises UsageError."""
        self._loop = loop
        self._lock = threading.RLock()
        self._output = bytearray()
        self._is_answering = False  # the guest got input of a client since the last one connected
        self._is_flush_queued = False
        self._is_resume_queued = False
        self._uart = Uart16550(set_irq, self._transmit, _Alarm(loop, self._lock).set, self._input_ready)
        self._chardev = UnixChardev(path, loop, log, self, self._on_connected)

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
        self._chardev.close()

    def can_receive(self) -> int:
        """See Frontend."""
        with self._lock:
            return self._uart.can_receive()

    def receive(self, data: bytes) -> None:
        """See Frontend."""
        with self._lock:
            self._is_answering = True
            self._uart.receive(data)

    def transmit_ready(self) -> None:
        """See Frontend."""
        self._flush()

    def _transmit(self, byte: int) -> bool:
        is_wanted = self._chardev.connected or not self._is_answering
        if is_wanted and len(self._output) < _MAX_PENDING:
            self._output.append(byte)
            if not self._is_flush_queued:
                self._is_flush_queued = True
                self._loop.call_soon_threadsafe(self._flush)
        return True

    def _input_ready(self) -> None:
        if not self._is_resume_queued:
            self._is_resume_queued = True
            self._loop.call_soon_threadsafe(self._resume)

    def _flush(self) -> None:
        with self._lock:
            self._is_flush_queued = False
            if self._chardev.connected:
                del self._output[: self._chardev.write(self._output)]

    def _resume(self) -> None:
        with self._lock:
            self._is_resume_queued = False
        self._chardev.resume()

    def _on_connected(self, connected: bool) -> None:
        with self._lock:
            if connected:
                self._is_answering = False
                self._flush()
            else:
                self._output.clear()
