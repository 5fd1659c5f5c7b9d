# SPDX-License-Identifier: GPL-2.0-or-later
"""Work on another process that this process may hold up for as long as it likes.

A read of its memory waits for whoever serves the page (userfaultfd(2), a FUSE filesystem), a close of a copy of
one of its files waits for that file's owner. So such work is done in a thread of its own, and left behind there if
it takes too long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from common.errors import IohubError

__all__ = ["run_bounded"]

_T = TypeVar("_T")


def _keep(_result: object) -> None:
    """For results that need no disposal."""


def run_bounded(
    purpose: str, seconds: float, body: Callable[[], _T], discard: Callable[[_T], None] = _keep
) -> _T:
    """Runs ``body`` in a thread of its own. Returns what it returns, and raises what it raises.

    Raises IohubError when it hasn't ended after so many seconds, or no thread can be started; ``purpose`` is what
    for, as in "trace process 5". What a body that was left behind returns later is given to ``discard``, in its
    thread.
    """
    work = _Work(purpose, body, discard)
    try:
        work.start()
    except RuntimeError as error:
        raise IohubError(f"no thread to {purpose}: {error}") from error
    work.join(seconds)
    return work.take(f"can't {purpose}: not done within {seconds:g} s")


class _Work(threading.Thread, Generic[_T]):
    def __init__(self, purpose: str, body: Callable[[], _T], discard: Callable[[_T], None]) -> None:
        super().__init__(name=purpose, daemon=True)
        self._body = body
        self._discard = discard
        self._lock = threading.Lock()
        self._is_left = False
        self._result: list[_T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            result = self._body()
        except BaseException as error:  # noqa: BLE001  take() raises it in the caller's thread
            self._error = error
            return
        with self._lock:
            if not self._is_left:
                self._result.append(result)
                return
        self._discard(result)

    def take(self, late: str) -> _T:
        """What the body returned, for once; raises what it raised, or IohubError with this text."""
        with self._lock:
            self._is_left = True
            if self._error is not None:
                raise self._error
            if not self._result:
                raise IohubError(late)
            return self._result.pop()
