# SPDX-License-Identifier: GPL-2.0-or-later
"""Ends a process's work at a line of its code, as a SIGKILL could."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

__all__ = ["at_line", "killed_at"]


class _Killed(BaseException):
    """The process is gone."""


def at_line(line: int, sources: Collection[str], action: Callable[[], object]) -> None:
    """Lets this thread do something at so many lines of those source files that it comes to, from now on."""
    left = line

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in sources:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                action()
        return trace

    sys.settrace(trace)


def killed_at(line: int, work: Callable[[], object], sources: Collection[str]) -> bool:
    """Does the work, up to so many lines of those source files; whether there were so many.

    In a thread of its own: an exception that a trace function raises within an except clause leaves the exception
    before it behind in the thread's state.
    """

    def kill() -> None:
        raise _Killed

    def run() -> bool:
        at_line(line, sources, kill)
        try:
            work()
        except _Killed:
            return True
        finally:
            sys.settrace(None)
        return False

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
