# SPDX-License-Identifier: GPL-2.0-or-later
"""Listening UNIX sockets by path: private, taken over from a daemon that died, never a reason to spin."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator

from common.disposal import Disposal, refuse_fds
from common.errors import UsageError
from common.journal import RateLimited
from common.loop import EventLoop, Timer
from common.peer import peer_credentials

__all__ = ["SocketInUse", "UnixListener", "lock_path"]

_PAUSE_SECONDS = 1.0
"""how long clients wait after one couldn't be taken: the loop would spin on it otherwise"""


class SocketInUse(UsageError):
    """Somebody listens at the path."""

    def __init__(self, path: str, owner: str) -> None:
        """``owner`` is the daemon, by name and pid as far as they are known."""
        super().__init__(f"socket {path} is in use by {owner}")
        self.owner = owner


class UnixListener:
    """A listening UNIX stream socket, mode 0600, that removes its path when closed."""

    def __init__(
        self,
        loop: EventLoop,
        path: str,
        on_client: Callable[[socket.socket], None],
        log: RateLimited,
        disposal: Disposal | None = None,
    ) -> None:
        """Binds and listens; a socket whose daemon is gone is replaced.

        ``on_client(sock)`` is called for one client a pass of the loop, and owns the non-blocking socket. With a
        ``disposal`` clients may send fds (without one see refuse_fds()), and wait as long as it is full.
        Raises SocketInUse when a live daemon has the path, UsageError when it is no socket or can't be bound.
        """
        if "\0" in path:  # bind() would take what comes before it
            raise UsageError(f"socket {path!r}: a path can't contain NUL")
        self.path = path
        self._loop = loop
        self._on_client = on_client
        self._log = log
        self._disposal = disposal
        self._is_watched = False
        self._pause: Timer | None = None
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if disposal is None:
                refuse_fds(self._sock)
            with _locked(path):
                try:
                    _bind(self._sock, path)
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                    _remove_stale(path)
                    _bind(self._sock, path)
                self._sock.listen(16)
            self._inode = _inode(path)
            self.resume()
        except OSError as error:
            self._sock.close()
            raise UsageError(f"socket {path}: {error.strerror or error}") from error
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def hold(self) -> None:
        """Lets clients wait, until resume()."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._is_watched:
            self._is_watched = False
            self._loop.remove(self._sock.fileno())

    def resume(self) -> None:
        """Takes clients after hold()."""
        self._pause = None
        self._loop.add(self._sock.fileno(), self._on_ready, in_turn=True)
        self._is_watched = True

    def close(self) -> None:
        """Closes the socket and unlinks its path, unless somebody else has bound that since."""
        self.hold()
        with contextlib.suppress(OSError):
            # While the socket is open, nobody else's can have its inode.
            if self._sock.fileno() != -1 and _inode(self.path) == self._inode:
                os.unlink(self.path)
        if self._disposal is not None:
            with contextlib.suppress(OSError):  # nobody is left, or it was closed already
                self._sock.shutdown(socket.SHUT_RDWR)
                while True:  # clients that were never taken may have sent fds
                    self._disposal.hang_up(self._sock.accept()[0])
        self._sock.close()

    def _on_ready(self, _events: int) -> None:
        if self._disposal is not None and self._disposal.is_full:
            self._keep_waiting("too many file descriptors of earlier ones take long to close")
            return
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            self._keep_waiting(error.strerror)
            return
        sock.setblocking(False)
        self._on_client(sock)

    def _keep_waiting(self, reason: str | None) -> None:
        self._log.warning("%s: can't take a client: %s", self.path, reason)
        self.hold()
        self._pause = self._loop.call_later(_PAUSE_SECONDS, self.resume)


def lock_path(path: str) -> str:
    """The file that exists from before a socket is bound at the path until it listens."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.lock")


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Keeps other daemons from the path meanwhile. Raises UsageError when one is at it.

    Until it listens, a socket looks like one whose daemon is gone. The lock is a file beside it, for that long.
    """
    lock = lock_path(path)
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"socket {path} is being taken by another daemon") from error
            # Who had the lock before may have removed the file since it was opened here.
            if _is_at(lock, fd):
                try:
                    yield
                finally:
                    with contextlib.suppress(FileNotFoundError):  # somebody else may have tidied up
                        os.unlink(lock)
                return
        finally:
            os.close(fd)


def _is_at(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _bind(sock: socket.socket, path: str) -> None:
    mask = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(mask)


def _remove_stale(path: str) -> None:
    """Unlinks a socket that nobody listens on. Raises SocketInUse for a live one, UsageError for other files."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UsageError(f"{path} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        result = probe.connect_ex(path)
        if result == 0:
            raise SocketInUse(path, str(peer_credentials(probe)))
    if result != errno.ECONNREFUSED:
        raise SocketInUse(path, "a live daemon")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
