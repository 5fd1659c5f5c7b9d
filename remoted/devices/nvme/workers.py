# SPDX-License-Identifier: GPL-2.0-or-later
"""Threads for what may wait for a disk or for the server of a filesystem."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

__all__ = ["Workers"]

Job = Callable[[], Any]
Done = Callable[[Any, Exception | None], None]

_MAX_THREADS = 4


class Workers:
    """A pool that begins without threads, and gets one more whenever all of them are busy."""

    def __init__(self, call_soon_threadsafe: Callable[[Callable[[], None]], None]) -> None:
        self._call_soon = call_soon_threadsafe
        self._jobs: SimpleQueue[tuple[Job, Done] | None] = SimpleQueue()
        self._results: deque[tuple[Done, Any, Exception | None]] = deque()
        self._lock = threading.Lock()
        self._alive = 0
        """threads; those that have ended are counted out under the lock"""
        self._then: Callable[[], None] | None = None
        self._busy = 0
        """jobs that were handed over and whose result has not been delivered"""

    @property
    def is_idle(self) -> bool:
        """Whether every job's result has been delivered."""
        return not self._busy

    def submit(self, job: Job, done: Done) -> None:
        """Calls ``job()`` in a thread, and then ``done(result, error)`` in the loop; one of the two is None.

        Raises RuntimeError if no thread can be started.
        """
        if self._busy >= self._alive < _MAX_THREADS:
            try:
                # Daemon threads, so that the process can end while one waits for a disk.
                threading.Thread(target=self._run, name="nvme", daemon=True).start()
                self._alive += 1
            except RuntimeError:
                if not self._alive:
                    raise
        self._busy += 1
        self._jobs.put((job, done))

    def close(self, then: Callable[[], None]) -> None:
        """Ends the threads, each after its present job, and calls ``then()`` after the last, in any thread.

        What has not begun is not done, and no further result is delivered.
        """
        with self._lock:
            self._then = then
            alive = self._alive
        if not alive:
            then()
        for _ in range(alive):
            self._jobs.put(None)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None and self._then is None:
            job, done = item
            result, problem = None, None
            try:
                result = job()
            except Exception as error:  # noqa: BLE001  the loop decides what it means
                problem = error
            with self._lock:
                self._results.append((done, result, problem))
                is_first = len(self._results) == 1
            if is_first:
                self._call_soon(self._deliver)
        with self._lock:
            self._alive -= 1
            then = self._then if not self._alive else None
        if then is not None:
            then()

    def _deliver(self) -> None:
        if self._then is not None:
            return
        with self._lock:
            results = list(self._results)
            self._results.clear()
        self._busy -= len(results)
        for done, result, error in results:
            done(result, error)
