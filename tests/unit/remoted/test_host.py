# SPDX-License-Identifier: GPL-2.0-or-later
"""The loop that a device gets: its callbacks may fail, and hold up or end no other device."""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from select import EPOLLET, EPOLLIN, EPOLLOUT

import pytest

from common.loop import Loop
from remoted.guard import Guard, log_stray_errors
from remoted.host import GuardedLoop
from remoted.watchdog import Watchdog
from tests.support.fds import count_fds
from tests.support.remotebench import Clock, Recorder
from tests.support.wait import wait_until

ERRORS = [ZeroDivisionError, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]


class Bench:
    def __init__(self) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.log = Recorder()
        self.guard = Guard(self.log.logger, Watchdog())
        self.guarded = GuardedLoop(self.loop, self.guard)
        self.fd = os.eventfd(1, os.EFD_NONBLOCK)

    def step(self) -> None:
        for _ in range(3):
            self.loop.step()


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = count_fds()
    bench = Bench()
    yield bench
    os.close(bench.fd)
    bench.loop.close()
    assert count_fds() == before


@pytest.mark.parametrize("error", ERRORS)
def test_fd_whose_callback_fails_is_watched_no_more(bench: Bench, error: type[BaseException]) -> None:
    calls = []

    def fails(events: int) -> None:
        calls.append(events)
        raise error

    bench.guarded.add(bench.fd, fails)
    bench.step()
    assert len(calls) == 1
    assert [record.exc_info is not None for record in bench.log.records] == [True]
    bench.guarded.add(bench.fd, calls.append)
    bench.loop.step()
    assert len(calls) == 2


def test_callback_that_fails_after_it_removed_its_fd(bench: Bench) -> None:
    def fails(_events: int) -> None:
        bench.guarded.remove(bench.fd)
        raise ZeroDivisionError

    bench.guarded.add(bench.fd, fails)
    bench.step()
    assert len(bench.log.records) == 1


@pytest.mark.parametrize("error", ERRORS)
def test_timer_that_fails_is_logged_once(bench: Bench, error: type[BaseException]) -> None:
    calls = []

    def fails() -> None:
        raise error

    for _ in range(3):
        bench.guarded.call_later(1, fails)
    bench.guarded.call_later(2, lambda: calls.append("next"))
    bench.clock.now += 2
    bench.step()
    assert calls == ["next"]
    assert len(bench.log.records) == 1


def test_callback_without_a_name_may_fail_as_well(bench: Bench) -> None:
    bench.guarded.add(bench.fd, partial(divmod, "no number"))
    bench.guarded.call_later(1, partial(divmod, 1, 0))
    bench.clock.now += 1
    bench.step()
    assert len(bench.log.records) == 2


def test_what_works_is_passed_through(bench: Bench) -> None:
    calls: list[object] = []
    bench.guarded.add(bench.fd, calls.append)
    bench.guarded.modify(bench.fd, 0)
    bench.step()
    assert calls == []
    bench.guarded.remove(bench.fd)
    bench.guarded.call_later(1, lambda: calls.append("kept"))
    bench.guarded.call_later(1, lambda: calls.append("cancelled")).cancel()
    bench.clock.now += 1
    bench.step()
    assert calls == ["kept"]
    assert bench.log.records == []


