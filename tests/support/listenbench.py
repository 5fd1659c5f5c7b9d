# SPDX-License-Identifier: GPL-2.0-or-later
"""Listening sockets for tests, their clients, and other users."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from common.disposal import Disposal
from common.journal import RateLimited
from common.listen import UnixListener
from common.peer import peer_credentials
from tests.support.remotebench import Clock
from tests.support.steploop import CountingLoop

STRANGER = 54321
"""a user who is not trusted"""


class ListenBench:
    """A loop in the test's time, and the clients that listeners on it have taken."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.loop = CountingLoop(self.clock)
        self.clients: list[socket.socket] = []

    def listen(self, path: str) -> UnixListener:
        log = RateLimited(logging.getLogger("test"))
        return UnixListener(self.loop, path, self.clients.append, log, Disposal())

    def close(self) -> None:
        self.loop.close()
        for client in self.clients:
            client.close()


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def own_name() -> str:
    """What a daemon that is refused calls this process."""
    one, two = socket.socketpair()
    with one, two:
        return str(peer_credentials(one))


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Acts as another user."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to act as other users")
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
