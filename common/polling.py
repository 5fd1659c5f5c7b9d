# SPDX-License-Identifier: GPL-2.0-or-later
"""Adaptive polling: looking for the next event for a while before a thread sleeps.

To wake a sleeping thread costs more than most requests do. So the daemons' loop, and a vCPU of proxyd's that waits
for an answer, look for it without a timeout again and again, for a window that follows what came of it, as the
halt polling of KVM does (Documentation/virt/kvm/halt-polling.rst in Linux). The window is closed, half the limit,
or the limit. The rule:

- An event that polling finds opens the window wholly. One that ends a sleep within twice the limit of the wait's
  beginning opens it by a half: a longer window would have found it, once no wake-up delays the peer.
- An event that takes longer closes it by a half. One that takes longer than a millisecond closes it: an idle
  process doesn't poll.
- A poll of the whole limit that found nothing, although the event came soon after it, closes the window for a
  pause. So does a gap between two looks, in which another task had the CPU, whether an event has come meanwhile or
  not: on a busy CPU polling uses up the time that the scheduler would give this process at once when an event
  wakes it. Each pause is twice as long as the one before it, from 0.25 to 100 ms. When polling has found 16 events
  after a pause, the next one is of 0.25 ms again. So a peer that is late now and then causes pauses of a few
  accesses, and a CPU that stays busy long ones.
- An event that is there at the first look says nothing.

All fds of a loop are looked at, as by a sleep. A timer, or a deadline, ends the poll when it is due.
"""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["Events", "Polling"]

_SILENCE_SECONDS = 1e-3
_GAP_SECONDS = 100e-6
"""between two looks, which usually are a microsecond apart; interrupts and kernel workers take less"""
_FIRST_PAUSE_SECONDS = 0.25e-3
_LAST_PAUSE_SECONDS = 0.1
_FORGIVING = 16
"""so many finds between two pauses are worth more than what closed the window has cost"""

Events = list[tuple[int, int]]
"""pairs of fd and mask, as epoll gives them"""


class Polling:
    """The window of one loop, or of one link, and what it has cost."""

    __slots__ = (
        "_clock",
        "_closed_until",
        "_found_before",
        "_limit",
        "_pause",
        "_poll",
        "found",
        "missed",
        "seconds",
        "window",
    )

    def __init__(
        self, poll: Callable[[float | None], Events], clock: Callable[[], float], limit: float
    ) -> None:
        """``poll(seconds)`` waits for events, without a limit if None; ``limit`` is the window's, in seconds."""
        self._poll = poll
        self._clock = clock
        self._limit = limit
        self._pause = _FIRST_PAUSE_SECONDS
        self._closed_until = 0.0
        self._found_before = 0  # the last pause
        self.window = 0.0
        """for how many seconds the next wait polls"""
        self.seconds = 0.0
        """spent polling, whether it found something or not"""
        self.found = 0
        """waits that polling ended"""
        self.missed = 0
        """waits that polling did not end"""

    def wait(self, timeout: float | None) -> Events:
        """The events that are ready within ``timeout`` seconds, or None: however long it takes."""
        poll, clock = self._poll, self._clock
        begin = clock()
        window = self.window
        if not window and begin < self._closed_until:
            return poll(timeout)  # whatever comes of it changes nothing
        if window:
            events = poll(0)
            if events:
                return events
            if timeout is not None and timeout < window:
                window = timeout
            # A peer that shares the CPU answers now, not at the end of the window.
            os.sched_yield()
            now = looked = begin
            end = begin + window
            while not events and looked < end:
                events = poll(0)
                now = clock()
                if now - looked > _GAP_SECONDS:
                    self._close(now)
                    break
                looked = now
            self.seconds += now - begin
            if events:
                self.found += 1
                if self.window:
                    self.window = self._limit
                return events
            self.missed += 1
            if timeout is not None:
                timeout = max(0.0, timeout - (now - begin))
            if not self.window:
                return poll(timeout)
        events = poll(timeout)
        self._slept(begin, bool(events), window)
        return events

    def _slept(self, begin: float, has_events: bool, polled: float) -> None:
        """Adapts the window after a sleep that followed ``polled`` seconds of polling."""
        now = self._clock()
        waited = now - begin
        half = self._limit / 2
        if waited > _SILENCE_SECONDS:
            self.window = 0.0
        elif not has_events or waited > 2 * self._limit:
            self.window = half if self.window > half else 0.0
        elif polled > half:
            self._close(now)
        else:
            self.window = self._limit if self.window else half

    def _close(self, now: float) -> None:
        if self.found - self._found_before >= _FORGIVING:
            self._pause = _FIRST_PAUSE_SECONDS
        self._found_before = self.found
        self.window = 0.0
        self._closed_until = now + self._pause
        self._pause = min(2 * self._pause, _LAST_PAUSE_SECONDS)