class Stream:
    """A socket pair: ours is the device's."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.calls: list[int] = []

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()

    def ignore(self, _events: int) -> None:
        self.calls.append(-1)

    def read(self, _events: int) -> None:
        self.calls.append(len(self.ours.recv(1)))


@pytest.fixture
def stream() -> Iterator[Stream]:
    stream = Stream()
    yield stream
    stream.close()


PASSES = 2000


def run(bench: Bench) -> None:
    for _ in range(PASSES):
        bench.loop.step()


@pytest.mark.parametrize("how", ["closed", "half-closed"])
def test_handler_that_ignores_the_end_of_its_stream_is_called_no_more(
    bench: Bench, stream: Stream, how: str
) -> None:
    bench.guarded.add(stream.ours.fileno(), stream.ignore)
    if how == "closed":
        stream.theirs.close()
    else:
        stream.theirs.shutdown(socket.SHUT_WR)
    run(bench)
    assert len(stream.calls) < PASSES / 4
    (line,) = bench.log.messages
    assert line.endswith(
        f"Stream.ignore() ignores the end of fd {stream.ours.fileno()}, which it should remove"
    )
    assert list(bench.guard.amiss()) == [line]
    before = len(stream.calls)
    run(bench)
    assert len(stream.calls) == before
    bench.guarded.remove(stream.ours.fileno())
    assert list(bench.guard.amiss()) == []


@contextmanager
def expired_timerfd() -> Iterator[int]:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    libc.timerfd_settime(fd, 0, struct.pack("4q", 0, 0, 0, 1), None)
    wait_until(lambda: bool(select.select([fd], [], [], 0)[0]), "it has expired")
    yield fd
    os.close(fd)


@contextmanager
def raised_eventfd() -> Iterator[int]:
    fd = os.eventfd(0xAB, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("ready_fd", [raised_eventfd, expired_timerfd])
def test_handler_that_does_not_read_its_counter_is_called_no_more(
    bench: Bench, ready_fd: Callable[[], AbstractContextManager[int]]
) -> None:
    with ready_fd() as fd:
        calls: list[int] = []
        bench.guarded.add(fd, calls.append)
        run(bench)
        assert len(calls) < PASSES / 4
        (line,) = bench.log.messages
        assert line.endswith(f"() ignores fd {fd}, which it should read")
        assert list(bench.guard.amiss()) == [line]
        calls.clear()
        run(bench)
        assert calls == []
        bench.guarded.remove(fd)
        assert list(bench.guard.amiss()) == []


def test_a_counter_that_is_read_again_is_a_level_again(bench: Bench) -> None:
    reads: list[int] = []
    is_reading = False

    def handle(_events: int) -> None:
        if is_reading:
            reads.append(os.eventfd_read(bench.fd))

    bench.guarded.add(bench.fd, handle)
    run(bench)
    is_reading = True
    for _ in range(PASSES):
        os.eventfd_write(bench.fd, 1)
        bench.loop.step()
    assert reads == [2] + [1] * (PASSES - 1)
    assert list(bench.guard.amiss()) == []
    is_reading = False
    os.eventfd_write(bench.fd, 1)
    reads.clear()
    bench.loop.step()
    is_reading = True
    bench.loop.step()
    assert reads == [1], "what one call has left is offered to the next"
    bench.guarded.remove(bench.fd)


def test_a_pipe_that_is_opened_again_is_read_again(bench: Bench, tmp_path: Path) -> None:
    """The end of a FIFO is not for ever: then its level counts as before."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    calls: list[bytes] = []
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)

    def read(_events: int) -> None:
        calls.append(os.read(fd, 1))

    bench.guarded.add(fd, read)
    os.close(os.open(fifo, os.O_WRONLY))
    run(bench)
    assert 0 < len(calls) < PASSES / 4
    assert len(bench.log.messages) == 1
    for text in (b"again", b"and again"):
        calls.clear()
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, text)
        run(bench)
        assert b"".join(calls) == text, "one byte a call"
        assert list(bench.guard.amiss()) == []
        os.close(writer)
        run(bench)
        assert len(calls) < PASSES / 4
    bench.guarded.remove(fd)
    os.close(fd)


