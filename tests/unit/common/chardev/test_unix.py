# SPDX-License-Identifier: GPL-2.0-or-later
"""The listening socket at the end of a line."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import stat
from pathlib import Path

import pytest

from common.chardev import Chardev, unix
from common.errors import UsageError
from tests.support.chardevbench import Device, UnixUser, connect
from tests.support.fds import send_fds
from tests.support.steploop import run_ready, run_until
from tests.support.unsendable import returns_soon, unsendable_socket


def test_one_client_at_a_time(device: Device, unix_user: UnixUser, caplog: pytest.LogCaptureFixture) -> None:
    """The second waits, its characters too, until the first has gone."""
    caplog.set_level("INFO")
    first = connect(unix_user, device)
    assert caplog.messages == [f"{unix_user.path}: connected"]
    (record,) = caplog.records
    assert vars(record)["peer"].endswith(f"[{os.getpid()}]")
    second = unix_user.connect()
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


@pytest.mark.usefixtures("older_kernel")
def test_the_close_of_fds_that_a_client_sends_holds_up_nobody(device: Device, tmp_path: Path) -> None:
    """Of those that are read, and of those that lie unread at the end."""
    user = UnixUser(device, tmp_path / "older")
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(user.path))
        run_until(device.loop, lambda: device.connections == [True])
        for data, flags in ((b"a", 0), (b"!", socket.MSG_OOB)):
            sock = stack.enter_context(unsendable_socket())
            send_fds(client, data, [sock.fileno()], flags)
            sock.close()
        assert returns_soon(lambda: run_until(device.loop, lambda: device.received == b"a!"))
        device.room = 0
        sock = stack.enter_context(unsendable_socket())
        send_fds(client, b"b", [sock.fileno()])
        sock.close()
        assert returns_soon(device.chardev.close)


def test_a_client_that_has_gone_is_heard_before_the_next_one(device: Device, unix_user: UnixUser) -> None:
    """It makes room for the next one at once, although the device has not read what it sent."""
    first = connect(unix_user, device)
    device.room = 0
    first.write(b"first")
    first.close()
    second = unix_user.connect()
    second.write(b"second")
    run_until(device.loop, lambda: device.connections == [True, False, True])
    device.write(b"hello")
    assert second.read_exactly(device.loop, 5) == b"hello"
    assert run_ready(device.loop) < 3
    assert run_ready(device.loop) == 0
    while len(device.received) < len(b"firstsecond"):
        heard = len(device.received)
        device.make_room(1)
        run_until(device.loop, lambda heard=heard: len(device.received) > heard)  # type: ignore[misc]
    assert device.received == b"firstsecond"
    second.close()


def test_nothing_is_delivered_once_it_is_closed(device: Device, unix_user: UnixUser) -> None:
    first = connect(unix_user, device)
    device.room = 0
    first.write(b"first")
    first.close()
    run_until(device.loop, lambda: device.connections == [True, False])
    device.make_room(100)
    device.chardev.close()
    device.chardev = Chardev()
    run_ready(device.loop)
    assert device.received == b""


def test_clients_that_have_gone_before_their_turn_are_heard(device: Device, unix_user: UnixUser) -> None:
    """In the order in which they connected, also when the device only reads when all have gone."""
    device.room = 0
    for number in range(10):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(unix_user.path))
            sock.sendall(b"%d" % number)
    run_until(device.loop, lambda: device.connections == [True, False] * 10)
    device.make_room(100)
    run_until(device.loop, lambda: len(device.received) == 10)
    assert device.received == b"0123456789"


def test_a_client_leaves_while_the_device_writes(device: Device, unix_user: UnixUser) -> None:
    """The device notices first, in the middle of a write; what the client sent is heard all the same."""
    stream = connect(unix_user, device)
    stream.write(b"last words")
    stream.close()
    device.write(b"x")
    assert device.connections == [True, False]
    assert device.chardev.dropped_output == 1
    run_until(device.loop, lambda: device.received == b"last words")


def test_what_is_left_behind_is_bounded(
    device: Device, unix_user: UnixUser, caplog: pytest.LogCaptureFixture
) -> None:
    """What doesn't fit is dropped, counted and logged, and the next client is served."""
    connect(unix_user, device).close()
    device.room = 0
    sent = bytearray()
    for _ in range(4):
        stream = unix_user.connect()
        while count := stream.try_write(chunk := random.randbytes(1 << 12)):
            sent += chunk[:count]
        stream.close()
    assert len(sent) > unix.MAX_LEFT_BEHIND
    stream = unix_user.connect()
    run_until(device.loop, lambda: device.connections == [True, False] * 5 + [True])
    dropped = len(sent) - unix.MAX_LEFT_BEHIND
    assert device.chardev.dropped_input == dropped
    assert "bytes of input dropped: the guest doesn't read" in caplog.text
    device.make_room(1 << 20)
    run_until(device.loop, lambda: len(device.received) >= unix.MAX_LEFT_BEHIND)
    assert device.received == sent[: unix.MAX_LEFT_BEHIND]
    stream.write(b"x")
    run_until(device.loop, lambda: device.received.endswith(b"x"))
    stream.close()


