# SPDX-License-Identifier: GPL-2.0-or-later
"""How long the loop polls: the rule on a clock of the test's own, and the loop's use of it on real fds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from common.loop import Loop
from common.polling import Polling

US = 1e-6
LIMIT = 50 * US
SOON = 30 * US
"""within the limit"""
NEARLY = 90 * US
"""within twice the limit"""
LATE = 300 * US
EVENTS = [(3, 1)]


class Kernel:
    """An epoll that has an event at a time that the test says. A look takes half a microsecond."""

    def __init__(self) -> None:
        self.now = 100.0
        self.due: float | None = None
        self.looks = 0
        self.readings = 0
        """of the clock"""
        self.slept = 0.0
        """in all"""
        self.gap = 0.0
        """how much later another task gives the CPU back, once, at the next look"""

    def clock(self) -> float:
        self.readings += 1
        return self.now

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        if timeout == 0:
            self.looks += 1
            self.now += 0.5 * US + self.gap
            self.gap = 0.0
        else:
            assert self.due is not None or timeout is not None, "it would sleep for ever"
            end = self.now + timeout if timeout is not None else self.due
            until = min(time for time in (end, self.due) if time is not None)
            self.slept += max(0.0, until - self.now)
            self.now = max(self.now, until)
        return EVENTS if self.due is not None and self.now >= self.due else []


class Bench:
    def __init__(self, limit: float = LIMIT) -> None:
        self.kernel = Kernel()
        self.polling = Polling(self.kernel.poll, self.kernel.clock, limit)

    def wait(self, *delays: float, timeout: float | None = None, gap: float = 0.0) -> None:
        """Waits for one event after another, each so long after the one before; the clock stands in between."""
        for delay in delays:
            self.kernel.due = self.kernel.now + delay
            self.kernel.gap = gap
            events = self.polling.wait(timeout)
            assert events == (EVENTS if timeout is None or delay <= timeout else [])

    @property
    def window(self) -> float:
        """In microseconds."""
        return round(self.polling.window * 1e6, 3)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def open_bench(bench: Bench) -> Bench:
    """Its window is at the limit."""
    bench.wait(*[SOON] * 10)
    assert bench.window == 50
    bench.kernel.slept = 0.0
    return bench


def test_the_window_grows_with_events_that_come_soon(bench: Bench) -> None:
    windows = []
    for _ in range(4):
        bench.wait(SOON)
        windows.append(bench.window)
    assert windows == [25, 50, 50, 50]
    assert bench.polling.found == 2, "polling ended the last two waits"
    assert bench.polling.missed == 1
    assert bench.kernel.slept == pytest.approx(SOON + SOON - 25 * US, abs=3 * US)


def test_an_open_window_takes_the_place_of_a_sleep(open_bench: Bench) -> None:
    open_bench.wait(*[SOON] * 100)
    assert open_bench.kernel.slept == 0
    assert open_bench.window == 50


def test_the_window_shrinks_with_events_that_come_late(open_bench: Bench) -> None:
    windows = []
    for _ in range(4):
        open_bench.wait(LATE)
        windows.append(open_bench.window)
    assert windows == [25, 0, 0, 0]


def test_a_closed_window_costs_nothing(bench: Bench) -> None:
    bench.wait(*[LATE] * 10)
    assert bench.kernel.looks == 0
    assert bench.polling.seconds == 0


def test_a_short_silence_closes_the_window(open_bench: Bench) -> None:
    open_bench.wait(1100 * US)
    assert open_bench.window == 0


def test_events_that_come_right_after_the_poll_close_the_window_for_longer_and_longer(bench: Bench) -> None:
    """Each such wait would pay for a poll and a sleep. What polling found earlier counts once."""
    bench.wait(*[SOON] * 200)
    begin, spent, found = bench.kernel.now, bench.polling.seconds, bench.polling.found
    bench.wait(*[NEARLY] * 20_000)
    assert bench.kernel.now - begin == pytest.approx(20_000 * NEARLY, rel=0.01)
    assert bench.polling.found == found
    assert bench.polling.seconds - spent < 0.002 * (bench.kernel.now - begin)


@pytest.mark.parametrize(("finds", "pause"), [(20, 0.00025), (12, 0.1)])
def test_a_pause_is_short_again_only_after_many_finds(bench: Bench, finds: int, pause: float) -> None:
    bench.wait(*[NEARLY] * 20_000)
    while not bench.window:
        bench.wait(SOON)
    bench.wait(*[SOON] * finds)
    assert bench.window == 50
    bench.wait(NEARLY)
    begin = bench.kernel.now
    while not bench.window:
        bench.wait(SOON)
    # The wait that opens it has begun after the pause.
    assert pause < bench.kernel.now - begin <= pause + 2 * SOON


def test_a_wait_within_a_pause_reads_the_clock_once(open_bench: Bench) -> None:
    """Most waits are such while two processes share a CPU."""
    open_bench.wait(LATE, gap=110 * US)
    assert open_bench.window == 0
    before = open_bench.kernel.readings
    open_bench.wait(SOON)
    assert open_bench.kernel.readings == before + 1


def wait_with_gap(bench: Bench, delay: float, gap: float, window: float = LIMIT) -> int:
    """Waits with an open window, and loses the CPU at the third look; how many looks there were."""
    looks = 0

    def poll(timeout: float | None) -> list[tuple[int, int]]:
        nonlocal looks
        looks += timeout == 0
        if looks == 3:
            bench.kernel.gap = gap
        return bench.kernel.poll(timeout)

    bench.polling.window = window
    bench.polling._poll = poll
    bench.kernel.due = bench.kernel.now + delay
    assert bench.polling.wait(None) == EVENTS
    return looks


@pytest.mark.parametrize("delay", [SOON, LATE], ids=["there afterwards", "not there"])
def test_another_task_on_the_cpu_closes_the_window(open_bench: Bench, delay: float) -> None:
    assert wait_with_gap(open_bench, delay, gap=105 * US) == 3
    assert open_bench.window == 0


def test_an_event_soon_after_another_task_opens_nothing() -> None:
    bench = Bench(limit=4 * LIMIT)
    assert wait_with_gap(bench, 130 * US, gap=105 * US, window=2 * LIMIT) == 3
    assert bench.window == 0


def test_an_interrupt_of_the_kernel_is_no_other_task(open_bench: Bench) -> None:
    assert wait_with_gap(open_bench, SOON, gap=95 * US) == 3
    assert open_bench.window == 50


def test_events_that_are_there_already_say_nothing(bench: Bench) -> None:
    bench.wait(SOON)
    before = bench.window
    bench.wait(*[0.0] * 10)
    assert bench.window == before
    assert (bench.polling.found, bench.polling.missed) == (0, 0)


def test_a_timer_is_not_delayed(open_bench: Bench) -> None:
    begin = open_bench.kernel.now
    open_bench.wait(LATE, timeout=20 * US)
    assert open_bench.kernel.now - begin == pytest.approx(20 * US, abs=1.5 * US)


def test_a_timer_after_the_window_is_not_delayed(open_bench: Bench) -> None:
    begin = open_bench.kernel.now
    open_bench.wait(LATE, timeout=80 * US)
    assert open_bench.kernel.now - begin == pytest.approx(80 * US, abs=1.5 * US)


def test_a_poll_that_a_timer_has_cut_short_closes_nothing(open_bench: Bench) -> None:
    """The event comes between its last look and the sleep, which is of no time."""
    open_bench.kernel.due = open_bench.kernel.now + 5.3 * US
    assert open_bench.polling.wait(4.8 * US) == EVENTS
    assert open_bench.polling.missed == 2
    assert open_bench.window == 50


def test_the_cost_is_counted(open_bench: Bench) -> None:
    before, looks = open_bench.polling.seconds, open_bench.kernel.looks
    open_bench.wait(SOON, LATE)
    spent = open_bench.polling.seconds - before
    assert spent == pytest.approx(SOON + LIMIT, abs=2 * US)
    assert spent == pytest.approx((open_bench.kernel.looks - looks) * 0.5 * US, abs=1 * US)


class Ticks:
    """A clock that moves on by a microsecond with each look at it, and lets something happen at one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.fd = -1
        self.at = 0.0

    def __call__(self) -> float:
        self.now += US
        if self.fd != -1 and self.now >= self.at:
            os.eventfd_write(self.fd, 1)
            self.fd = -1
        return self.now

    def write_later(self, fd: int, seconds: float) -> None:
        self.fd, self.at = fd, self.now + seconds


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture(params=[0.0, LIMIT], ids=["off", "on"])
def loop(ticks: Ticks, request: pytest.FixtureRequest) -> Iterator[Loop]:
    loop = Loop(ticks, request.param)
    yield loop
    loop.close()


def test_a_loop_finds_by_polling_what_happens_on_any_fd(loop: Loop, ticks: Ticks) -> None:
    """With polling off it sleeps until its timeout: the clock, which writes the eventfd, stands still then."""
    fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(3)]
    read: list[int] = []

    def reader(fd: int) -> None:
        def ready(_events: int) -> None:
            read.append(fd)
            os.eventfd_read(fd)

        loop.add(fd, ready)

    for fd in fds:
        reader(fd)
    os.eventfd_write(fds[0], 1)
    loop.step(0.1)  # opens the window
    for fd in fds[1:]:
        ticks.write_later(fd, 5 * US)
        loop.step(0.001)
    is_on = loop.polling.window > 0
    assert read == (fds if is_on else fds[:1])
    assert loop.polling.found == (2 if is_on else 0)
    for fd in fds:
        loop.remove(fd)
        os.close(fd)