def test_ends_between_which_something_comes_do_not_add_up(bench: Bench, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    calls: list[bytes] = []
    bench.guarded.add(fd, lambda _: calls.append(os.read(fd, 10)))
    for _ in range(PASSES // 10):
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, b"x")
        bench.loop.step()
        os.close(writer)
        for _ in range(9):
            bench.loop.step()
    assert calls.count(b"x") == PASSES // 10
    assert bench.log.records == []
    bench.guarded.remove(fd)
    os.close(fd)


def test_handler_that_modifies_its_fd_at_the_end_is_noticed_as_well(bench: Bench, stream: Stream) -> None:
    fd = stream.ours.fileno()
    bench.guarded.add(fd, stream.ignore)
    stream.theirs.close()
    run(bench)
    bench.guarded.modify(fd, EPOLLIN)
    stream.calls.clear()
    run(bench)
    assert len(stream.calls) < PASSES / 4


def test_correct_handlers_are_called_as_often_as_they_are_due(bench: Bench, stream: Stream) -> None:
    """A byte at a time of a stream that is full, a writer on one whose peer has ended, an eventfd, datagrams."""
    stream.ours.setblocking(False)
    stream.theirs.setblocking(False)
    bench.guarded.add(stream.ours.fileno(), stream.read)
    total = stream.theirs.send(bytes(PASSES))
    assert total == PASSES
    run(bench)
    assert stream.calls == [1] * PASSES
    bench.guarded.remove(stream.ours.fileno())

    written: list[int] = []
    stream.theirs.shutdown(socket.SHUT_WR)
    bench.guarded.add(
        stream.ours.fileno(), lambda _: written.append(stream.ours.send(b"x")), EPOLLIN | EPOLLOUT
    )
    for _ in range(PASSES):
        bench.loop.step()
        stream.theirs.recv(1)
    assert len(written) == PASSES
    bench.guarded.remove(stream.ours.fileno())

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    received: list[bytes] = []
    bench.guarded.add(ours.fileno(), lambda _: received.append(ours.recv(10)))
    for _ in range(PASSES):
        theirs.send(b"")
        bench.loop.step()
    assert len(received) == PASSES
    bench.guarded.remove(ours.fileno())
    ours.close()
    theirs.close()
    assert bench.log.records == []


def test_handler_of_edges_may_see_the_end_of_its_stream_any_number_of_times(
    bench: Bench, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    calls: list[int] = []
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    bench.guarded.add(fd, calls.append, EPOLLIN | EPOLLET)
    for _ in range(PASSES):
        os.close(os.open(fifo, os.O_WRONLY))
        bench.loop.step()
    assert len(calls) == PASSES
    assert bench.log.records == []
    bench.guarded.remove(fd)
    os.close(fd)


def test_other_fds_are_out_of_reach(bench: Bench) -> None:
    """Those of the daemon are in the same loop."""
    calls: list[int] = []
    bench.loop.add(bench.fd, calls.append)
    with pytest.raises(KeyError):
        bench.guarded.remove(bench.fd)
    with pytest.raises(KeyError):
        bench.guarded.modify(bench.fd, 0)
    bench.loop.step()
    assert len(calls) == 1


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1e9])
def test_time_that_the_loop_cannot_wait_for(bench: Bench, seconds: float) -> None:
    """It would end the daemon, or keep all other timers from being due."""
    with pytest.raises(ValueError, match=r"call_later\(\) takes 0 to 1000000 seconds"):
        bench.guarded.call_later(seconds, lambda: None)
    with pytest.raises(TypeError):
        bench.guarded.call_later(1, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        bench.guarded.add(bench.fd, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        bench.guarded.call_soon_threadsafe(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", ERRORS)
def test_callback_of_another_thread(bench: Bench, error: type[BaseException]) -> None:
    threads: list[int] = []

    def fails() -> None:
        threads.append(threading.get_ident())
        raise error

    thread = threading.Thread(target=bench.guarded.call_soon_threadsafe, args=(fails,))
    thread.start()
    thread.join()
    assert threads == []
    bench.loop.step()
    assert threads == [threading.get_ident()]
    assert len(bench.log.records) == 1


def test_stray_errors_are_lines_of_the_log(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    log_stray_errors(bench.log.logger)

    class Thing:
        def __del__(self) -> None:
            raise GeneratorExit("one\ntwo")

    for _ in range(20):
        Thing()
    assert len(bench.log.records) == 10
    assert "an error that nothing could handle: GeneratorExit: one\\ntwo (" in bench.log.messages[0]


def test_thread_that_fails_is_a_line_of_the_log(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    log_stray_errors(bench.log.logger)
    thread = threading.Thread(target=lambda: 1 // 0, name="poller")
    thread.start()
    thread.join()
    (line,) = bench.log.messages
    assert "poller ended with ZeroDivisionError: " in line
