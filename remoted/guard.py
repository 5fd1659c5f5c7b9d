# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs one device's code, so that its errors affect this device only.

Whatever the code raises costs the call, is counted, and is logged: each different error at each place once, with
its traceback, within a rate limit. How long it takes is watched (remoted.watchdog).
"""

from __future__ import annotations

import itertools
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from common.amiss import MAX_TEXTS, Amiss
from common.journal import Log, RateLimited, printable
from common.messages import Event
from remoted.watchdog import Doing, Watchdog

__all__ = [
    "CONFIG_SPACE",
    "DEVICE_ERRORS",
    "Guard",
    "GuardedAmiss",
    "as_int",
    "describe_error",
    "log_stray_errors",
]

DEVICE_ERRORS = (BaseException,)
"""What a device's own code may raise at the cost of the device only: everything. SystemExit, KeyboardInterrupt,
GeneratorExit and asyncio's CancelledError are mistakes there as well; the daemon's signals raise nothing."""

CONFIG_SPACE = -1
"""stands for the number of a BAR"""
_NO_ACCESS = -2

_MAX_FAILURES = 64
"""how many different errors of one device's code are logged"""
_MAX_TEXT = 512
"""characters of an error's text"""


class Guard:
    """The errors and delays of one device's code."""

    def __init__(self, log: Log, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self.errors = 0
        """how often the code has raised"""
        self.last_error = ""
        """its type, text, file and line: one line; empty before the first"""
        self.last_place = ""
        """what the code was doing then, such as ``reading 4 bytes at BAR 0 + 0x8 (STATUS)``"""
        self.stall = ""
        """what last kept the daemon for seconds, and for how long; empty if nothing has since the last reset"""
        self.names: dict[tuple[int, int], str] = {}
        """names of registers, by BAR and offset"""
        self.spinning: dict[int, str] = {}
        """by fd: what is wrong with a handler that is called again and again without effect"""
        self.on_done: Callable[[], None] | None = None
        """called after the code has run, but for a single access"""
        self._log = RateLimited(log)
        self._stall_log = RateLimited(log)  # of the watchdog's thread
        self._seen: set[tuple[str, str, str]] = set()
        self._forgiven = 0

    @property
    def recent_errors(self) -> int:
        """How often the code has raised since the last reset."""
        return self.errors - self._forgiven

    def running(self, doing: str) -> _Running:
        """A context manager that watches and guards what is done in it; ``failed`` tells whether it raised."""
        return _Running(self, doing)

    def watching(self, doing: str) -> _Running:
        """A context manager that only watches: what is raised goes to the caller."""
        return _Running(self, doing, is_guarding=False)

    def access(self, doing: str, bar: int, offset: int, size: int) -> str:
        """``reading 4 bytes at BAR 0 + 0x8 (STATUS)``, with the register's name if it has one."""
        if bar == _NO_ACCESS:
            return doing
        if bar == CONFIG_SPACE:
            return f"{doing} {size} bytes of config space at {offset:#x}"
        name = self.names.get((bar, offset))
        place = f"{doing} {size} bytes at BAR {bar} + {offset:#x}"
        return place if name is None else f"{place} ({name})"

    def report(self, doing: str) -> None:
        """Counts and logs an error. To be called while the exception is handled."""
        error = sys.exc_info()[1]
        kind, text, place = describe_error(error)
        self.errors += 1
        self.last_error, self.last_place = f"{kind}: {text} ({place})", doing
        key = doing, kind, place
        if key not in self._seen and len(self._seen) < _MAX_FAILURES:
            if self._log.exception("the device's code failed: %s", doing, event=Event.DEVICE_FAILED):
                self._seen.add(key)
            if len(self._seen) == _MAX_FAILURES:
                self._log.warning(
                    "%d different errors: no more are logged, only counted",
                    _MAX_FAILURES,
                    event=Event.DEVICE_FAILED,
                )
        if error is not None:
            error.__traceback__ = None  # a device that raises one object again and again makes it ever longer

    def spins(self, fd: int, text: str) -> None:
        """Logs what is wrong with an fd's handler; amiss() tells it until ``spinning`` loses it."""
        self.spinning[fd] = text
        self._log.warning("%s", text, event=Event.DEVICE_SPINS)

    def forgive(self) -> None:
        """Clears what amiss() reports: the function is being reset."""
        self._forgiven = self.errors
        self.stall = ""

    def amiss(self) -> Iterator[str]:
        """What has gone wrong since the last reset, for `iohubctl status`."""
        if self.recent_errors:
            count = f"{self.recent_errors} errors" if self.recent_errors > 1 else "an error"
            yield f"{count} in the device's code, the last at: {self.last_place}: {self.last_error}"
        if self.stall:
            yield self.stall
        yield from list(self.spinning.values())

    def stalls(self, doing: Doing, seconds: float) -> None:
        """See Work."""
        self.stall = self.describe_stall(doing, seconds)
        self._stall_log.warning("%s", self.stall, event=Event.DEVICE_HANGS)

    def describe_stall(self, doing: Doing, seconds: float) -> str:
        """See Work."""
        return f"the device's code has not returned for {seconds:.0f} s: {self.access(*doing[1:])}"

    def has_ended(self, doing: Doing, seconds: float) -> None:
        """See Work."""
        self.stall = f"the device's code took {seconds:.0f} s: {self.access(*doing[1:])}"
        self._stall_log.warning("%s", self.stall, event=Event.DEVICE_RETURNED)


class GuardedAmiss(Amiss):
    """What is amiss with a device, some of it told by the device's own code."""

    __slots__ = ("_guard",)

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard
        super().add(guard.amiss)

    def add(self, source: Callable[[], Iterable[str]]) -> None:
        """As Amiss.add(); the texts of one call end where the source fails, or gives anything but a str."""

        def guarded() -> list[str]:
            texts: list[str] = []
            with self._guard.running("telling what is amiss"):
                for text in itertools.islice(source(), MAX_TEXTS):
                    texts.append(str.__str__(text))  # noqa: PERF401  those before an error count
            return texts

        super().add(guarded)


class _Running:
    """See Guard.running(). What is done within another such block belongs to the outer one again afterwards."""

    __slots__ = ("_doing", "_guard", "_is_guarding", "_outer", "failed")

    def __init__(self, guard: Guard, doing: str, *, is_guarding: bool = True) -> None:
        self.failed = False
        self._is_guarding = is_guarding
        self._guard = guard
        self._doing = doing
        self._outer: Doing | None = None

    def __enter__(self) -> Self:
        watchdog = self._guard.watchdog
        self._outer = watchdog.doing
        watchdog.doing = (self._guard, self._doing, _NO_ACCESS, 0, 0)
        if watchdog.is_parked:
            watchdog.unpark()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: TracebackType | None) -> bool:
        if error is not None and self._is_guarding:
            self.failed = True
            self._guard.report(self._doing)
        self._guard.watchdog.doing = self._outer
        if self._outer is None and self._guard.on_done is not None:
            self._guard.on_done()
        return self._is_guarding


