# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted on asyncio's loop or uvloop's: ``python -m tests.bench.otherloop asyncio|uvloop OPTIONS``.

Sessions, hub and devices are the same. Only what a round trip needs of the loop is here; the order of messages and
resamples, which asyncio doesn't have, is left out.
"""

from __future__ import annotations

import asyncio
import importlib
import selectors
import signal
import sys
import time
from collections.abc import Callable
from select import EPOLLIN, EPOLLOUT

from common.loop import Timer
from common.polling import Polling
from remoted import main as remoted

__all__ = ["OtherLoop"]


class OtherLoop:
    """Loop's interface on an event loop of asyncio's kind."""

    def __init__(self, poll_limit: float = 0.0) -> None:
        name = sys.argv[1]
        self._loop: asyncio.AbstractEventLoop = (
            asyncio.SelectorEventLoop(selectors.EpollSelector())
            if name == "asyncio"
            else importlib.import_module(name).new_event_loop()
        )
        self.is_stopped = False
        self.polling = Polling(lambda _timeout: [], time.monotonic, 0.0)
        self.call_soon_threadsafe = self._loop.call_soon_threadsafe
        self.time = time.monotonic

    def add(
        self, fd: int, callback: Callable[[int], None], events: int = EPOLLIN, *, in_turn: bool = False
    ) -> None:
        if events & EPOLLIN:
            self._loop.add_reader(fd, callback, EPOLLIN)
        if events & EPOLLOUT:
            self._loop.add_writer(fd, callback, EPOLLOUT)

    def order(self, fd: int, after: int) -> None:
        pass

    def remove(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self.time() + seconds, callback)
        self._loop.call_later(seconds, lambda: timer.callback and timer.callback())
        return timer

    def stop_on_signal(self, signum: int) -> None:
        signal.signal(signum, lambda *_: self.stop())

    def stop(self) -> None:
        self.is_stopped = True
        self._loop.call_soon_threadsafe(self._loop.stop)

    def run(self) -> None:
        self._loop.run_forever()

    def close(self) -> None:
        self._loop.close()


if __name__ == "__main__":
    vars(remoted)["Loop"] = OtherLoop
    sys.exit(remoted.main(sys.argv[2:]))
