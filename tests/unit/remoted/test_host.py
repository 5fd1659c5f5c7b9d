# SPDX-License-Identifier: GPL-2.0-or-later
"""A device's callbacks that fail: logged, and nobody else's concern."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from functools import partial

import pytest

from common.loop import Loop
from remoted.guard import Guard
from remoted.host import GuardedLoop
from remoted.watchdog import Watchdog
from tests.support.fds import count_fds
from tests.support.remotebench import Clock, Recorder

ERRORS = [ZeroDivisionError, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]


class Bench:
    def __init__(self) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.log = Recorder()
        self.guarded = GuardedLoop(self.loop, Guard(self.log.logger, Watchdog()))
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
