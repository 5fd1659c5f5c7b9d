# SPDX-License-Identifier: GPL-2.0-or-later
"""The pseudo-terminal at the end of a line."""

from __future__ import annotations

import errno
import os
import random
import termios
import threading
import tty

import pytest

from common import inotify
from tests.support.chardevbench import Device, PtyUser, connect
from tests.support.steploop import run_ready, run_until
from tests.support.threads import wait_until_blocked_in_write


def test_is_raw_from_the_start_and_after_each_user(device: Device, pty_user: PtyUser) -> None:
    """Otherwise what the guest says to nobody would be echoed back to it."""
    stream = connect(pty_user, device)
    settings = termios.tcgetattr(stream.fd)
    assert not settings[tty.LFLAG] & (termios.ECHO | termios.ICANON | termios.ISIG)
    assert not settings[tty.OFLAG] & termios.OPOST
    settings[tty.LFLAG] |= termios.ECHO | termios.ICANON
    termios.tcsetattr(stream.fd, termios.TCSANOW, settings)
    stream.close()
    run_until(device.loop, lambda: not device.chardev.connected)
    stream = pty_user.connect()
    assert not termios.tcgetattr(stream.fd)[tty.LFLAG] & (termios.ECHO | termios.ICANON)
    stream.close()


def test_a_user_is_noticed_when_he_opens_it(device: Device, pty_user: PtyUser) -> None:
    """Before a byte goes either way, or a getty that waits for the carrier and its user wait for each other."""
    assert run_ready(device.loop) < 3
    for _ in range(2):
        stream = pty_user.connect()
        run_until(device.loop, lambda: device.connections == [True])
        second = pty_user.connect()
        stream.close()
        run_ready(device.loop)
        assert device.connections == [True], "somebody is there as long as anybody has it open"
        second.close()
        run_until(device.loop, lambda: device.connections == [True, False])
        assert run_ready(device.loop) < 3
        assert run_ready(device.loop) == 0
        device.connections.clear()


def test_the_next_user_has_opened_it_by_the_time_the_end_of_the_last_one_is_read(
    device: Device, pty_user: PtyUser
) -> None:
    """There is no event for that: epoll tells of the end alone, and inotify may have told of both before."""
    stream = pty_user.connect()
    run_until(device.loop, lambda: device.connections == [True])
    device.chardev._on_end_of_input()  # type: ignore[attr-defined]
    assert device.connections == [True, False, True]
    stream.close()


def test_setting_raw_mode_does_not_wait_for_the_next_user(device: Device, pty_user: PtyUser) -> None:
    """One who has opened the slave since and is blocked in a write holds the terminal's lock for writers."""
    device.room = 0
    stream = pty_user.connect()
    data = random.randbytes(1 << 18)
    os.set_blocking(stream.fd, True)
    written: list[int] = []
    writer = threading.Thread(target=lambda: written.append(os.write(stream.fd, data)))
    writer.start()
    wait_until_blocked_in_write(writer)
    hang_up = threading.Thread(target=device.chardev._hang_up, daemon=True)  # type: ignore[attr-defined]
    hang_up.start()
    hang_up.join(10.0)
    assert not hang_up.is_alive()
    device.make_room(1 << 20)
    run_until(device.loop, lambda: len(device.received) == len(data))
    writer.join()
    assert written == [len(data)]
    assert device.received == data
    stream.close()


def test_output_notices_the_reader(device: Device, pty_user: PtyUser) -> None:
    """Also one who has opened it since the last pass of the loop."""
    run_ready(device.loop)
    stream = pty_user.connect()
    device.write(b"hello")
    assert device.chardev.connected
    assert stream.read_exactly(device.loop, 5) == b"hello"
    stream.close()


@pytest.mark.parametrize("call", ["init", "add_watch"])
def test_without_inotify_a_user_is_noticed_by_the_first_byte(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """The numbers of instances and watches are limited for each user, and others may have used them up."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(inotify, call, refuse)
    user = PtyUser(device, caplog)
    assert f"{user.path}: a user is noticed at the first byte" in caplog.text
    stream = user.connect()
    assert run_ready(device.loop) < 3
    assert device.connections == []
    stream.write(b"x")
    run_until(device.loop, lambda: device.connections == [True])
    stream.close()
