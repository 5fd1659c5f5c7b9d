# SPDX-License-Identifier: GPL-2.0-or-later
"""Chardevs one process after the other: users stay connected, and nothing that they say or hear is lost."""

from __future__ import annotations

import os
import re
import select
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.chardev import Chardev, arrivals, file, open_chardev, pending, pty, stream, unix
from common.fdstore import FdStore
from common.journal import RateLimited
from common.keptfiles import KeptFiles
from tests.support.chardevbench import LOG, Stream
from tests.support.fds import no_fd_is_left
from tests.support.killing import killed_at
from tests.support.steploop import CountingLoop, run_ready, run_until
from tests.support.storemanager import StoreManager
from tests.support.wait import wait_until

SOURCES = tuple(str(module.__file__) for module in (arrivals, file, pending, pty, stream, unix))
"""what must stand a kill at any line"""
ROOM = 4


class Process:
    """A device with its chardev. What commit() has made valid is what the next one begins with."""

    def __init__(self, spec: str, manager: StoreManager, valid: tuple[bytes, int, int]) -> None:
        self.loop = CountingLoop()
        inherited = manager.hand_over()
        self.store = FdStore(self.loop, RateLimited(LOG), manager.address, inherited)
        self.files = KeptFiles(self.store, "28.own-")
        self.files.commit = self.commit
        self.manager = manager
        self.valid = valid
        self.room = ROOM
        self.connected = False
        self.ready = 0
        self.received = bytearray()
        self.chardev: Chardev = open_chardev(spec, self.loop, LOG, self, self._on_connected, self.files)
        self.received[:] = valid[0]
        self.chardev.arrivals.delivered, self.chardev.arrivals.held = valid[1:]
        self.chardev.restored()
        self.commit()
        self.dropped = self.store.drop_inherited()
        manager.serve()

    def commit(self) -> None:
        arrivals = self.chardev.arrivals
        self.valid = bytes(self.received), arrivals.delivered, arrivals.held

    def can_receive(self) -> int:
        return self.room

    def receive(self, data: bytes) -> None:
        assert len(data) <= self.room
        self.received += data

    def transmit_ready(self) -> None:
        self.ready += 1

    def run(self) -> None:
        """Handles what is there, as the daemon does: after each handler its state becomes valid."""
        while run_ready(self.loop):
            self.commit()
        self.manager.serve()

    def leave(self) -> None:
        """Ends as at a restart."""
        self.chardev.close()
        self.store.close()
        self.loop.close()

    def _on_connected(self, connected: bool) -> None:
        self.connected = connected


class Lives:
    """One process after the other, with one user each of whom the store knows nothing."""

    def __init__(self, directory: Path) -> None:
        self.manager = StoreManager(directory)
        self.directory = directory
        self.spec = ""
        self.process: Process | None = None

    def begin(self, spec: str) -> Process:
        self.spec = spec
        return self.restart((b"", 0, 0))

    def restart(self, valid: tuple[bytes, int, int] | None = None) -> Process:
        """The next process, with what the last one has made valid."""
        if self.process is not None:
            valid = self.process.valid if valid is None else valid
            self.process.leave()
        assert valid is not None
        self.process = Process(self.spec, self.manager, valid)
        return self.process

    def hear(self, sent: bytes | bytearray, when: str = "") -> None:
        """Lets the process run until it has received all that was sent."""
        process = self.process
        assert process is not None

        def has_heard() -> bool:
            process.commit()
            return len(process.received) >= len(sent)

        run_until(process.loop, has_heard)
        process.run()
        assert process.received == sent, when

    def wait_for_input(self) -> int:
        """Until what a user has written is at this end, which takes a terminal a moment. Returns the end's fd."""
        (fd,) = next(fds for name, fds in self.manager.files.items() if re.search("pty|client", name))
        assert select.select([fd], [], [], 20.0)[0]
        return fd

    def close(self) -> None:
        if self.process is not None:
            self.process.files.discard()
            self.process.leave()
        self.manager.serve()
        assert not self.manager.files, "a device that is removed leaves nothing"
        self.manager.close()


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    with no_fd_is_left(), closing(Lives(tmp_path)) as lives:
        yield lives


def unix_user(lives: Lives) -> Stream:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(lives.directory / "line"))
    return Stream(sock.detach())


def pty_user(lives: Lives, caplog: pytest.LogCaptureFixture) -> Stream:
    path = re.findall(r"redirected to (/dev/pts/\d+)", "\n".join(caplog.messages))[-1]
    return Stream(os.open(path, os.O_RDWR | os.O_NOCTTY))


@pytest.fixture(params=["unix", "pty"])
def user(lives: Lives, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Stream]:
    caplog.set_level("INFO")
    process = lives.begin("pty" if request.param == "pty" else f"unix:{lives.directory}/line")
    user = pty_user(lives, caplog) if request.param == "pty" else unix_user(lives)
    run_until(process.loop, lambda: process.connected)
    process.run()
    yield user
    user.close()


def test_a_user_stays_connected(lives: Lives, user: Stream) -> None:
    for number in range(3):
        process = lives.restart()
        assert process.connected
        assert process.dropped == []
        assert process.chardev.write(b"%d" % number) == 1
        assert user.read_exactly(process.loop, 1) == b"%d" % number
        user.write(b"%d" % number)
        lives.hear(b"012"[: number + 1])


