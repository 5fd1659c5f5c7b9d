# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast a count grows."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Rate"]


class Rate:
    """The growth of one count, from one look at it to the next."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock()`` in seconds; the count is 0 now."""
        self._clock = clock
        self._time = clock()
        self._count = 0

    def update(self, count: int) -> float:
        """Takes the present count. Returns its growth per second since the last call; 0 if no time has passed."""
        now = self._clock()
        seconds, growth = now - self._time, count - self._count
        self._time = now
        self._count = count
        return growth / seconds if seconds > 0 else 0.0
