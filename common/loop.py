# SPDX-License-Identifier: GPL-2.0-or-later
"""The event loop of both daemons: one thread, one epoll, timers, signals.

A handler must tolerate spurious calls: within one pass another handler may close its fd, and the number may be
reused before its handler is called.

A pass calls epoll_wait(2) once and handles every event that it reports, so that no edge-triggered event is lost.
There are two exceptions, for fds whose events are reported again:

- The fds that are served ``in_turn`` (links, listening sockets, control connections) get one call each, the
  least recently served first, until 50 microseconds are over, or a microsecond for each that is ready: to find out
  which are takes a part of that. One call handles one request. So clients that send without pause delay interrupts
  by little more than one request, and a request costs the same however many are busy.
- An fd that is ordered after a link (the resamplefd of its function) waits until that link has nothing left to
  read, or until everything that was queued there when the wait began has been read. A message that was received
  before a resample must be handled before the resample: it may lower the line, which would otherwise be asserted
  again. What is queued on one link delays only the fds that are ordered after it.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from select import EPOLLET, EPOLLIN, EPOLLONESHOT
from typing import Protocol

from common.disposal import count_unread
from common.polling import Polling

__all__ = ["EventLoop", "Loop", "Timer"]

Handler = Callable[[int], None]

_COMPACT_TIMERS = 64
"""With so many timers the cancelled ones are removed."""
_TURNS_SECONDS = 50e-6
"""the time that one pass has for fds that are served in turn: a few register accesses, or one longer request"""
_TURN_SECONDS = 1e-6
"""for each that is ready, if that is more: several times what the pass has cost for each before the first turn"""


class EventLoop(Protocol):
    """What a device uses of a loop."""

    def add(self, fd: int, callback: Handler, events: int = EPOLLIN, *, in_turn: bool = False) -> None:
        """See Loop."""

    def modify(self, fd: int, events: int) -> None:
        """See Loop."""

    def remove(self, fd: int) -> None:
        """See Loop."""

    def time(self) -> float:
        """See Loop."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """See Loop."""

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """See Loop."""


class Timer:
    """One pending call of Loop.call_later."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due

    def cancel(self) -> None:
        """Prevents the call; after it, or a second time, does nothing."""
        self.callback = None


