# SPDX-License-Identifier: GPL-2.0-or-later
"""``unix:PATH``: the line ends in a listening UNIX socket, to which a user connects."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

from common.chardev.base import Frontend
from common.chardev.stream import StreamChardev
from common.disposal import ANCILLARY_SIZE, Disposal, count_unread, received_fds
from common.errors import UntrustedError, UsageError
from common.journal import Log
from common.keptfiles import KeptFiles
from common.listen import UnixListener
from common.loop import EventLoop
from common.messages import Event
from common.peer import peer_credentials
from common.trust import TRUST

__all__ = ["UnixChardev"]

MAX_LEFT_BEHIND = 1 << 18
"""bytes of input kept of clients that have left; more than a socket's default buffer holds"""
_MAX_LEAVING = 64
"""clients that have left and whose input is kept"""
_CLIENT = "client-"
"""begins the names of clients in the fd store, which end in a number that grows"""


class _Client:
    __slots__ = ("limit", "name", "sock")

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock = sock
        self.name = name
        """in the fd store"""
        self.limit = 0
        """bytes of its input that are kept, once it has left"""


class UnixChardev(StreamChardev):
    """A listening UNIX socket. One client at a time; the next one waits until the first has gone.

    A client that has shut down one direction is still served in the other one. When a client has left, its input
    is kept for the device and is delivered before that of the next client.
    """

    def __init__(
        self,
        path: str,
        loop: EventLoop,
        log: Log,
        frontend: Frontend,
        on_connected: Callable[[bool], None],
        files: KeptFiles | None = None,
    ) -> None:
        """Binds and listens, or goes on with the client of the previous process. Raises UsageError."""
        super().__init__(loop, log, frontend, on_connected, files)
        self._left: deque[_Client] = deque()
        """clients that have left and whose input was not read"""
        self._disposal = Disposal()
        self._client: _Client | None = None
        self._number = 0
        """of the last client"""
        self._is_closing = False
        try:
            self._listener = UnixListener(loop, path, self._on_client, self._log, self._disposal, files=files)
        except UsageError:
            self.arrivals.close()
            raise
        if files is not None:
            self._take_up(files)

    def close(self) -> None:
        self._is_closing = True
        super().close()
        while self._left:
            self._end(self._left.popleft())
        self._listener.close()

    def _name(self) -> str:
        return self._listener.path

    def _on_client(self, sock: socket.socket) -> None:
        self._number += 1
        client = _Client(sock, f"{_CLIENT}{self._number}")
        if self._files is not None:
            self._files.put(client.name, sock.fileno())
        peer = str(peer_credentials(sock))
        try:
            self._begin(client)
        except OSError:
            if self._files is not None:
                self._files.remove(client.name)
            raise
        self._log.info("%s: connected", self._listener.path, peer=peer)

    def _begin(self, client: _Client) -> None:
        self._attach(client.sock.fileno())
        self._client = client
        self._listener.hold()
        self._set_connected(True)

    def _take_up(self, files: KeptFiles) -> None:
        """Goes on with the clients of the previous process: all but the last one have left."""
        numbers = sorted(int(name.removeprefix(_CLIENT)) for name in files.inherited(_CLIENT))
        for self._number in numbers:
            name = f"{_CLIENT}{self._number}"
            client = _Client(socket.socket(fileno=files.take(name)), name)
            try:
                TRUST.check_peer(client.sock)
                if self._number == numbers[-1]:
                    self._begin(client)
                else:
                    self._leave_behind(client)
            except (UntrustedError, OSError):
                self._end(client)
        if self.arrivals.waiting:
            self._wake_input()

    def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            self._detach()
            self._leave_behind(client)
            super()._hang_up()
            self._listener.resume()

    def _leave_behind(self, client: _Client) -> None:
        """Keeps the input of a client that has left, so that the next one needn't wait for the device."""
        unread = count_unread(client.sock.fileno())
        room = MAX_LEFT_BEHIND - sum(left.limit for left in self._left)
        client.limit = min(unread, room if len(self._left) < _MAX_LEAVING else 0)
        dropped = unread - client.limit
        if dropped:
            self.dropped_input += dropped
            self._log.warning(
                "%s: %d bytes of input dropped: the guest doesn't read",
                self._listener.path,
                dropped,
                event=Event.CHARDEV_DROPS,
            )
        if client.limit:
            self._left.append(client)
            self._wake_input()
        else:
            self._end(client)

    def _end(self, client: _Client) -> None:
        """Ends the connection; closes only a copy of one that is to outlive the process."""
        if self._files is not None:
            if self._is_closing and self._files.outlive:
                self._disposal.close_socket(client.sock)
                return
            self._files.remove(client.name)
        self._disposal.hang_up(client.sock)

    def _read(self, size: int) -> bytes:
        if self.arrivals.waiting:
            return super()._read(size)
        while self._left:
            left = self._left[0]
            try:
                data = self._receive_bytes(left.sock, min(size, left.limit))
            except OSError:
                data = b""
            left.limit -= len(data)
            if not left.limit or not data:
                self._end(self._left.popleft())
            if data:
                return data
        if self._client is None:
            raise BlockingIOError
        return self._receive_bytes(self._client.sock, size)

    def _receive_bytes(self, sock: socket.socket, size: int) -> bytes:
        if self._files is None:
            return self._disposal.receive(sock, size)
        flags = socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC
        data, ancillary, _, _ = sock.recvmsg(size, ANCILLARY_SIZE, flags)
        if ancillary:
            # The kernel would close the fds in the middle of a splice(2).
            self._disposal.close_fds(received_fds(ancillary))
            return self._disposal.receive(sock, len(data))
        return self.arrivals.read(sock.fileno(), len(data)) if data else b""

    def _close_fd(self, fd: int) -> None:
        client, self._client = self._client, None
        if client is not None:
            self._end(client)

    def _has_input(self) -> bool:
        return bool(self._left) or self.arrivals.waiting > 0 or super()._has_input()

    def _wake_input(self) -> None:
        if self._left or self.arrivals.waiting:
            self._loop.call_later(0, self._receive)
        else:
            super()._wake_input()
