# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets that appear, by inotify: when it is told, and what it costs."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.disposal import Disposal
from common.journal import RateLimited
from common.listen import UnixListener
from common.pathwatch import PathWatch
from tests.support.fds import no_fd_is_left, no_more_fds
from tests.support.remotebench import Clock
from tests.support.steploop import CountingLoop, run_ready


class Bench:
    """A watch on a loop that the test steps, in the test's time."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "run" / "a.sock")
        self.clock = Clock()
        self.loop = CountingLoop(self.clock)
        self.told: list[str] = []
        self.watch = PathWatch(self.loop, self._on_listening)
        self._sockets: list[socket.socket] = []

    def _on_listening(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            self.told.append(f"{path}: {client.connect_ex(path)}")

    def bind(self, path: str) -> None:
        sock = socket.socket(socket.AF_UNIX)
        self._sockets.append(sock)
        sock.bind(path)
        sock.listen()

    def look(self) -> list[str]:
        """What was told since the last look."""
        run_ready(self.loop)
        told, self.told = self.told, []
        return told

    def close(self) -> None:
        self.watch.close()
        self.loop.close()
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    (tmp_path / "run").mkdir()
    with no_fd_is_left(), closing(Bench(tmp_path)) as bench:
        yield bench


def test_a_socket_that_appears_is_told_once_and_others_are_not(bench: Bench) -> None:
    bench.watch.watch(bench.path)
    bench.watch.watch(bench.path)
    bench.bind(bench.path + "2")
    assert bench.look() == []
    bench.bind(bench.path)
    assert bench.look() == [f"{bench.path}: 0"]
    os.unlink(bench.path)
    assert bench.look() == []
    bench.bind(bench.path + ".tmp")
    os.rename(bench.path + ".tmp", bench.path)
    assert bench.look() == [f"{bench.path}: 0"]


def test_a_listener_of_ours_is_told_when_it_takes_connections(bench: Bench) -> None:
    """Looked at after each step of its start: one that is bound and doesn't listen yet would refuse."""
    bench.watch.watch(bench.path)
    steps: list[list[str]] = []
    bind, listen = socket.socket.bind, socket.socket.listen

    class Slow(socket.socket):
        def bind(self, address: object) -> None:
            bind(self, address)  # type: ignore[arg-type]
            steps.append(bench.look())

        def listen(self, backlog: int = 1) -> None:
            listen(self, backlog)
            steps.append(bench.look())

    original, socket.socket = socket.socket, Slow  # type: ignore[misc]
    try:
        log = RateLimited(logging.getLogger("test"))
        listener = UnixListener(bench.loop, bench.path, lambda sock: sock.close(), log, Disposal())
    finally:
        socket.socket = original  # type: ignore[misc]
    with closing(listener):
        assert steps == [[], []]
        assert bench.look() == [f"{bench.path}: 0"]


def test_a_directory_that_is_made_anew_is_watched_from_the_next_call_on(bench: Bench) -> None:
    directory = Path(bench.path).parent
    bench.watch.watch(bench.path)
    shutil.rmtree(directory)
    bench.watch.watch(bench.path)
    assert bench.look() == []
    directory.mkdir()
    bench.watch.watch(bench.path)
    bench.bind(bench.path)
    assert bench.look() == [f"{bench.path}: 0"]


def test_without_an_instance_to_spare_nothing_is_told(tmp_path: Path) -> None:
    with no_fd_is_left():
        loop = CountingLoop()
        with no_more_fds():
            watch = PathWatch(loop, pytest.fail)
        path = str(tmp_path / "a.sock")
        watch.watch(path)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
        run_ready(loop)
        watch.close()
        watch.close()
        loop.close()


def test_a_directory_full_of_events_does_not_keep_the_loop_busy(bench: Bench) -> None:
    bench.watch.watch(bench.path)
    directory = Path(bench.path).parent
    other = directory / ("x" * 200)
    for _ in range(2000):
        other.touch()
        other.unlink()
    assert run_ready(bench.loop) <= 16
    assert run_ready(bench.loop) == 0
    bench.bind(bench.path)
    for _ in range(1000):
        bench.clock.now += 0.02
        if told := bench.look():
            break
    assert told == [f"{bench.path}: 0"]


def test_events_that_the_kernel_has_dropped_may_have_been_the_ones(bench: Bench) -> None:
    bench.watch.watch(bench.path)
    with open("/proc/sys/fs/inotify/max_queued_events", encoding="ascii") as limit:
        events = int(limit.read())
    directory = Path(bench.path).parent
    names = [directory / "x", directory / "y"]
    for name in names:
        name.touch()
    for _ in range(events // 2 + 1):
        os.rename(names[0], names[1])
        os.rename(names[1], names[0])
    bench.bind(bench.path)
    for _ in range(1000):
        bench.clock.now += 0.02
        if told := bench.look():
            break
    assert told == [f"{bench.path}: 0"]
