# SPDX-License-Identifier: GPL-2.0-or-later
"""A clock that only moves when a test moves it, with the call_later() of common/loop.py."""

from __future__ import annotations

from collections.abc import Callable

from common.loop import Timer

__all__ = ["FakeClock"]


class FakeClock:
    """Timers in fake time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[Timer] = []

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self.now + seconds, callback)
        self._timers.append(timer)
        return timer

    def advance(self, seconds: float) -> None:
        """Makes the calls that become due within so many seconds, in their order."""
        end = self.now + seconds
        while due := [timer for timer in self._timers if timer.callback and timer.due <= end]:
            timer = min(due)
            self._timers.remove(timer)
            self.now = timer.due
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
        self.now = end

    @property
    def pending(self) -> list[float]:
        """In how many seconds calls are due."""
        return sorted(timer.due - self.now for timer in self._timers if timer.callback)
