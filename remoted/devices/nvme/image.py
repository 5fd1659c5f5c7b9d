# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening and closing images, whose filesystem may be one whose server does not answer.

Both are done by threads, which the daemon waits for only so long: it may have other devices to serve.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from typing import NamedTuple

from remoted.device import UsageError
from remoted.devices.nvme.imagelock import lock_image

__all__ = ["Image", "close_image", "open_image"]

_OPEN_SECONDS = 2.0
_CLOSE_SECONDS = 0.1


class Image(NamedTuple):
    """An image that has been opened and locked."""

    fd: int
    size: int
    """in bytes"""
    is_read_only: bool


class _Opening:
    """One attempt to open an image."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._is_abandoned = False
        self._outcome: Image | UsageError | None = None

    def run(self) -> None:
        """Opens it; in a thread."""
        outcome: Image | UsageError
        try:
            outcome = _open(self._path)
        except UsageError as error:
            outcome = error
        with self._lock:
            self._outcome = outcome
            is_abandoned = self._is_abandoned
        if is_abandoned and isinstance(outcome, Image):
            os.close(outcome.fd)

    def take(self) -> Image:
        """The image. Raises UsageError, also if it is not open yet; then nobody gets it any more."""
        with self._lock:
            outcome = self._outcome
            self._is_abandoned = outcome is None
        if outcome is None:
            raise UsageError(f"its filesystem has not opened it within {_OPEN_SECONDS:g} s")
        if isinstance(outcome, UsageError):
            raise outcome
        return outcome


def open_image(path: str) -> Image:
    """Opens a file or a block device, for reading only where nothing else is allowed, and locks it.

    Raises UsageError, whose text does not name the image.
    """
    opening = _Opening(path)
    thread = threading.Thread(target=opening.run, name="nvme", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise UsageError(str(error)) from error
    thread.join(_OPEN_SECONDS)
    return opening.take()


def close_image(fd: int) -> None:
    """Closes the fd, and returns when that is done, or lasts."""
    thread = threading.Thread(target=_close, args=(fd,), name="nvme", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        _close(fd)
    else:
        thread.join(_CLOSE_SECONDS)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # the fd is closed all the same (close(2)); a Flush has told of errors
        os.close(fd)


def _open(path: str) -> Image:
    # O_NONBLOCK is for open() alone, which would wait for the other end of a FIFO.
    flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        is_read_only = False
        try:
            fd = os.open(path, os.O_RDWR | flags)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            is_read_only = True
            fd = os.open(path, os.O_RDONLY | flags)
    except (OSError, ValueError) as error:
        raise UsageError(str(getattr(error, "strerror", error))) from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError("is neither a file nor a block device")
        size = os.lseek(fd, 0, os.SEEK_END)
        lock_image(fd, is_read_only=is_read_only)
        os.set_blocking(fd, True)
    except OSError as error:
        os.close(fd)
        raise UsageError(str(error.strerror)) from error
    except UsageError:
        os.close(fd)
        raise
    return Image(fd, size, is_read_only)
