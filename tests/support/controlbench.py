# SPDX-License-Identifier: GPL-2.0-or-later
"""A control server on a loop that a test steps, and its clients."""

# No `from __future__ import annotations`: asyncvarlink reads the methods' types.
import contextlib
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Self

import pytest
from asyncvarlink import varlinkmethod

from common.controlsocket import ControlServer
from common.loop import Loop
from common.polling import Polling
from common.remoted_interface import Polling as PollingStatus
from common.remoted_interface import Remoted, StatusReply
from remoted.control import RemotedService

STATUS = b'{"method": "org.iohub.Remoted.Status"}\0'


class Calls(Remoted):
    """The interface of a VM without devices, which remembers what was called."""

    def __init__(self) -> None:
        self.status = 0
        self.raised: list[str] = []
        self.vm = "vm1"

    @varlinkmethod
    def Status(self) -> StatusReply:
        self.status += 1
        polling = PollingStatus(window_us=0, found=0, missed=0, spent_ms=0)
        return {"vm": self.vm, "pid": os.getpid(), "polling": polling, "amiss": [], "functions": []}

    @varlinkmethod
    def Raise(self, *, device: str) -> None:
        self.raised.append(device)
        RemotedService(self.vm, (), Polling(lambda _timeout: [], time.monotonic, 0.0)).Raise(device=device)


class Bench:
    """A control server on a loop that the test steps, or runs in a thread."""

    def __init__(self, directory: Path) -> None:
        self.loop = Loop()
        self.calls = Calls()
        self.path = str(directory / "remoted.varlink")
        self.server = ControlServer(self.loop, self.path, lambda: self.calls, logging.getLogger("control"))

    def close(self) -> None:
        self.server.close()
        self.loop.close()

    def wait(self) -> None:
        """Steps the loop until something has happened; fails when nothing does."""
        stuck = self.loop.call_later(10, lambda: pytest.fail("nothing happens any more"))
        self.loop.step(None)
        stuck.cancel()

    def connect(self) -> "Peer":
        peer = Peer(self)
        self.loop.step()
        return peer


class Peer:
    """A client that speaks bytes; the test steps the loop."""

    def __init__(self, bench: Bench) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.connect(bench.path)
        self._bench = bench
        self._received = b""
        self._pending: list[dict[str, object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Sends it all, while the server reads."""
        while data:
            with contextlib.suppress(BlockingIOError):
                data = data[self.sock.send(data) :]
            self._bench.loop.step()

    def replies(self) -> list[dict[str, object]]:
        """The replies that are here and that reply() has not returned."""
        with contextlib.suppress(BlockingIOError):
            while data := self.sock.recv(1 << 16):
                self._received += data
        *whole, self._received = self._received.split(b"\0")
        replies = [*self._pending, *(json.loads(reply) for reply in whole)]
        self._pending = []
        return replies

    def reply(self) -> dict[str, object]:
        """The next reply, for which the loop is stepped."""
        while not (replies := self.replies()):
            assert not self.is_hung_up(), "the server hung up instead of replying"
            self._bench.wait()
        first, *self._pending = replies
        return first

    def is_hung_up(self) -> bool:
        try:
            return self.sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def await_hang_up(self) -> None:
        while not self.is_hung_up():
            self._bench.wait()


def call_of(method: str, **parameters: object) -> bytes:
    return json.dumps({"method": method, "parameters": parameters}).encode() + b"\0"
