# SPDX-License-Identifier: GPL-2.0-or-later
"""The far ends of a serial line: real ptys, sockets and files on a real loop."""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import chardev
from common.chardev import Chardev, open_chardev
from common.errors import UsageError
from tests.support.fds import count_fds
from tests.support.steploop import CountingLoop, run_ready, run_until

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


@pytest.fixture
def loop() -> Iterator[CountingLoop]:
    before = count_fds()
    loop = CountingLoop()
    yield loop
    loop.close()
    assert count_fds() == before


@pytest.fixture
def device(loop: CountingLoop) -> Iterator[Device]:
    device = Device(loop)
    yield device
    device.chardev.close()


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

    def close(self) -> None:
        os.close(self.fd)


class PtyUser:
    """Opens a pty chardev's slave."""

    def __init__(self, device: Device, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            device.open("pty")
        match = re.fullmatch(r"char device redirected to (/dev/pts/\d+)", caplog.messages[-1])
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


@pytest.fixture(params=["pty", "unix"])
def user(
    request: pytest.FixtureRequest, device: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> PtyUser | UnixUser:
    if request.param == "pty":
        return PtyUser(device, caplog)
    return UnixUser(device, tmp_path / "line")


User = PtyUser | UnixUser


def connect(user: User, device: Device) -> Stream:
    """Connects, and makes sure that the chardev knows."""
    stream = user.connect()
    stream.write(b"!")
    run_until(device.loop, lambda: device.received)
    assert device.received == b"!"
    device.received.clear()
    return stream


class TestStreams:
    """What pty and unix have in common."""

    def test_both_directions_are_transparent(self, user: User, device: Device) -> None:
        stream = connect(user, device)
        everything = bytes(range(256))
        device.write(everything)
        assert stream.read_exactly(device.loop, 256) == everything
        stream.write(everything)
        run_until(device.loop, lambda: len(device.received) >= 256)
        assert device.received == everything
        stream.close()

    def test_output_without_a_reader_is_lost(self, user: User, device: Device) -> None:
        run_ready(device.loop)
        device.write(b"before" * 2000)
        stream = connect(user, device)
        device.write(b"during")
        assert stream.read_exactly(device.loop, 6) == b"during"
        stream.close()
        run_until(device.loop, lambda: not device.chardev.connected)
        device.write(b"after" * 2000)
        stream = connect(user, device)
        device.write(b"again")
        assert stream.read_exactly(device.loop, 5) == b"again"
        stream.close()

    def test_a_slow_reader_holds_the_device_up(self, user: User, device: Device) -> None:
        """Nothing is lost, the buffer is bounded, and the device is told when it may go on."""
        stream = connect(user, device)
        sent = device.fill()
        assert device.ready == 0
        assert run_ready(device.loop) < 100, "no busy loop while the reader sleeps"
        received = stream.read()
        assert device.chardev.write(b"overtaking") == 0
        received += stream.read_exactly(device.loop, len(sent) - len(received))
        assert received == sent
        run_until(device.loop, lambda: device.ready)
        assert device.ready == 1
        device.write(b"more")
        assert stream.read_exactly(device.loop, 4) == b"more"
        assert run_ready(device.loop) == 0, "an ordinary read by the user wakes nobody"
        stream.close()

    def test_the_buffer_is_bounded(self, user: User, device: Device) -> None:
        """What is taken beyond the kernel's buffers is no more than the limit."""
        stream = connect(user, device)
        taken = len(device.fill())
        kernel = len(stream.read())
        while chunk := stream.read():
            kernel += len(chunk)
        assert 0 < taken - kernel <= chardev.MAX_OUTPUT
        stream.close()

    def test_a_reader_that_leaves_frees_the_device(self, user: User, device: Device) -> None:
        stream = connect(user, device)
        device.fill()
        stream.close()
        run_until(device.loop, lambda: device.ready)
        device.write(b"lost")
        assert run_ready(device.loop) < 100
        stream = connect(user, device)
        device.write(b"fresh")
        assert stream.read_exactly(device.loop, 5) == b"fresh"
        stream.close()

    def test_input_while_output_is_held_up(self, user: User, device: Device) -> None:
        """Input that was waiting for room is taken, and the output still goes on afterwards."""
        stream = connect(user, device)
        device.room = 0
        stream.write(b"x")
        run_ready(device.loop)
        sent = device.fill()
        device.make_room(1)
        run_until(device.loop, lambda: device.received == b"x")
        assert stream.read_exactly(device.loop, len(sent)) == sent
        run_until(device.loop, lambda: device.ready)
        stream.close()

    def test_input_waits_for_room(self, user: User, device: Device) -> None:
        stream = connect(user, device)
        device.room = 3
        stream.write(b"abcdefgh")
        run_until(device.loop, lambda: len(device.received) == 3)
        assert run_ready(device.loop) < 3, "no busy loop while there is no room"
        device.make_room(0)
        assert run_ready(device.loop) == 0
        device.make_room(2)
        run_until(device.loop, lambda: len(device.received) == 5)
        device.make_room(100)
        run_until(device.loop, lambda: len(device.received) == 8)
        assert device.received == b"abcdefgh"
        stream.write(b"i")
        run_until(device.loop, lambda: device.received.endswith(b"i"))
        stream.close()

    def test_a_user_who_left_costs_nothing(self, user: User, device: Device) -> None:
        stream = connect(user, device)
        stream.close()
        run_until(device.loop, lambda: not device.chardev.connected)
        assert run_ready(device.loop) < 3
        assert run_ready(device.loop) == 0

    def test_what_a_user_left_behind_is_heard(self, user: User, device: Device) -> None:
        """No busy loop while it can't be delivered, and the next user is served."""
        stream = connect(user, device)
        device.room = 0
        stream.write(b"behind")
        stream.close()
        run_until(device.loop, lambda: not device.chardev.connected)
        assert run_ready(device.loop) < 3
        assert run_ready(device.loop) == 0
        device.write(b"lost")
        device.make_room(100)
        stream = user.connect()
        stream.write(b"x")
        run_until(device.loop, lambda: device.received.endswith(b"x"))
        assert device.received == b"behindx"
        stream.close()

    def test_output_to_a_user_who_left_costs_nothing_of_what_he_said(
        self, user: User, device: Device
    ) -> None:
        stream = connect(user, device)
        device.room = 0
        stream.write(b"last words")
        run_ready(device.loop)
        stream.close()
        device.write(b"lost")
        device.make_room(100)
        run_until(device.loop, lambda: device.received == b"last words")

    def test_connections_are_reported(self, user: User, device: Device) -> None:
        run_ready(device.loop)
        assert device.connections == []
        for _ in range(3):
            stream = connect(user, device)
            assert device.connections == [True]
            stream.close()
            run_until(device.loop, lambda: len(device.connections) == 2)
            assert device.connections == [True, False]
            device.connections.clear()

    def test_closing_with_a_user(self, user: User, device: Device) -> None:
        stream = connect(user, device)
        device.chardev.close()
        device.chardev = Chardev()
        assert run_ready(device.loop) == 0
        stream.close()


class TestPty:
    def test_is_raw_from_the_start_and_after_each_user(
        self, device: Device, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Otherwise what the guest says to nobody would be echoed back to it."""
        user = PtyUser(device, caplog)
        stream = connect(user, device)
        settings = termios.tcgetattr(stream.fd)
        assert not settings[tty.LFLAG] & (termios.ECHO | termios.ICANON | termios.ISIG)
        assert not settings[tty.OFLAG] & termios.OPOST
        settings[tty.LFLAG] |= termios.ECHO | termios.ICANON
        termios.tcsetattr(stream.fd, termios.TCSANOW, settings)
        stream.close()
        run_until(device.loop, lambda: not device.chardev.connected)
        stream = user.connect()
        assert not termios.tcgetattr(stream.fd)[tty.LFLAG] & (termios.ECHO | termios.ICANON)
        stream.close()

    def test_output_notices_the_reader(self, device: Device, caplog: pytest.LogCaptureFixture) -> None:
        """A user who only listens is found when there is something to say."""
        user = PtyUser(device, caplog)
        run_ready(device.loop)
        stream = user.connect()
        device.write(b"hello")
        assert device.chardev.connected
        assert stream.read_exactly(device.loop, 5) == b"hello"
        stream.close()


class TestUnix:
    def test_one_client_at_a_time(self, device: Device, tmp_path: Path) -> None:
        """The second waits, its characters too, until the first has gone."""
        user = UnixUser(device, tmp_path / "line")
        first = connect(user, device)
        second = user.connect()
        second.write(b"second")
        assert run_ready(device.loop) < 3
        device.write(b"out")
        assert first.read_exactly(device.loop, 3) == b"out"
        assert device.received == b""
        first.close()
        run_until(device.loop, lambda: device.received)
        assert device.received == b"second"
        device.write(b"out")
        assert second.read_exactly(device.loop, 3) == b"out"
        second.close()

    def test_a_client_makes_room_though_not_all_it_said_was_heard(
        self, device: Device, tmp_path: Path
    ) -> None:
        user = UnixUser(device, tmp_path / "line")
        first = connect(user, device)
        device.room = 0
        first.write(b"unheard")
        first.close()
        second = user.connect()
        run_until(device.loop, lambda: device.connections == [True, False, True])
        device.write(b"hello")
        assert second.read_exactly(device.loop, 5) == b"hello"
        device.make_room(100)
        second.write(b"x")
        run_until(device.loop, lambda: device.received == b"x")
        second.close()

    def test_half_closed_client(self, device: Device, tmp_path: Path) -> None:
        """Its last characters arrive, then it has gone."""
        user = UnixUser(device, tmp_path / "line")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(user.path))
            sock.sendall(b"last words")
            sock.shutdown(socket.SHUT_WR)
            run_until(device.loop, lambda: device.connections == [True, False])
            assert device.received == b"last words"
            assert sock.recv(1, socket.MSG_DONTWAIT) == b""

    def test_is_private_and_unlinked(self, device: Device, tmp_path: Path) -> None:
        path = tmp_path / "line"
        device.open(f"unix:{path}")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        device.chardev.close()
        device.chardev = Chardev()
        assert not path.exists()

    def test_in_use(self, device: Device, tmp_path: Path) -> None:
        path = tmp_path / "line"
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            with pytest.raises(UsageError, match=re.escape(f"chardev=unix:{path}:") + ".* in use"):
                device.open(f"unix:{path}")
        assert path.exists()
        device.open(f"unix:{path}")


class TestFile:
    def test_truncates_and_keeps_everything(self, device: Device, tmp_path: Path) -> None:
        path = tmp_path / "log"
        path.write_bytes(b"old" * 100)
        device.open(f"file:{path}")
        device.write(b"new\n\0\xff")
        assert path.read_bytes() == b"new\n\0\xff"

    def test_full_disk(self, device: Device, caplog: pytest.LogCaptureFixture) -> None:
        """Characters are lost, the device goes on, and the log isn't flooded."""
        device.open("file:/dev/full")
        device.write(b"x" * 1000)
        assert 1 <= len(caplog.messages) < 20
        assert "/dev/full: character lost: No space left" in caplog.messages[0]

    def test_fifo_without_a_reader_is_refused_not_waited_for(self, device: Device, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(UsageError, match="No such device"):
            device.open(f"file:{tmp_path}/fifo")


def test_null(device: Device) -> None:
    device.open("null")
    device.write(b"x" * 100)
    assert device.chardev.connected


@pytest.mark.parametrize(
    "spec",
    [
        *("", "nul", "null:x", "pty:x", "file", "file:", "unix:", "tcp:1", "file:/nonexistent/x"),
        *("file:a\0b", "unix:/nonexistent/x", "unix:a\0b", "unix:" + "x" * 200, "file:/", "unix:/"),
    ],
)
def test_bad_specs(device: Device, spec: str) -> None:
    """One line that begins with the option."""
    before = count_fds()
    with pytest.raises(UsageError) as caught:
        device.open(spec)
    assert str(caught.value).startswith(f"chardev={spec}:")
    assert "\n" not in str(caught.value)
    assert count_fds() == before
