# SPDX-License-Identifier: GPL-2.0-or-later
"""``file:PATH``: output into a file."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator

from common.chardev.base import MAX_OUTPUT, Chardev, Frontend
from common.chardev.pending import PendingOutput
from common.errors import UsageError
from common.journal import Log, RateLimited
from common.keptfiles import KeptFiles
from common.loop import EventLoop
from common.messages import Event

__all__ = ["FileChardev"]

_CLOSE_SECONDS = 1.0
"""how long close() waits for the output to be written"""
_KEPT = "file-"
"""begins the file's name in the fd store, which ends in its device and inode"""


class FileChardev(Chardev):
    """Output into a file, truncated first, as QEMU's ``-chardev file``, unless the previous process had it open.

    A thread writes to it: a disk, the server of a network or FUSE filesystem or the reader of a FIFO may take any
    time, and O_NONBLOCK has no effect on regular files (open(2)). Where files outlive the process, the output of a
    regular file is written to its place by number: what a killed process had written already is written again to
    the same place. Of another file, such as a FIFO, the last byte may be repeated.
    """

    def __init__(
        self, path: str, loop: EventLoop, log: Log, frontend: Frontend, files: KeptFiles | None = None
    ) -> None:
        """Creates or truncates the file. Raises UsageError, also for a FIFO that nobody reads."""
        try:
            super().__init__()
            self._output = PendingOutput(files)
        except OSError as error:
            raise UsageError(str(error.strerror)) from error
        self._path = path
        self._loop = loop
        self._log = RateLimited(log)
        self._frontend = frontend
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._blocked = False  # write() hasn't taken all
        self._is_closing = False
        self._problem = ""  # why the last write failed
        try:
            self._fd = self._open(files)
        except (OSError, ValueError) as error:
            self._output.close()
            raise UsageError(str(getattr(error, "strerror", error))) from error
        os.set_blocking(self._fd, True)
        self._by_position = files is not None and stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._portion = MAX_OUTPUT if files is None or self._by_position else 1
        self._wake = -1
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            loop.add(self._wake, self._on_wake)
        except OSError as error:
            os.close(self._fd)
            if self._wake != -1:
                os.close(self._wake)
            self._output.close()
            raise UsageError(str(error.strerror)) from error
        with self._condition:
            if self._output:
                self._start()

    def write(self, data: bytes | bytearray) -> int:
        with self._condition:
            if not self._start():
                self.dropped_output += len(data)
                return len(data)
            taken = self._output.put(data)
            if taken < len(data):
                self._blocked = True
            self._condition.notify()
        return taken

    def amiss(self) -> Iterator[str]:
        problem = self._problem
        if problem:
            yield f"output is dropped: {self._path}: {problem} ({self.dropped_output} bytes so far)"

    def close(self) -> None:
        self._loop.remove(self._wake)
        with self._condition:
            self._is_closing = True
            self._condition.notify()
            self._start()  # the close may take its time as well
        if self._thread is None:
            self._close_files()
        else:
            self._thread.join(_CLOSE_SECONDS)

    def _open(self, files: KeptFiles | None) -> int:
        """The file of the previous process, if the path is still its; otherwise a new one. Raises OSError."""
        if files is not None:
            try:
                fd = files.take(_kept_name(os.stat(self._path)))
            except FileNotFoundError:
                fd = -1
            if fd != -1:
                return fd
        # O_NONBLOCK is for open() alone, which would wait for the reader of a FIFO.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o666)
        self._output.begin_file()
        if files is not None:
            try:
                files.put(_kept_name(os.fstat(fd)), fd)
            except OSError:
                os.close(fd)
                raise
        return fd

    def _start(self) -> bool:
        """Starts the thread; False if none can be started, which the next call tries again."""
        if self._thread is None:
            # A daemon thread, so that the process can end while the thread waits for the file.
            thread = threading.Thread(target=self._run, name="file", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._problem = str(error)
                self._warn_of_drops(str(error))
                return False
            self._thread = thread
        return True

    def _warn_of_drops(self, why: str) -> None:
        self._log.warning(
            "chardev file %s: output is dropped: %s", self._path, why, event=Event.CHARDEV_DROPS
        )

    def _run(self) -> None:
        while output := self._next_output():
            problem, count = "", len(output)
            try:
                if self._by_position:
                    count = os.pwrite(self._fd, output, self._output.position)
                else:
                    count = os.write(self._fd, output)
            except OSError as error:
                problem = error.strerror or str(error)
                self.dropped_output += count
            with self._condition:
                self._output.done(count, is_dropped=bool(problem))
                self._problem = problem
                if problem or self._blocked:
                    os.eventfd_write(self._wake, 1)
        self._close_files()

    def _close_files(self) -> None:
        os.close(self._fd)
        os.close(self._wake)
        self._output.close()

    def _next_output(self) -> bytes:
        """Waits for output; empty when there is no more and the chardev is closed."""
        with self._condition:
            while not self._output and not self._is_closing:
                self._condition.wait()
            return self._output.peek(self._portion)

    def _on_wake(self, _events: int) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        with self._condition:
            problem, blocked = self._problem, self._blocked
            self._blocked = False
        if problem:
            self._warn_of_drops(problem)
        if blocked:
            self._frontend.transmit_ready()


def _kept_name(status: os.stat_result) -> str:
    return f"{_KEPT}{status.st_dev:x}-{status.st_ino:x}"
