# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon's stdout and stderr, written by threads of their own.

A write to either blocks for as long as its reader likes: a full pipe, a terminal stopped by Ctrl+S, journald's
stream, a file on FUSE or on a slow disk. ``O_NONBLOCK`` is no way out: it belongs to the open file description,
which the daemon shares with the shell and whoever else inherited it.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["BackgroundWriter", "detach_stdio", "flush_stdio"]

_CAPACITY = 256 * 1024
"""bytes that may wait to be written: some thousand lines, or the longest record"""
_EXIT_SECONDS = 1.0
"""how long the process's end waits for what is not written yet"""
_writers: list[BackgroundWriter] = []
"""those of the detached streams"""


def _ignore(_lines: int) -> None:
    """For losses that nobody counts."""


class BackgroundWriter:
    """Writes to an fd in a thread of its own; what exceeds the capacity is dropped, and the loss is told later.

    The thread starts with the first put() and lasts as long as the process. Any thread may call put(), also
    from a destructor that interrupts another put().
    """

    def __init__(
        self,
        fd: int,
        describe_loss: Callable[[int], str],
        capacity: int = _CAPACITY,
        on_loss: Callable[[int], None] = _ignore,
    ) -> None:
        """``describe_loss(lines)`` returns the line to write where so many were lost; ``capacity`` is in bytes.

        ``on_loss(lines)`` is called at each loss, in any thread.
        """
        self._fd = fd
        self._on_loss = on_loss
        self._describe_loss = describe_loss
        self._capacity = capacity
        self._queue: SimpleQueue[tuple[int, bytes] | threading.Event] = SimpleQueue()
        self._lock = threading.RLock()
        self._pending = 0
        self._dropped = 0
        self._has_thread = False

    def put(self, data: bytes) -> None:
        """Hands over whole lines. Returns at once."""
        with self._lock:
            if self._pending + len(data) > self._capacity:
                lines = data.count(b"\n") or 1
                self._dropped += lines
                self._on_loss(lines)
                return
            self._pending += len(data)
            dropped, self._dropped = self._dropped, 0
            self._queue.put((dropped, data))
            self._start()

    def flush(self, seconds: float) -> None:
        """Waits until all is written, at most so many seconds."""
        with self._lock:
            if not self._pending or not self._has_thread:
                return
        written = threading.Event()
        self._queue.put(written)
        written.wait(seconds)

    def _start(self) -> None:
        if not self._has_thread:
            self._has_thread = True
            try:
                threading.Thread(target=self._run, name=f"fd {self._fd}", daemon=True).start()
            except RuntimeError:  # no thread can be started now; the next put() tries again
                self._has_thread = False

    def _run(self) -> None:
        lost = 0
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            dropped, data = item
            lost += dropped
            loss = self._describe_loss(lost).encode(errors="backslashreplace") if lost else b""
            if self._write(loss + data):
                lost = 0
            else:
                lost += data.count(b"\n")
                self._on_loss(data.count(b"\n"))
            with self._lock:
                self._pending -= len(data)
                if self._dropped and self._queue.empty():
                    # No line may follow for long: the loss is told now.
                    dropped, self._dropped = self._dropped, 0
                    self._queue.put((dropped, b""))

    def _write(self, data: bytes) -> bool:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:  # another process has made the shared description non-blocking
                _await_writable(self._fd)
            except OSError:
                return False
        return True


class _Raw(io.RawIOBase):
    """What a text stream writes its bytes to."""

    def __init__(self, fd: int, writer: BackgroundWriter) -> None:
        self._fd = fd
        self._writer = writer

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        copy = bytes(data)
        self._writer.put(copy)
        return len(copy)


def detach_stdio(describe_loss: Callable[[int], str], on_loss: Callable[[int], None] = _ignore) -> None:
    """Lets nothing that is written to sys.stdout and sys.stderr from now on wait for its reader.

    That includes the traceback of an exception that ends the process. Its end waits up to a second for what is
    not written yet. ``describe_loss(lines)`` and ``on_loss(lines)``: see BackgroundWriter.
    """
    writers = [BackgroundWriter(fd, describe_loss, on_loss=on_loss) for fd in (1, 2)]
    # Python's own are None if the fd was closed at the start: then its number may be another file's by now.
    sys.stdout = _text_stream(1, writers[0]) if sys.__stdout__ else _nowhere()
    sys.stderr = _text_stream(2, writers[1]) if sys.__stderr__ else _nowhere()
    _writers.extend(writers)
    atexit.register(flush_stdio)


def _text_stream(fd: int, writer: BackgroundWriter) -> io.TextIOWrapper:
    buffered = io.BufferedWriter(_Raw(fd, writer))
    return io.TextIOWrapper(buffered, "utf-8", "backslashreplace", line_buffering=True)


def _nowhere() -> io.TextIOWrapper:
    return open(os.devnull, "w", encoding="utf-8")


def flush_stdio() -> None:
    """Waits until what was written to the detached streams is out, at most a second."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the program may have closed it
            stream.flush()
    deadline = time.monotonic() + _EXIT_SECONDS
    for writer in _writers:
        writer.flush(max(0.0, deadline - time.monotonic()))


def _await_writable(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()
