# SPDX-License-Identifier: GPL-2.0-or-later
"""The real event loop, stepped by a test in its own thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from select import EPOLLIN

from common.loop import Loop

DEADLINE = 20.0


class CountingLoop(Loop):
    """Counts the calls of handlers."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.calls = 0
        super().__init__(clock)

    def add(
        self, fd: int, callback: Callable[[int], None], events: int = EPOLLIN, *, in_turn: bool = False
    ) -> None:
        def counted(mask: int) -> None:
            self.calls += 1
            callback(mask)

        super().add(fd, counted, events, in_turn=in_turn)


def run_until(loop: Loop, condition: Callable[[], object]) -> None:
    """Passes until the condition holds; AssertionError if it never does."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        loop.step(0.05)


def run_ready(loop: CountingLoop) -> int:
    """Passes as long as a handler is called, 100 times at most; returns how often one was."""
    before = loop.calls
    for _ in range(100):
        seen = loop.calls
        loop.step(0)
        if loop.calls == seen:
            break
    return loop.calls - before