def test_a_client_that_sends_no_more_still_receives(device: Device, unix_user: UnixUser) -> None:
    """The next one waits until it has gone."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(unix_user.path))
        sock.sendall(b"request")
        sock.shutdown(socket.SHUT_WR)
        run_until(device.loop, lambda: device.received == b"request")
        second = unix_user.connect()
        second.write(b"second")
        assert run_ready(device.loop) < 3
        assert run_ready(device.loop) == 0
        device.write(b"answer")
        assert sock.recv(100, socket.MSG_DONTWAIT) == b"answer"
        assert device.connections == [True]
        assert device.received == b"request"
    run_until(device.loop, lambda: device.received == b"requestsecond")
    assert device.connections == [True, False, True]
    second.close()


def test_a_client_that_sent_no_more_while_the_device_had_no_room(device: Device, unix_user: UnixUser) -> None:
    device.room = 0
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(unix_user.path))
        sock.sendall(b"request")
        sock.shutdown(socket.SHUT_WR)
        run_ready(device.loop)
        device.make_room(100)
        run_until(device.loop, lambda: device.received == b"request")
        device.write(b"answer")
        assert sock.recv(100, socket.MSG_DONTWAIT) == b"answer"


def test_a_client_that_receives_no_more_is_still_heard(device: Device, unix_user: UnixUser) -> None:
    """Output for it is dropped, as nobody else is to get it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(unix_user.path))
        sock.shutdown(socket.SHUT_RD)
        run_until(device.loop, lambda: device.connections)
        device.write(b"unread")
        assert device.chardev.dropped_output == 6
        sock.sendall(b"heard")
        run_until(device.loop, lambda: device.received == b"heard")
        assert device.connections == [True]
    run_until(device.loop, lambda: device.connections == [True, False])


def test_a_client_that_receives_no_more_frees_the_device(device: Device, unix_user: UnixUser) -> None:
    """What was waiting for it is dropped when it sends something: nothing else tells."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(unix_user.path))
        run_until(device.loop, lambda: device.connections)
        device.fill()
        sock.shutdown(socket.SHUT_RD)
        sock.sendall(b"heard")
        run_until(device.loop, lambda: device.received == b"heard")
        assert device.ready == 1
        assert device.chardev.dropped_output > 0
        device.write(b"unread")
        assert device.connections == [True]


def test_nothing_is_lost_while_a_link_keeps_the_loop_busy(device: Device, unix_user: UnixUser) -> None:
    """Neither what came before accept() nor what came with it, whatever else is ready in the same pass."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"x")
        device.loop.add(ours.fileno(), lambda _: None, in_turn=True)
        for number in range(20):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(unix_user.path))
                sock.sendall(b"a")
                run_until(device.loop, lambda number=number: len(device.received) > 2 * number)  # type: ignore[misc]
                sock.sendall(b"b")
        run_until(device.loop, lambda: device.received == b"ab" * 20)
        device.loop.remove(ours.fileno())


def test_is_private_and_unlinked(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "line"
    device.open(f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    device.chardev.close()
    device.chardev = Chardev()
    assert not path.exists()


def test_in_use(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "line"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(UsageError, match=re.escape(f"chardev=unix:{path}:") + ".* in use"):
            device.open(f"unix:{path}")
    assert path.exists()
    device.open(f"unix:{path}")
