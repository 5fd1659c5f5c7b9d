# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that a hostile peer sends because of what their close does."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common import disposal

__all__ = ["has_passrights", "returns_soon", "unsendable_socket"]

_LINGER_SECONDS = 3600
_SOON_SECONDS = 20.0


@contextmanager
def unsendable_socket() -> Iterator[socket.socket]:
    """A TCP socket whose last close takes an hour, as nobody reads what it has sent, or until the context ends."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bind(("127.0.0.1", 0))
        server.listen()
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    try:
        sender.setblocking(False)
        try:
            while True:
                sender.send(bytes(1 << 16))
        except BlockingIOError:
            pass
        # A non-blocking socket doesn't linger.
        sender.setblocking(True)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, _LINGER_SECONDS))
        yield sender
    finally:
        receiver.close()  # with data unread: resets the connection, which ends the linger
        sender.close()


def has_passrights() -> bool:
    """Whether the kernel lets sockets refuse fds."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.getsockopt(socket.SOL_SOCKET, disposal._SO_PASSRIGHTS)
        except OSError:
            return False
    return True


def returns_soon(action: Callable[[], object]) -> bool:
    """Whether an action returns although something it closes doesn't; to be called where that ends afterwards."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(_SOON_SECONDS)
    return not thread.is_alive()
