# SPDX-License-Identifier: GPL-2.0-or-later
"""``unix:PATH``: the line ends in a listening UNIX socket, to which a user connects."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from common.chardev.base import Frontend
from common.chardev.stream import StreamChardev
from common.disposal import Disposal
from common.journal import Log
from common.listen import UnixListener
from common.loop import EventLoop
from common.messages import Event
from common.peer import peer_credentials

__all__ = ["UnixChardev"]

MAX_LEFT_BEHIND = 1 << 18
"""bytes of input kept of clients that have left; more than a socket's default buffer holds"""
_READ_SIZE = 1 << 14


class UnixChardev(StreamChardev):
    """A listening UNIX socket. One client at a time; the next one waits until the first has gone.

    A client that has shut down one direction is still served in the other one. When a client has left, its input
    is kept for the device and is delivered before that of the next client.
    """

    def __init__(
        self, path: str, loop: EventLoop, log: Log, frontend: Frontend, on_connected: Callable[[bool], None]
    ) -> None:
        """Binds and listens. Raises UsageError."""
        super().__init__(loop, log, frontend, on_connected)
        self._left_behind = bytearray()
        self._disposal = Disposal()
        self._client: socket.socket | None = None
        self._listener = UnixListener(loop, path, self._on_client, self._log, self._disposal)

    def close(self) -> None:
        super().close()
        self._left_behind.clear()
        self._listener.close()

    def _name(self) -> str:
        return self._listener.path

    def _on_client(self, sock: socket.socket) -> None:
        peer = str(peer_credentials(sock))
        self._attach(sock.fileno())
        self._client = sock
        self._listener.hold()
        self._log.info("%s: connected", self._listener.path, peer=peer)
        self._set_connected(True)

    def _hang_up(self) -> None:
        if self._fd >= 0:
            self._keep_input()
            self._detach()
            super()._hang_up()
            self._listener.resume()

    def _keep_input(self) -> None:
        """Takes the input of a client that has left, so that the next one needn't wait for the device."""
        dropped = 0
        with contextlib.suppress(OSError):
            while data := self._receive_bytes(_READ_SIZE):
                kept = data[: MAX_LEFT_BEHIND - len(self._left_behind)]
                self._left_behind += kept
                dropped += len(data) - len(kept)
        if dropped:
            self.dropped_input += dropped
            self._log.warning(
                "%s: %d bytes of input dropped: the guest doesn't read",
                self._listener.path,
                dropped,
                event=Event.CHARDEV_DROPS,
            )
        if self._left_behind:
            self._wake_input()

    def _read(self, size: int) -> bytes:
        if self._left_behind:
            data = bytes(self._left_behind[:size])
            del self._left_behind[:size]
            return data
        return self._receive_bytes(size)

    def _receive_bytes(self, size: int) -> bytes:
        return b"" if self._client is None else self._disposal.receive(self._client, size)

    def _close_fd(self, fd: int) -> None:
        client, self._client = self._client, None
        if client is not None:
            self._disposal.hang_up(client)

    def _has_input(self) -> bool:
        return bool(self._left_behind) or super()._has_input()

    def _wake_input(self) -> None:
        if self._left_behind:
            self._loop.call_later(0, self._receive)
        else:
            super()._wake_input()
