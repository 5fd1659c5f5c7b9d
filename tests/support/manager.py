# SPDX-License-Identifier: GPL-2.0-or-later
"""The service manager's end of $NOTIFY_SOCKET (sd_notify(3))."""

from __future__ import annotations

import select
import socket

__all__ = ["Manager"]

_FILLER = b"X=1"


class Manager:
    """Receives what daemons tell."""

    def __init__(self, address: str) -> None:
        """Listens there; an abstract address begins with a null byte."""
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(20.0)

    def fill(self) -> None:
        """Fills its queue, as other services might, up to net.unix.max_dgram_qlen: 10, or 512 below systemd."""
        while self._fill_from_one():
            pass  # that one's send buffer was full; another's is not

    def _fill_from_one(self) -> bool:
        has_sent = False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
            try:
                while True:
                    other.sendto(_FILLER, self._address)
                    has_sent = True
            except BlockingIOError:
                return has_sent

    def receive(self) -> str:
        """The next message that is not a filler."""
        while (message := self._socket.recv(1000)) == _FILLER:
            pass
        return message.decode()

    def is_quiet(self) -> bool:
        return not select.select([self._socket], [], [], 0)[0]

    def close(self) -> None:
        self._socket.close()
