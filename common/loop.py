# SPDX-License-Identifier: GPL-2.0-or-later
"""The event loop of both daemons: one thread, one epoll, timers, signals.

Handlers are level-triggered and must take a spurious call: within one pass a handler may close another's fd
and the number may be reused before its turn.

What is registered with ``first`` (the links) goes before everything else (the resamplefds): a message that
was received before a resample must be seen before the resample is judged, or an acknowledged line would be
asserted again. As long as a pass finds links readable it asks the kernel again, within bounds, before it
turns to the rest.
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
from select import EPOLLIN
from typing import Protocol

__all__ = ["EventLoop", "Loop", "Timer"]

Handler = Callable[[int], None]

_COMPACT_TIMERS = 64
"""the number of timers from which on cancelled ones are weeded out"""
_SETTLE_ROUNDS = 64
"""How often one pass goes back to links that stay readable, so that a flood on one can't starve the rest."""


class EventLoop(Protocol):
    """What a device uses of a loop."""

    def add(self, fd: int, callback: Handler, events: int = EPOLLIN, *, first: bool = False) -> None:
        """See Loop."""

    def modify(self, fd: int, events: int) -> None:
        """See Loop."""

    def remove(self, fd: int) -> None:
        """See Loop."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
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

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` tells the seconds that timers go by."""
        self._clock = clock
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self._handlers: dict[int, Handler] = {}
        self._first: dict[int, Handler] = {}
        self._timers: list[Timer] = []
        self._compact_at = _COMPACT_TIMERS
        self._stopped = False
        self._signals: list[int] = []
        self._soon: deque[Callable[[], None]] = deque()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.add(self._wake_r, self._on_wake)

    def add(self, fd: int, callback: Handler, events: int = EPOLLIN, *, first: bool = False) -> None:
        """Calls ``callback(events)`` whenever the fd is ready; EPOLLHUP and EPOLLERR are always reported.

        Raises OSError (EPERM for an fd that can't be polled, EEXIST for one that is registered).
        """
        self._epoll.register(fd, events)
        self._handlers[fd] = callback
        if first:
            self._first[fd] = callback

    def modify(self, fd: int, events: int) -> None:
        """Waits for other events on a registered fd."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forgets the fd, which must happen before its close: a dup would keep the epoll entry alive."""
        del self._handlers[fd]
        self._first.pop(fd, None)
        self._epoll.unregister(fd)

    def time(self) -> float:
        """The seconds that timers go by."""
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
        events = self._poll(timeout)
        if len(events) == 1:
            fd, mask = events[0]
            self._handlers[fd](mask)
        elif events:
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
        first = self._first
        rest = [event for event in events if event[0] not in first]
        for _ in range(_SETTLE_ROUNDS):
            links = [event for event in events if event[0] in first]
            if not links:
                break
            for fd, mask in links:
                handler = first.get(fd)
                if handler is not None:
                    handler(mask)
            events = self._poll(0)
        for fd, mask in rest:
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(mask)

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
