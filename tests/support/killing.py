# SPDX-License-Identifier: GPL-2.0-or-later
"""Ends a process's work at a line of its code, as a SIGKILL could."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import Any

__all__ = ["killed_at"]


class _Killed(BaseException):
    """The process is gone."""


def killed_at(line: int, work: Callable[[], object], sources: Collection[str]) -> bool:
    """Does the work, up to so many lines of those source files; whether there were so many.

    In a thread of its own: an exception that a trace function raises within an except clause leaves the exception
    before it behind in the thread's state.
    """
    left = line

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in sources:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise _Killed
        return trace

    def run() -> None:
        sys.settrace(trace)
        try:
            with suppress(_Killed):
                work()
        finally:
            sys.settrace(None)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
    return left <= 0
