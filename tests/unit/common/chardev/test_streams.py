# SPDX-License-Identifier: GPL-2.0-or-later
"""What pty and unix have in common, on real ones and a real loop."""

from __future__ import annotations

import pytest

from common.chardev import Chardev
from common.chardev.base import MAX_OUTPUT
from tests.support.chardevbench import Device, User, connect
from tests.support.steploop import run_ready, run_until


@pytest.fixture(params=["pty_user", "unix_user"])
def user(request: pytest.FixtureRequest) -> User:
    user: User = request.getfixturevalue(request.param)
    return user


def test_both_directions_are_transparent(user: User, device: Device) -> None:
    stream = connect(user, device)
    everything = bytes(range(256))
    device.write(everything)
    assert stream.read_exactly(device.loop, 256) == everything
    stream.write(everything)
    run_until(device.loop, lambda: len(device.received) >= 256)
    assert device.received == everything
    stream.close()


def test_output_without_a_reader_is_lost(user: User, device: Device) -> None:
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


def test_a_slow_reader_holds_the_device_up(user: User, device: Device) -> None:
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


def test_the_buffer_is_bounded(user: User, device: Device) -> None:
    """What is taken beyond the kernel's buffers is no more than the limit."""
    stream = connect(user, device)
    taken = len(device.fill())
    kernel = len(stream.read())
    while chunk := stream.read():
        kernel += len(chunk)
    assert 0 < taken - kernel <= MAX_OUTPUT
    stream.close()


def test_a_reader_that_leaves_frees_the_device(user: User, device: Device) -> None:
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


def test_input_while_output_is_held_up(user: User, device: Device) -> None:
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


def test_input_waits_for_room(user: User, device: Device) -> None:
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


def test_a_user_who_left_costs_nothing(user: User, device: Device) -> None:
    stream = connect(user, device)
    stream.close()
    run_until(device.loop, lambda: not device.chardev.connected)
    assert run_ready(device.loop) < 3
    assert run_ready(device.loop) == 0


def test_what_a_user_left_behind_is_heard(user: User, device: Device) -> None:
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


def test_output_to_a_user_who_left_costs_nothing_of_what_he_said(user: User, device: Device) -> None:
    stream = connect(user, device)
    device.room = 0
    stream.write(b"last words")
    run_ready(device.loop)
    stream.close()
    device.write(b"lost")
    device.make_room(100)
    run_until(device.loop, lambda: device.received == b"last words")


def test_connections_are_reported(user: User, device: Device) -> None:
    run_ready(device.loop)
    assert device.connections == []
    for _ in range(3):
        stream = connect(user, device)
        assert device.connections == [True]
        stream.close()
        run_until(device.loop, lambda: len(device.connections) == 2)
        assert device.connections == [True, False]
        device.connections.clear()


def test_closing_with_a_user(user: User, device: Device) -> None:
    stream = connect(user, device)
    device.chardev.close()
    device.chardev = Chardev()
    assert run_ready(device.loop) == 0
    stream.close()


def test_dropped_output_is_counted(user: User, device: Device) -> None:
    """The status says so as long as nobody is there, once something was dropped."""
    run_ready(device.loop)
    assert list(device.chardev.amiss()) == []
    device.write(b"x" * 100)
    assert device.chardev.dropped_output == 100
    (text,) = device.chardev.amiss()
    assert text == f"100 bytes of output dropped: nobody is connected to {user.path}"
    stream = connect(user, device)
    assert list(device.chardev.amiss()) == []
    taken = len(device.fill())
    assert device.chardev.dropped_output == 100
    stream.close()
    run_until(device.loop, lambda: not device.chardev.connected)
    lost = device.chardev.dropped_output - 100
    assert 0 < lost <= taken, "what was kept for a slow reader goes with him"
    assert list(device.chardev.amiss()) == [], "it was there for somebody"
    device.write(b"again")
    (text,) = device.chardev.amiss()
    assert text.startswith("5 bytes of output dropped")
    assert device.chardev.dropped_output == 105 + lost
