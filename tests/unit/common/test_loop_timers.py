# SPDX-License-Identifier: GPL-2.0-or-later
"""The event loop's timers, by a clock that the test moves; its signals; and calls from other threads."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from common.loop import Loop
from tests.support.fds import count_fds
from tests.support.remotebench import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loop(clock: Clock) -> Iterator[Loop]:
    before = count_fds()
    loop = Loop(clock)
    yield loop
    loop.close()
    assert count_fds() == before


@pytest.fixture
def order() -> list[str]:
    return []


def test_timers_are_called_when_due_in_their_order(loop: Loop, clock: Clock, order: list[str]) -> None:
    for seconds in (3, 1, 2):
        loop.call_later(seconds, partial(order.append, str(seconds)))
    loop.step()
    assert order == []
    clock.now += 0.999
    loop.step()
    assert order == []
    clock.now += 0.001
    loop.step()
    assert order == ["1"]
    clock.now += 10
    loop.step()
    loop.step()
    assert order == ["1", "2", "3"]


def test_cancelled_timer(loop: Loop, clock: Clock, order: list[str]) -> None:
    timer = loop.call_later(1, lambda: order.append("cancelled"))
    loop.call_later(2, lambda: order.append("kept"))
    timer.cancel()
    timer.cancel()
    clock.now += 3
    loop.step()
    assert order == ["kept"]
    timer.cancel()


def test_cancelled_timer_ends_no_wait(loop: Loop) -> None:
    """Neither one that is cancelled first nor one before another that is."""
    timers = [loop.call_later(seconds, lambda: None) for seconds in (1, 2, 3)]
    timers[1].cancel()
    assert loop.until_next_timer() == 1
    timers[0].cancel()
    assert loop.until_next_timer() == 3
    timers[2].cancel()
    assert loop.until_next_timer() is None
    assert loop.until_next_timer(5.0) == 5.0


def test_timer_may_cancel_one_that_is_due_as_well(loop: Loop, clock: Clock, order: list[str]) -> None:
    def one() -> None:
        order.append("one")
        two.cancel()

    loop.call_later(1, one)
    two = loop.call_later(2, lambda: order.append("two"))
    clock.now += 3
    loop.step()
    assert order == ["one"]


def test_timer_that_starts_a_timer_cant_hold_the_loop(loop: Loop, clock: Clock, order: list[str]) -> None:
    def again() -> None:
        order.append("tick")
        loop.call_later(0, again)

    again()
    loop.step()
    assert order == ["tick", "tick"]
    loop.step()
    assert order == ["tick"] * 3


def test_cancelled_timers_dont_pile_up(loop: Loop, clock: Clock, order: list[str]) -> None:
    """A client decides how often its session starts and cancels one."""
    kept = [loop.call_later(1, lambda: order.append("kept")) for _ in range(200)]
    for _ in range(10_000):
        loop.call_later(5, lambda: order.append("cancelled")).cancel()
    assert len(loop._timers) < 1000
    clock.now += 10
    loop.step()
    assert order == ["kept"] * len(kept)


def test_waiting_ends_with_the_next_timer() -> None:
    with_real_clock = Loop()
    with_real_clock.call_later(0.001, with_real_clock.stop)
    with_real_clock.call_later(3600, lambda: None)
    with_real_clock.run()
    with_real_clock.close()


def test_signal_is_handled_in_the_loop(loop: Loop, order: list[str]) -> None:
    loop.on_signal(signal.SIGUSR1, lambda: order.append("usr1"))
    loop.on_signal(signal.SIGUSR2, lambda: order.append("usr2"))
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert order == []
    loop.step()
    assert order == ["usr1", "usr2"]
    loop.step()
    assert order == ["usr1", "usr2"]


def test_signal_ends_a_wait(loop: Loop, order: list[str]) -> None:
    loop.on_signal(signal.SIGUSR1, loop.stop)
    main = threading.main_thread().ident
    assert main is not None
    thread = threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGUSR1))
    thread.start()
    loop.run()
    thread.join()


def test_a_signal_that_stops_the_loop_is_seen_at_once(loop: Loop) -> None:
    """By who runs the loop only now and then."""
    loop.stop_on_signal(signal.SIGUSR1)
    assert not loop.is_stopped
    os.kill(os.getpid(), signal.SIGUSR1)
    assert loop.is_stopped
    loop.run()


def test_a_signal_that_stops_the_loop_ends_a_wait(loop: Loop) -> None:
    loop.stop_on_signal(signal.SIGUSR1)
    main = threading.main_thread().ident
    assert main is not None
    thread = threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGUSR1))
    thread.start()
    loop.run()
    thread.join()


def test_signal_isnt_lost_when_the_wakeup_pipe_is_full(loop: Loop, order: list[str]) -> None:
    loop.on_signal(signal.SIGUSR1, lambda: order.append("usr1"))
    for _ in range(70_000):
        loop.call_soon_threadsafe(lambda: None)
    os.kill(os.getpid(), signal.SIGUSR1)
    loop.step()
    assert order == ["usr1"]


def test_signals_are_the_systems_again_after_close() -> None:
    loop = Loop()
    loop.on_signal(signal.SIGUSR1, lambda: None)
    loop.close()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


def test_call_from_another_thread_runs_in_the_loops_own(loop: Loop) -> None:
    threads: list[int] = []

    def called() -> None:
        threads.append(threading.get_ident())
        loop.stop()

    thread = threading.Thread(target=loop.call_soon_threadsafe, args=(called,))
    thread.start()
    loop.run()
    thread.join()
    assert threads == [threading.get_ident()]


def test_calls_from_many_threads_all_arrive_in_each_ones_order(loop: Loop) -> None:
    got: list[tuple[int, int]] = []

    def caller(me: int) -> None:
        for number in range(500):
            loop.call_soon_threadsafe(partial(got.append, (me, number)))

    threads = [threading.Thread(target=caller, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    while len(got) < 2000:
        loop.step(None)
    for thread in threads:
        thread.join()
    for me in range(4):
        assert [number for who, number in got if who == me] == list(range(500))


def test_call_that_calls_again_cant_hold_the_loop(loop: Loop, order: list[str]) -> None:
    def again() -> None:
        order.append("call")
        loop.call_soon_threadsafe(again)

    again()
    loop.step()
    assert order == ["call", "call"]


def test_call_after_close_writes_into_nobodys_fd() -> None:
    loop = Loop()
    loop.close()
    pairs = [socket.socketpair() for _ in range(4)]  # these fds have the numbers that were the loop's
    loop.call_soon_threadsafe(lambda: None)
    socks = list(itertools.chain.from_iterable(pairs))
    for sock in socks:
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
    for sock in socks:
        sock.close()