def as_int(value: Any) -> int:
    """What a device returned as an int. Raises TypeError for anything else."""
    return operator.index(value)


def describe_error(error: BaseException | None) -> tuple[str, str, str]:
    """Type, text and place, ``parts.py:12``, of an error, each fit for one line."""
    place = "unknown place"
    traceback = error.__traceback__ if error is not None else None
    while traceback is not None:
        place = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    try:
        text = str(error)
    except DEVICE_ERRORS:
        text = "no text"
    return printable(type(error).__name__), printable(text[:_MAX_TEXT]), printable(place)


def log_stray_errors(log: Log) -> None:
    """Logs, within a rate limit, what is raised where no caller can handle it: in __del__() and in threads.

    Python would write it to stderr, as often as it happens.
    """
    limited = RateLimited(log)

    def on_unraisable(stray: sys.UnraisableHookArgs) -> None:
        limited.warning(
            "an error that nothing could handle: %s: %s (%s)",
            *describe_error(stray.exc_value),
            event=Event.STRAY_ERROR,
        )

    def on_thread_error(stray: threading.ExceptHookArgs) -> None:
        name = printable(stray.thread.name) if stray.thread is not None else "a thread"
        limited.warning(
            "%s ended with %s: %s (%s)", name, *describe_error(stray.exc_value), event=Event.STRAY_ERROR
        )

    sys.unraisablehook = on_unraisable
    threading.excepthook = on_thread_error
