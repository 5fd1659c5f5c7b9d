# SPDX-License-Identifier: GPL-2.0-or-later
"""Notices device code that holds up the loop, while it still runs.

The loop's thread says what it is about to do in ``doing`` and clears that afterwards: two stores, no look at a
clock. A thread compares samples of it. While no device code runs it sleeps without a timeout, so that an idle
daemon has no wake-ups. C code that keeps the GIL can't be noticed.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["PATIENCE_SECONDS", "Watchdog", "Work"]

PATIENCE_SECONDS = 2.0
"""device code that runs for longer is reported; proxyd gives up a link after the same time"""
_SAMPLE_SECONDS = 1.0
_HANDLED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""the signals for which the daemon has handlers"""


class Work(Protocol):
    """One device's code, as the watchdog finds it in ``doing``."""

    def stalls(self, doing: Doing, seconds: float) -> None:
        """It has run for so many seconds, and still does. Called in the watchdog's thread."""

    def describe_stall(self, doing: Doing, seconds: float) -> str:
        """Says that it has run for so many seconds, in one line."""

    def has_ended(self, doing: Doing, seconds: float) -> None:
        """What stalled has ended after about so many seconds. Called in the watchdog's thread."""


Doing = tuple[Work, str, int, int, int]
"""whose code it is, what it does, and for an access: BAR, offset, size; a new tuple each time"""


class Watchdog:
    """Watches one thread. Does nothing before start()."""

    def __init__(self, sample_seconds: float = _SAMPLE_SECONDS, patience: float = PATIENCE_SECONDS) -> None:
        self.doing: Doing | None = None
        """what the watched thread runs at present"""
        self.is_parked = False
        """whether unpark() is due after ``doing`` was set"""
        self.while_stalled: Callable[[Doing, float], None] = lambda _doing, _seconds: None
        """called in the watchdog's thread with each sample of what stalls, and for how many seconds it has"""
        self._sample_seconds = sample_seconds
        self._patience = patience
        self._wanted = threading.Event()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread. It takes none of the daemon's signals: they have to interrupt the watched thread's
        system calls."""
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def close(self) -> None:
        """Ends the thread."""
        self._ending.set()
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def unpark(self) -> None:
        """Wakes the thread: to be called when something runs while it is parked."""
        self.is_parked = False
        self._wanted.set()

    def _run(self) -> None:
        while not self._ending.is_set():
            self._wanted.clear()
            self.is_parked = True
            if self.doing is None:  # otherwise its store may have come before the one above
                self._wanted.wait()
            self.is_parked = False
            self._watch()

    def _watch(self) -> None:
        """Samples until nothing runs."""
        seen: Doing | None = None
        since = 0.0
        is_told = False
        while not self._ending.wait(self._sample_seconds):
            doing, now = self.doing, time.monotonic()
            if doing is seen and doing is not None:
                if now - since >= self._patience:
                    if not is_told:
                        is_told = True
                        doing[0].stalls(doing, now - since)
                    self.while_stalled(doing, now - since)
                continue
            if is_told and seen is not None:
                seen[0].has_ended(seen, now - since)
            if doing is None:
                return
            seen, since, is_told = doing, now, False
