# SPDX-License-Identifier: GPL-2.0-or-later
"""A monitor whose every word is the test's."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from common.peer import PeerCredentials
from proxyd.vm.qmp.monitor import Monitor

GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}
}

Talk = Callable[[Monitor], Awaitable[None]]


class Peer:
    """Listens where a monitor would be, and lets the test say each word."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.silences: list[PeerCredentials] = []

    def close(self) -> None:
        self.listener.close()

    def run(self, say: Callable[[socket.socket], None], talk: Talk) -> None:
        """``say`` is the server, after the greeting and the negotiation; ``talk`` is the client."""

        def serve() -> None:
            with self.listener.accept()[0] as sock:
                sock.settimeout(20.0)
                send(sock, GREETING)
                answer(sock, {})
                say(sock)

        self.run_raw(serve, talk)

    def run_raw(self, serve: Callable[[], None], talk: Talk) -> None:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            asyncio.run(self._talk(talk))
        finally:
            thread.join()

    async def _talk(self, talk: Talk) -> None:
        monitor = await Monitor.connect(
            str(self.path), lambda name, data: self.events.append((name, data)), self.silences.append
        )
        try:
            await talk(monitor)
        finally:
            await monitor.close()


def send(sock: socket.socket, *messages: object) -> None:
    sock.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """One command, whole, and the fds that came with its first bytes."""
    data, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(64))
    fds = [fd for _, _, raw in ancillary for fd in memoryview(raw).cast("i")]
    return json.loads(data), fds


def answer(sock: socket.socket, result: object) -> dict[str, Any]:
    command, _ = receive(sock)
    send(sock, {"return": result, "id": command["id"]} if "id" in command else {"return": result})
    return command
