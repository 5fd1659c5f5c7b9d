# SPDX-License-Identifier: GPL-2.0-or-later
"""One device as clients find it: a socket by path or an inherited connection, one client at a time."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from common.errors import UsageError
from common.journal import RateLimited
from common.link import peer_credentials
from common.listen import UnixListener
from common.loop import Loop
from remoted.function import PciFunction
from remoted.iohub import Pirq
from remoted.session import Session

__all__ = ["DeviceServer", "adopt_connection"]


class DeviceServer:
    """Owns a function, its listening socket (or none) and its session (or none)."""

    def __init__(self, loop: Loop, function: PciFunction, pirq: Pirq, on_idle: Callable[[], None]) -> None:
        """``on_idle`` is called when a client has gone."""
        self.function = function
        self.pirq = pirq
        self.session: Session | None = None
        self.refused = 0
        """clients turned away while another was served"""
        self._loop = loop
        self._on_idle = on_idle
        self._listener: UnixListener | None = None
        self._log = RateLimited(function.host.log)

    @property
    def is_listening(self) -> bool:
        return self._listener is not None

    def listen(self, path: str) -> None:
        """Takes clients at a path. Raises UsageError."""
        self._listener = UnixListener(path)
        self._loop.add(self._listener.fileno(), self._on_connect)
        self.function.host.log.info("listening on %s", path)

    def serve(self, sock: socket.socket) -> None:
        """Serves a connected socket, which it owns from here on."""
        self.session = Session(self._loop, sock, self.function, self.pirq, self._on_end)
        self.function.host.log.info("client %s", self.session.client)

    def close(self) -> None:
        """Ends the session, unlinks the socket and closes the device."""
        if self._listener is not None:
            self._loop.remove(self._listener.fileno())
            self._listener.close()
            self._listener = None
        if self.session is not None:
            self.session.close()
        self.function.close()

    def _on_connect(self, _events: int) -> None:
        sock = self._listener.accept() if self._listener is not None else None
        if sock is None:
            return
        if self.session is None:
            self.serve(sock)
            return
        with sock, contextlib.suppress(OSError):
            self.refused += 1
            self._log.warning(
                "refused client %s: %s is being served", peer_credentials(sock), self.session.client
            )

    def _on_end(self, _session: Session) -> None:
        self.session = None
        self._on_idle()


def adopt_connection(fd: int, device: str) -> socket.socket:
    """The connected UNIX stream socket that was inherited as ``fd``. Raises UsageError."""
    where = f"--device id={device}: fd={fd}"
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}") from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise UsageError(f"{where} is no UNIX stream socket")
    try:
        sock.getpeername()
    except OSError as error:
        raise UsageError(f"{where} is not connected") from error
    return sock
