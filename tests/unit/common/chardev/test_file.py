# SPDX-License-Identifier: GPL-2.0-or-later
"""Output into files, and into what only looks like one."""

from __future__ import annotations

import contextlib
import os
import random
import select
import threading
from pathlib import Path

import pytest

from common.chardev import Chardev, file
from common.errors import UsageError
from tests.support.chardevbench import Device
from tests.support.steploop import run_until
from tests.support.threads import wait_until_blocked_in_write
from tests.support.wait import wait_until


def fill(device: Device, path: Path) -> bytearray:
    """Writes until the FIFO is full, and then what the chardev takes; returns what they took."""
    writer = os.open(path, os.O_WRONLY)
    sent = bytearray()

    def filled() -> bool:
        is_full = not select.select([], [writer], [], 0)[1]
        chunk = random.randbytes(1000)
        while count := device.chardev.write(chunk):
            sent.extend(chunk[:count])
        return is_full

    run_until(device.loop, filled)
    os.close(writer)
    return sent


def open_late(device: Device, path: Path) -> int:
    """Opens the chardev on a FIFO; returns the fd of its reader."""
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    device.open(f"file:{path}")
    os.set_blocking(reader, True)
    return reader


def test_truncates_and_keeps_everything(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"old" * 100)
    device.open(f"file:{path}")
    device.write(b"new\n\0\xff")
    wait_until(lambda: path.read_bytes() == b"new\n\0\xff", "it is written")
    for byte in range(256):
        device.write(bytes((byte,)))
    device.chardev.close()
    device.chardev = Chardev()
    assert path.read_bytes() == b"new\n\0\xff" + bytes(range(256)), "close() waits for what was written"


def test_full_disk(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """Characters are dropped and counted, the device goes on, and the log isn't flooded."""
    device.open("file:/dev/full")
    for count in range(1, 31):
        device.write(b"x" * 100)
        run_until(device.loop, lambda count=count: device.chardev.dropped_output == 100 * count)  # type: ignore[misc]
    run_until(device.loop, lambda: caplog.messages)
    assert len(caplog.messages) < 20
    assert caplog.messages[0] == "chardev file /dev/full: output is dropped: No space left on device"
    assert list(device.chardev.amiss()) == [
        "output is dropped: /dev/full: No space left on device (3000 bytes so far)"
    ]


def test_a_file_that_takes_its_time_holds_only_the_device_up(device: Device, tmp_path: Path) -> None:
    """A FIFO whose reader sleeps: neither the loop nor the device waits in a write, and nothing is lost."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    device.open(f"file:{path}")
    sent = fill(device, path)
    received = bytearray()
    ready = device.ready

    def is_all_read() -> bool:
        with contextlib.suppress(BlockingIOError):
            received.extend(os.read(reader, 1 << 16))
        return len(received) == len(sent)

    run_until(device.loop, is_all_read)
    assert received == sent
    run_until(device.loop, lambda: device.ready > ready)
    device.write(b"more")
    sent += b"more"
    run_until(device.loop, is_all_read)
    assert received == sent
    assert device.chardev.dropped_output == 0
    os.close(reader)


def test_output_that_comes_during_a_write_follows(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = open_late(device, path)
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(1 << 16)):
            pass
    os.close(writer)
    device.write(b"first")
    wait_until_blocked_in_write(device.chardev._thread)  # type: ignore[attr-defined]
    device.write(b"second")
    os.set_blocking(reader, False)
    received = bytearray()

    def is_all_read() -> bool:
        with contextlib.suppress(BlockingIOError):
            received.extend(os.read(reader, 1 << 16))
        return received.endswith(b"second")

    run_until(device.loop, is_all_read)
    assert received.lstrip(b"\0") == b"firstsecond"
    os.close(reader)


def test_a_fifo_whose_reader_comes_and_goes(device: Device, tmp_path: Path) -> None:
    """Meanwhile output is dropped, and the status says so."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    os.close(open_late(device, path))
    device.write(b"lost")
    run_until(device.loop, lambda: device.chardev.dropped_output == 4)
    run_until(device.loop, lambda: list(device.chardev.amiss()))
    assert list(device.chardev.amiss()) == [f"output is dropped: {path}: Broken pipe (4 bytes so far)"]
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    device.write(b"fresh")
    os.set_blocking(reader, True)
    assert os.read(reader, 100) == b"fresh"
    run_until(device.loop, lambda: not list(device.chardev.amiss()))
    os.close(reader)


def test_closing_waits_for_what_was_written(device: Device, tmp_path: Path) -> None:
    """Within its time: here the reader begins to read when the chardev is being closed."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = open_late(device, path)
    sent = fill(device, path)
    chardev = device.chardev
    received = bytearray()

    def read_all() -> None:
        wait_until(lambda: chardev._is_closing, "it is being closed")  # type: ignore[attr-defined]
        while data := os.read(reader, 1 << 16):
            received.extend(data)

    thread = threading.Thread(target=read_all)
    thread.start()
    device.chardev.close()
    assert not chardev._thread.is_alive()  # type: ignore[attr-defined]
    device.chardev = Chardev()
    thread.join()
    assert received == sent
    os.close(reader)


def test_closing_does_not_wait_for_a_file_that_takes_its_time(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "_CLOSE_SECONDS", 0.01)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = open_late(device, path)
    fill(device, path)
    device.chardev.close()
    device.chardev = Chardev()
    while os.read(reader, 1 << 16):  # until the thread has written all and closed the file
        pass
    os.close(reader)


def test_without_a_thread_output_is_dropped(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next write tries again to start it."""
    path = tmp_path / "log"
    device.open(f"file:{path}")

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        device.write(b"lost")
    assert device.chardev.dropped_output == 4
    assert caplog.messages == [f"chardev file {path}: output is dropped: can't start new thread"]
    assert list(device.chardev.amiss())
    device.write(b"kept")
    wait_until(lambda: path.read_bytes() == b"kept", "it is written")
    wait_until(lambda: not list(device.chardev.amiss()), "all is well")


def test_fifo_without_a_reader_is_refused_not_waited_for(device: Device, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="No such device"):
        device.open(f"file:{tmp_path}/fifo")
