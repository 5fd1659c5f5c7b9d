# SPDX-License-Identifier: GPL-2.0-or-later
"""How many lines of the log nobody has taken: journald, or the reader of stderr, has stalled, gone or no room."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["LOST", "LostLines"]

_AMISS_SECONDS = 3600.0
"""for how long a loss is amiss: long enough for whoever looks now and then"""


class LostLines:
    """A count of lines. Any thread may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._count = 0
        self._last = 0.0

    def add(self, lines: int) -> None:
        """So many more are lost."""
        with self._lock:
            self._count += lines
            self._last = self._clock()

    def amiss(self) -> Iterator[str]:
        """A source for common.amiss: tells of losses for an hour after the last one."""
        age = self._clock() - self._last
        if self._count and age < _AMISS_SECONDS:
            lines = "a line" if self._count == 1 else f"{self._count} lines"
            yield f"{lines} of the log could not be written since the start, the last {age:.0f} s ago"


LOST = LostLines()
"""those of this process"""
