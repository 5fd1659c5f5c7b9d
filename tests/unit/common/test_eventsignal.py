# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals to an eventfd that a peer shares: each arrives, and none waits for the peer."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from common.notifier import EventNotifier
from tests.support.checkout import ROOT
from tests.support.unsendable import returns_soon

FULL = (1 << 64) - 2
LIMITED = """
import resource
from common import eventsignal
from common.errors import UsageError
with open("/proc/self/statm") as statm:
    size = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    eventsignal.prepare()
except UsageError as error:
    print(error)
"""


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_each_signal_adds_one(eventfd: int) -> None:
    """More than the kernel keeps results for."""
    event = EventNotifier(eventfd)
    for _ in range(10_000):
        event.set()
    assert os.eventfd_read(eventfd) == 10_000


def test_signals_of_several_threads_all_arrive(eventfd: int) -> None:
    def send() -> None:
        event = EventNotifier(eventfd)
        for _ in range(5_000):
            event.set()

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.eventfd_read(eventfd) == 20_000


def test_a_counter_at_its_maximum_stays_there(eventfd: int) -> None:
    event = EventNotifier(eventfd)
    os.eventfd_write(eventfd, FULL)
    event.set()
    event.set()
    assert os.eventfd_read(eventfd) == FULL + 1
    event.set()
    assert os.eventfd_read(eventfd) == 1


@contextmanager
def filled_all_the_time(eventfd: int) -> Iterator[None]:
    """By another process, which makes the eventfd blocking and is at the last free places of its counter."""
    os.set_blocking(eventfd, True)
    pid = os.fork()
    if not pid:
        while True:
            with contextlib.suppress(BlockingIOError):
                os.preadv(eventfd, [bytearray(8)], -1, os.RWF_NOWAIT)
            os.eventfd_write(eventfd, FULL - 20)
            for _ in range(40):
                os.eventfd_write(eventfd, 1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.set_blocking(eventfd, False)


def test_a_peer_that_fills_the_counter_at_that_very_moment_holds_nobody(eventfd: int) -> None:
    event = EventNotifier(eventfd)

    def send() -> None:
        for _ in range(1000):
            for _ in range(40):
                event.set()
            with contextlib.suppress(BlockingIOError):
                os.preadv(eventfd, [bytearray(8)], -1, os.RWF_NOWAIT)

    with filled_all_the_time(eventfd):
        assert returns_soon(send)


def test_disarmed_signal_touches_no_file(eventfd: int) -> None:
    event = EventNotifier(eventfd)
    assert event.release() == eventfd
    with pytest.raises(OSError, match="io_submit") as error:
        event.set()
    assert error.value.errno == errno.EBADF
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)


def test_a_process_that_can_have_no_context_is_told_so() -> None:
    command = [sys.executable, "-c", LIMITED]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == (
        "no asynchronous I/O, which signals interrupts (io_setup: Cannot allocate memory; see aio-max-nr)\n"
    )
