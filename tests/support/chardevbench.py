# SPDX-License-Identifier: GPL-2.0-or-later
"""A device at one end of a chardev, and users at the other."""

from __future__ import annotations

import logging
import os
import re
import socket
from pathlib import Path

import pytest

from common.chardev import Chardev, open_chardev
from tests.support.steploop import CountingLoop, run_until

LOG = logging.getLogger("test.chardev")


class Device:
    """A frontend with room for so many characters."""

    def __init__(self, loop: CountingLoop) -> None:
        self.loop = loop
        self.room = 1 << 20
        self.received = bytearray()
        self.ready = 0
        self.connections: list[bool] = []
        self.chardev = Chardev()

    def open(self, spec: str) -> Chardev:
        self.chardev = open_chardev(spec, self.loop, LOG, self, self.connections.append)
        return self.chardev

    def can_receive(self) -> int:
        return self.room

    def receive(self, data: bytes) -> None:
        assert len(data) <= self.room
        self.room -= len(data)
        self.received += data

    def transmit_ready(self) -> None:
        self.ready += 1

    def write(self, data: bytes) -> None:
        assert self.chardev.write(data) == len(data)

    def fill(self) -> bytes:
        """Writes until the chardev refuses, and returns what it took."""
        taken = bytearray()
        chunk = bytes(range(256)) * 3
        while count := self.chardev.write(chunk[: 1 + len(taken) % len(chunk)]):
            taken += chunk[:count]
            assert len(taken) < 1 << 22
        return bytes(taken)

    def make_room(self, room: int) -> None:
        self.room = room
        self.chardev.resume()


class Stream:
    """The user's end of a pty or a socket, non-blocking."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)

    def read(self) -> bytes:
        """What there is; empty at the end of the stream too."""
        try:
            return os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return b""

    def read_exactly(self, loop: CountingLoop, size: int) -> bytes:
        data = bytearray()

        def enough() -> bool:
            data.extend(self.read())
            return len(data) >= size

        run_until(loop, enough)
        return bytes(data)

    def write(self, data: bytes) -> None:
        assert os.write(self.fd, data) == len(data)

    def try_write(self, data: bytes) -> int:
        """How much of it has been taken; 0 if the kernel's buffers are full."""
        try:
            return os.write(self.fd, data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        os.close(self.fd)


class PtyUser:
    """Opens a pty chardev's slave."""

    def __init__(self, device: Device, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            device.open("pty")
        match = re.search(
            r"^char device redirected to (/dev/pts/\d+)$", "\n".join(caplog.messages), re.MULTILINE
        )
        assert match
        self.path = match[1]

    def connect(self) -> Stream:
        return Stream(os.open(self.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))


class UnixUser:
    """Connects to a unix chardev."""

    def __init__(self, device: Device, path: Path) -> None:
        self.path = path
        device.open(f"unix:{path}")

    def connect(self) -> Stream:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        return Stream(sock.detach())


User = PtyUser | UnixUser


def connect(user: User, device: Device) -> Stream:
    """Connects, and makes sure that the chardev knows."""
    stream = user.connect()
    stream.write(b"!")
    run_until(device.loop, lambda: device.received)
    assert device.received == b"!"
    device.received.clear()
    return stream
