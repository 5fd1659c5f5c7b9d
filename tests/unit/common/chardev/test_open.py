# SPDX-License-Identifier: GPL-2.0-or-later
"""The texts that describe a far end."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from common.errors import UsageError
from tests.support.chardevbench import Device, UnixUser, connect
from tests.support.fds import count_fds, no_more_fds
from tests.support.steploop import run_until


@pytest.mark.parametrize("kind", ["pty", "file", "unix"])
@pytest.mark.parametrize("free", range(3))
def test_shortage_of_fds(device: Device, tmp_path: Path, kind: str, free: int) -> None:
    """It is one clear line, or works; nothing stays open, as the fixture checks."""
    spare = [os.dup(0) for _ in range(free)]
    with no_more_fds():
        for fd in spare:
            os.close(fd)
        with contextlib.suppress(UsageError):
            device.open("pty" if kind == "pty" else f"{kind}:{tmp_path}/line")


@pytest.mark.parametrize("kind", ["pty", "file", "unix"])
def test_shortage_of_watches(
    device: Device, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """epoll has a limit for each user, which other processes may have used up (epoll(7))."""
    monkeypatch.setattr(device.loop, "add", refuse)
    with pytest.raises(UsageError, match="No space left"):
        device.open("pty" if kind == "pty" else f"{kind}:{tmp_path}/line")


def test_shortage_of_watches_for_a_client(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs that client, and the next one is served."""
    user = UnixUser(device, tmp_path / "line")
    with monkeypatch.context() as patch:
        patch.setattr(device.loop, "add", refuse)
        stream = user.connect()
        run_until(device.loop, lambda: "can't take a client: No space left" in caplog.text)
        stream.close()
    assert device.connections == []
    stream = connect(user, device)
    stream.close()


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