def test_input_between_two_processes_is_heard(lives: Lives, user: Stream) -> None:
    assert lives.process is not None
    lives.process.leave()
    user.write(b"ab")
    lives.process = Process(lives.spec, lives.manager, lives.process.valid)
    lives.hear(b"ab")


def test_input_is_heard_once_wherever_the_process_is_killed(lives: Lives, user: Stream) -> None:
    sent = bytearray()
    line, was_killed = 1, True
    while was_killed:
        process = lives.process
        assert process is not None
        data = os.urandom(ROOM + 1)
        sent += data
        user.write(data)
        lives.wait_for_input()
        was_killed = killed_at(line, process.run, SOURCES)
        lives.restart()
        lives.hear(sent, f"killed at line {line}")
        line += 1
    assert line > 15


def test_input_is_heard_once_by_a_device_that_takes_it_in_parts(lives: Lives, user: Stream) -> None:
    """More is on its way than the device has room for after a restart: its guest has switched a FIFO off, say."""
    sent = bytearray()
    line, was_killed = 1, True
    while was_killed:
        process = lives.process
        assert process is not None
        data = os.urandom(ROOM)
        sent += data
        user.write(data)
        process.chardev.arrivals.read(lives.wait_for_input(), ROOM)
        process = lives.restart()
        process.room = 1
        was_killed = killed_at(line, process.run, SOURCES)
        lives.restart()
        lives.hear(sent, f"killed at line {line}")
        line += 1
    assert line > 15


def test_output_is_lost_nowhere(lives: Lives, user: Stream) -> None:
    """What a process has taken is with the user; what it hasn't is the device's still."""
    process = lives.process
    assert process is not None
    taken = bytearray()
    while count := process.chardev.write(chunk := os.urandom(64)):
        taken += chunk[:count]
    process = lives.restart()
    while process.chardev.write(b"x"):  # a terminal may have passed some on meanwhile
        taken += b"x"
    assert user.read_exactly(process.loop, len(taken)) == taken
    run_until(process.loop, lambda: process.ready)
    assert process.chardev.write(b"y") == 1
    assert user.read_exactly(process.loop, 1) == b"y"


def test_clients_that_have_left_are_heard_by_a_later_process(lives: Lives) -> None:
    """In their order, before the present one, who is served meanwhile."""
    process = lives.begin(f"unix:{lives.directory}/line")
    process.room = 0
    for word in (b"one", b"two"):
        user = unix_user(lives)
        user.write(word)
        user.close()
        process.run()
    user = unix_user(lives)
    user.write(b"three")
    process.run()
    process = lives.restart()
    process.room = 0
    process.run()
    assert process.chardev.write(b"x") == 1
    assert user.read_exactly(process.loop, 1) == b"x"
    process.room = ROOM
    process.chardev.resume()
    run_until(process.loop, lambda: len(process.received) >= len(b"onetwothree"))
    assert process.received == b"onetwothree"
    user.close()
    process.run()
    assert not process.connected
    assert [name for name in lives.manager.files if "client" in name] == []


def test_who_connects_between_two_processes_is_served(lives: Lives) -> None:
    lives.begin(f"unix:{lives.directory}/line")
    assert lives.process is not None
    lives.process.leave()
    user = unix_user(lives)
    user.write(b"ab")
    lives.process = process = Process(lives.spec, lives.manager, lives.process.valid)
    run_until(process.loop, lambda: process.received == b"ab")
    user.close()


def test_a_path_that_somebody_has_removed_is_bound_again(lives: Lives) -> None:
    lives.begin(f"unix:{lives.directory}/line")
    (lives.directory / "line").unlink()
    process = lives.restart()
    assert [name.partition("-")[2][:8] for name in process.dropped] == ["listener"]
    user = unix_user(lives)
    run_until(process.loop, lambda: process.connected)
    user.close()


def test_another_path_is_another_line(lives: Lives) -> None:
    """The clients of the old one are hung up."""
    process = lives.begin(f"unix:{lives.directory}/line")
    user = unix_user(lives)
    run_until(process.loop, lambda: process.connected)
    process.run()
    lives.spec = "null"
    process = lives.restart()
    assert process.dropped
    lives.manager.serve()
    assert not user.read()
    with pytest.raises(BrokenPipeError):
        user.write(b"x")
    user.close()


def test_output_into_a_file_is_complete(lives: Lives) -> None:
    """It isn't truncated again, and what a process has taken is written by the next one, once."""
    path = lives.directory / "log"
    path.write_bytes(b"old")
    process = lives.begin(f"file:{path}")
    sent = bytearray()
    line, was_killed = 1, True
    while was_killed or line < 10:
        data = os.urandom(3)
        sent += data
        process.chardev.write(data)
        writing = process.chardev._thread  # type: ignore[attr-defined]
        was_killed = writing.is_alive() and killed_at(line, process.run, SOURCES)
        process = lives.restart()
        line += 1
    wait_until(lambda: path.read_bytes() == sent, "all of it is there, once")


def test_output_for_a_file_that_was_moved_goes_on_in_a_new_one(lives: Lives) -> None:
    path = lives.directory / "log"
    process = lives.begin(f"file:{path}")
    process.chardev.write(b"first")
    wait_until(lambda: path.read_bytes() == b"first", "it is written")
    path.rename(lives.directory / "log.1")
    process = lives.restart()
    process.chardev.write(b"second")
    wait_until(lambda: path.read_bytes() == b"second", "it is written")
    assert (lives.directory / "log.1").read_bytes() == b"first"
