# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for another process that gives no fd to wait on. The only place in the tests that may sleep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

__all__ = ["until", "wait_until"]

_FIRST_SECONDS = 0.001
_LAST_SECONDS = 0.1


def wait_until(predicate: Callable[[], object], what: str, timeout: float = 20.0) -> None:
    """Returns as soon as the predicate is true. After ``timeout`` seconds AssertionError."""
    deadline = time.monotonic() + timeout
    pause = _FIRST_SECONDS
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(pause)
        pause = min(2 * pause, _LAST_SECONDS)


async def until(predicate: Callable[[], object], what: str, timeout: float = 20.0) -> None:
    """The same for a predicate that other tasks of this loop make true."""
    try:
        async with asyncio.timeout(timeout):
            while not predicate():
                await asyncio.sleep(_FIRST_SECONDS)
    except TimeoutError:
        raise AssertionError(f"not within {timeout:g} s: {what}") from None