class Loop:
    """One epoll with its handlers. All methods but call_soon_threadsafe belong to the thread that runs it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, poll_limit: float = 0.0) -> None:
        """``clock`` returns the time of the timers, in seconds.

        For at most ``poll_limit`` seconds a pass looks for events before it sleeps (common.polling); 0: never.
        """
        self._clock = clock
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self.polling = Polling(self._poll, clock, poll_limit)
        self._wait = self.polling.wait if poll_limit else self._poll
        self._handlers: dict[int, Handler] = {}
        self._turn = 0
        self._turns: dict[int, int] = {}
        """the fds that are served in turn, each with the number of its last turn"""
        self._after: dict[int, int] = {}
        """the fds that were ordered after another, each with that fd"""
        self._owed: dict[int, int] = {}
        """the fds that wait at present, each with the number of calls of the other's handler that are left"""
        self._edges: dict[int, int] = {}
        """the fds that are served in turn and edge-triggered at present, each with its events"""
        self._held: dict[int, Handler] = {}
        """the fds that are held, each with its handler"""
        self._timers: list[Timer] = []
        self._compact_at = _COMPACT_TIMERS
        self._stopped = False
        self._signals: list[int] = []
        self._soon: deque[Callable[[], None]] = deque()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.add(self._wake_r, self._on_wake)

    def add(self, fd: int, callback: Handler, events: int = EPOLLIN, *, in_turn: bool = False) -> None:
        """Calls ``callback(events)`` whenever the fd is ready; EPOLLHUP and EPOLLERR are always reported.

        The callback of an fd that is served ``in_turn`` handles at most one request.
        Raises OSError (EPERM for an fd that can't be polled, EEXIST for one that is registered).
        """
        self._epoll.register(fd, events)
        self._handlers[fd] = callback
        if in_turn:
            self._turns[fd] = 0

    def order(self, fd: int, after: int) -> None:
        """When ``fd`` becomes ready, its handler is called after everything unread in ``after`` has been read.

        ``fd`` is level-triggered. ``after`` is a UNIX stream socket that is served in turn; its callback reads at
        least one byte, or makes the fd edge-triggered until it does. The order ends when either fd is removed.
        """
        self._after[fd] = after

    def hold(self, fd: int) -> None:
        """Handles neither an fd that is served in turn nor those ordered after it until release().

        They are level-triggered and wait for EPOLLIN.
        """
        for each in (fd, *self._ordered_after(fd)):
            self._held[each] = self._handlers[each]
            self._handlers[each] = _ignore
            self._epoll.modify(each, EPOLLONESHOT)  # disabled, but for one report of EPOLLHUP or EPOLLERR

    def release(self, fd: int) -> None:
        """Handles a held fd again, and those ordered after it."""
        for each in (fd, *self._ordered_after(fd)):
            handler = self._held.pop(each, None)
            if handler is not None:
                self._handlers[each] = handler
                self._epoll.modify(each, EPOLLIN)

    def modify(self, fd: int, events: int) -> None:
        """Waits for other events on a registered fd, which isn't held."""
        self._epoll.modify(fd, events)
        if fd in self._turns:
            self._edges.pop(fd, None)
            if events & EPOLLET:
                self._edges[fd] = events

    def remove(self, fd: int) -> None:
        """Stops watching the fd. To be called before its close: a duplicate would keep the epoll entry alive."""
        del self._handlers[fd]
        self._after.pop(fd, None)
        self._owed.pop(fd, None)
        self._edges.pop(fd, None)
        if self._held.pop(fd, None) is not None:
            self.release(fd)
        if self._turns.pop(fd, None) is not None:
            self._after = {other: after for other, after in self._after.items() if after != fd}
        self._epoll.unregister(fd)

    def time(self) -> float:
        """The time of the timers, in seconds."""
        return self._clock()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Calls ``callback()`` once, not before so many seconds have passed."""
        timer = Timer(self._clock() + seconds, callback)
        if len(self._timers) >= self._compact_at:
            # A peer can make its session start and cancel timers at will.
            self._timers = [pending for pending in self._timers if pending.callback is not None]
            heapq.heapify(self._timers)
            self._compact_at = max(_COMPACT_TIMERS, 2 * len(self._timers))
        heapq.heappush(self._timers, timer)
        return timer

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Calls ``callback()`` in the loop's thread, or never once the loop is closed; from any thread."""
        self._soon.append(callback)
        with contextlib.suppress(OSError):  # a full pipe wakes the loop as well; a closed one has no loop
            os.write(self._wake_w, b"\0")

    def on_signal(self, signum: int, callback: Callable[[], None]) -> None:
        """Calls ``callback()`` in the loop after each signal. Only in the main thread.

        Python's own C handler writes into the loop's pipe, which wakes it. What is due is noted apart from
        that byte: the pipe may be full.
        """
        self._signals.append(signum)
        signal.signal(signum, lambda *_: self._soon.append(callback))
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)

    def stop_on_signal(self, signum: int) -> None:
        """Lets run() return after the signal; is_stopped says so at once, also while a pass waits for a peer."""
        self._signals.append(signum)
        signal.signal(signum, lambda *_: self.stop())
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)

    def run(self) -> None:
        """Passes until stop()."""
        step = self.step
        while not self._stopped:
            step(None)

    def fileno(self) -> int:
        """Readable when an fd is ready: for another loop to call step() then, and when a timer is due."""
        return self._epoll.fileno()

    @property
    def is_stopped(self) -> bool:
        """Whether run() would return: for who calls step() instead."""
        return self._stopped

    def stop(self) -> None:
        """Lets run() return after the present pass."""
        self._stopped = True

    def step(self, timeout: float | None = 0) -> None:
        """One pass: waits at most ``timeout`` seconds (None: until something happens), then handles it."""
        if self._timers:
            timeout = self.until_next_timer(timeout)
        events = self._wait(timeout)
        if len(events) == 1 and not self._owed:
            fd, mask = events[0]
            self._handlers[fd](mask)
        elif events or self._owed:
            self._handle_many(events)
        if self._timers:
            self._run_timers()

    def until_next_timer(self, timeout: float | None = None) -> float | None:
        """Seconds until a timer is due, at most ``timeout``; None, without either, for ever."""
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return timeout
        delay = max(0.0, self._timers[0].due - self._clock())
        return delay if timeout is None else min(delay, timeout)

    def close(self) -> None:
        """Releases the loop's own fds; registered ones belong to others."""
        if self._signals:
            signal.set_wakeup_fd(-1)
            for signum in self._signals:
                signal.signal(signum, signal.SIG_DFL)
        self._epoll.close()
        wake_w, self._wake_w = self._wake_w, -1
        os.close(wake_w)
        os.close(self._wake_r)

    def _handle_many(self, events: list[tuple[int, int]]) -> None:
        ready = {fd: mask for fd, mask in events if fd in self._turns}
        owed, self._owed = self._owed, {}
        for fd, mask in events:
            after = self._after.get(fd, -1)
            if after in ready:
                # Each call reads at least one byte; the last one may find the end of the stream.
                calls = owed[fd] if fd in owed else count_unread(after) + 1
                if calls:
                    self._owed[fd] = calls
                    ready.pop(fd, None)
                    continue
            if fd not in ready:
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(mask)
        if ready:
            self._give_turns(ready)

    def _give_turns(self, ready: dict[int, int]) -> None:
        end = self._clock() + max(_TURNS_SECONDS, len(ready) * _TURN_SECONDS)
        waiting_for_turn = sorted(ready, key=lambda fd: self._turns.get(fd, 0))
        for index, fd in enumerate(waiting_for_turn):
            if fd in self._turns:
                self._turn += 1
                self._turns[fd] = self._turn
                for waiting, calls in self._owed.items():
                    if self._after.get(waiting) == fd:
                        self._owed[waiting] = calls - 1
                self._handlers[fd](ready[fd])
                if self._clock() >= end:
                    for other in waiting_for_turn[index + 1 :] if self._edges else ():
                        if other in self._edges:
                            self._epoll.modify(other, self._edges[other])  # reports its edge again
                    break

    def _ordered_after(self, fd: int) -> list[int]:
        return [other for other, after in self._after.items() if after == fd]

    def _run_timers(self) -> None:
        now = self._clock()
        due = []
        while self._timers and self._timers[0].due <= now:
            due.append(heapq.heappop(self._timers))
        for timer in due:
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()

    def _on_wake(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 4096)
        for _ in range(len(self._soon)):
            self._soon.popleft()()


def _ignore(_events: int) -> None:
    """The handler of an fd that is held."""
