# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon gives to a device, such that the device's mistakes stay its own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from select import EPOLLIN

from common.loop import EventLoop, Timer
from remoted.memory import GuestMemory

__all__ = ["DEVICE_ERRORS", "Failures", "GuardedLoop", "Host"]

DEVICE_ERRORS = (Exception, SystemExit)
"""what a device's own code may raise at the cost of the device only"""

_MAX_FAILURES = 64
"""how many different failures of one device's code are logged"""


class Failures:
    """Logs errors in a device's own code: with the traceback, once for each thing it was doing."""

    def __init__(self, log: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self._log = log
        self._seen: set[str] = set()

    def report(self, doing: str) -> None:
        """To be called while the exception is handled."""
        if doing not in self._seen and len(self._seen) < _MAX_FAILURES:
            self._seen.add(doing)
            self._log.exception("the device's code failed: %s", doing)


class GuardedLoop:
    """The daemon's loop for a device: an exception of a callback is logged, and ends neither daemon nor loop."""

    def __init__(self, loop: EventLoop, failures: Failures) -> None:
        self._loop = loop
        self._failures = failures

    def add(
        self, fd: int, callback: Callable[[int], None], events: int = EPOLLIN, *, in_turn: bool = False
    ) -> None:
        """As Loop.add(); an fd whose callback fails is watched no more, or it would fail for ever."""

        def guarded(ready: int) -> None:
            try:
                callback(ready)
            except DEVICE_ERRORS:
                self._failures.report(f"handling fd {fd} in {_name(callback)}()")
                with contextlib.suppress(KeyError, OSError):  # it may have gone before it failed
                    self._loop.remove(fd)

        self._loop.add(fd, guarded, events, in_turn=in_turn)

    def modify(self, fd: int, events: int) -> None:
        """As Loop.modify()."""
        self._loop.modify(fd, events)

    def remove(self, fd: int) -> None:
        """As Loop.remove()."""
        self._loop.remove(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """As Loop.call_later()."""

        def guarded() -> None:
            try:
                callback()
            except DEVICE_ERRORS:
                self._failures.report(f"running the timer's {_name(callback)}()")

        return self._loop.call_later(seconds, guarded)


def _name(callback: Callable[..., None]) -> str:
    """A partial() has no name of its own."""
    return getattr(callback, "__qualname__", type(callback).__name__)


@dataclass(frozen=True, slots=True)
class Host:
    """What the daemon gives to a device."""

    name: str
    """the device's id"""
    loop: EventLoop
    log: logging.Logger | logging.LoggerAdapter[logging.Logger]
    memory: GuestMemory
    """the RAM of the guest that is connected, for DMA"""
    set_irq: Callable[[bool], None]
    """drives the function's pirq; devices use set_intx()"""
