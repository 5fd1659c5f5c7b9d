# SPDX-License-Identifier: GPL-2.0-or-later
"""Listening UNIX sockets by path: private, and taken over from a daemon that died."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from common.errors import UsageError

__all__ = ["UnixListener"]


class UnixListener:
    """A listening UNIX stream socket, mode 0600, that removes its path when closed."""

    def __init__(self, path: str) -> None:
        """Binds and listens; a socket whose daemon is gone is replaced.

        Raises UsageError when the path is in use by a live daemon, is no socket, or can't be bound.
        """
        if "\0" in path:  # bind() would take what comes before it
            raise UsageError(f"socket {path!r}: a path can't contain NUL")
        self.path = path
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            try:
                _bind(sock, path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _remove_stale(path)
                _bind(sock, path)
            sock.listen(16)
            self._inode = _inode(path)
        except OSError as error:
            sock.close()
            raise UsageError(f"socket {path}: {error.strerror or error}") from error
        except BaseException:
            sock.close()
            raise
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> socket.socket | None:
        """The next connection, or None when there is none (any more).

        Raises OSError when it can't be taken for want of an fd or memory; it stays in the queue.
        """
        try:
            return self._sock.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None

    def close(self) -> None:
        """Closes the socket and unlinks its path, unless somebody else has bound that since."""
        with contextlib.suppress(OSError):
            # While the socket is open, nobody else's can have its inode.
            if self._sock.fileno() != -1 and _inode(self.path) == self._inode:
                os.unlink(self.path)
        self._sock.close()


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _bind(sock: socket.socket, path: str) -> None:
    mask = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(mask)


def _remove_stale(path: str) -> None:
    """Unlinks a socket that nobody listens on. Raises UsageError for any other kind of file or a live one."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UsageError(f"{path} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        result = probe.connect_ex(path)
    if result != errno.ECONNREFUSED:
        raise UsageError(f"socket {path} is in use by a live daemon")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
