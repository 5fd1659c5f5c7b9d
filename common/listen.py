# SPDX-License-Identifier: GPL-2.0-or-later
"""Listening UNIX sockets by path: for trusted users only, and never a reason to spin."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from common.disposal import Disposal, receive_urgent_inline, refuse_fds
from common.errors import UntrustedError, UsageError
from common.journal import RateLimited
from common.keptfiles import KeptFiles
from common.loop import EventLoop, Timer
from common.messages import Event
from common.peer import peer_credentials
from common.socketpath import listen_at, remove, resume_at
from common.trust import TRUST, Trust

__all__ = ["UnixListener"]

_PAUSE_SECONDS = 1.0
"""how long clients wait after one couldn't be taken: without a pause the loop would spin"""
_KEPT = "listener-"
"""begins a socket's name in the fd store, which ends in device and inode of its path"""


class UnixListener:
    """A listening UNIX stream socket that removes its path when closed."""

    def __init__(
        self,
        loop: EventLoop,
        path: str,
        on_client: Callable[[socket.socket], None],
        log: RateLimited,
        disposal: Disposal,
        trust: Trust = TRUST,
        *,
        takes_fds: bool = False,
        files: KeptFiles | None = None,
    ) -> None:
        """Binds and listens; a socket whose daemon is gone is replaced.

        With ``files`` it goes on with the socket of the process before this one, if that listened at the path, and
        leaves its own to the next one: clients find the path at any time, and wait.

        ``on_client(sock)`` is called for one client a pass of the loop, and owns the non-blocking socket; if it
        raises OSError, the client is hung up. Clients of users that ``trust`` doesn't include are hung up. Others
        wait as long as ``disposal`` is full. Unless ``takes_fds``, they can't send fds where the kernel can refuse
        them.

        Raises SocketInUse when a live daemon has the path, UsageError when it is no socket or can't be bound, and
        UntrustedError when it is in a directory that other users can change.
        """
        self.path = path
        self._loop = loop
        self._on_client = on_client
        self._log = log
        self._disposal = disposal
        self._trust = trust
        self._files = files
        self._is_watched = False
        self._pause: Timer | None = None
        if files is not None and self._take_up(files):
            return
        try:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise UsageError(f"socket {path}: {error.strerror}") from error
        try:
            if not takes_fds:
                refuse_fds(self._sock)
            self._inode = listen_at(self._sock, path, trust)
            try:
                if files is not None:
                    files.put(_kept_name(self._inode), self._sock.fileno())
                self._watch()
            except OSError:
                remove(path, self._inode)
                raise
        except UntrustedError as error:
            self._sock.close()
            raise UntrustedError(f"socket {path}: {error}") from error
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
        try:
            self._watch()
        except OSError as error:
            self._keep_waiting(error.strerror)

    def close(self) -> None:
        """Closes the socket and unlinks its path, unless somebody else has bound that since.

        Where files outlive the process, the next one has both.
        """
        self.hold()
        if self._files is not None and self._files.outlive:
            self._sock.close()
            return
        if self._sock.fileno() != -1:
            remove(self.path, self._inode)
        with contextlib.suppress(OSError):  # nobody is left, or it was closed already
            self._sock.shutdown(socket.SHUT_RDWR)
            while True:  # clients that were never taken may have sent fds
                self._disposal.hang_up(self._sock.accept()[0])
        self._sock.close()

    def accept(self) -> socket.socket | None:
        """A trusted user's client, or None; for another thread while the loop's is busy. Raises OSError."""
        try:
            sock = self._sock.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        try:
            self._trust.check_peer(sock)
        except UntrustedError as error:
            client = str(peer_credentials(sock))
            self._log.warning("%s: refused: %s", self.path, error, event=Event.CLIENT_UNTRUSTED, peer=client)
            self._disposal.hang_up(sock)
            return None
        return sock

    def _take_up(self, files: KeptFiles) -> bool:
        """Whether there is the socket of the process before this one. Raises UsageError and UntrustedError."""
        for name in files.inherited(_KEPT):
            try:
                inode = _inode_of(name)
                if resume_at(self.path, inode, self._trust):
                    self._sock = socket.socket(fileno=files.take(name))
                    self._inode = inode
                    self._watch()
                    return True
            except UntrustedError as error:
                raise UntrustedError(f"socket {self.path}: {error}") from error
            except OSError as error:
                raise UsageError(f"socket {self.path}: {error.strerror or error}") from error
        return False

    def _on_ready(self, _events: int) -> None:
        if self._disposal.is_full:
            self._keep_waiting("too many file descriptors of earlier ones take long to close")
            return
        try:
            sock = self.accept()
        except OSError as error:
            self._keep_waiting(error.strerror)
            return
        if sock is None:
            return
        sock.setblocking(False)
        receive_urgent_inline(sock)
        try:
            self._on_client(sock)
        except OSError as error:
            self._disposal.hang_up(sock)
            self._keep_waiting(error.strerror)

    def _watch(self) -> None:
        self._loop.add(self._sock.fileno(), self._on_ready, in_turn=True)
        self._is_watched = True

    def _keep_waiting(self, reason: str | None) -> None:
        self._log.warning("%s: can't take a client: %s", self.path, reason, event=Event.SHORTAGE)
        self.hold()
        self._pause = self._loop.call_later(_PAUSE_SECONDS, self.resume)


def _kept_name(inode: tuple[int, int]) -> str:
    return f"{_KEPT}{inode[0]:x}-{inode[1]:x}"


def _inode_of(name: str) -> tuple[int, int]:
    device, number = (int(part, 16) for part in name.removeprefix(_KEPT).split("-"))
    return device, number
