# SPDX-License-Identifier: GPL-2.0-or-later
"""Random lives: long sequences of steps, each the same in every run, and of one that fails the steps that matter.

Hypothesis is not used for these. It mixes constants of the loaded modules into what it draws, so that a test by
itself would see other lives than among all others. It may also shrink one for five minutes, while pytest ends a
test after two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

__all__ = ["check_lives"]

_SHORTEN_SECONDS = 15.0

Step = TypeVar("Step")


def check_lives(
    count: int,
    draw: Callable[[Random], Sequence[Step]],
    live: Callable[[Sequence[Step]], None],
    describe: Callable[[Step], str],
) -> None:
    """Draws so many lives and lives each. Raises what ``live`` raised first, with a note of the steps to it."""
    for number in range(count):
        life = draw(Random(number))
        error = _failure(live, life)
        if error is not None:
            steps, error = _shorten(live, life, error)
            error.add_note(f"life {number}, in {len(steps)} steps: {'; '.join(map(describe, steps))}")
            raise error


def _failure(live: Callable[[Sequence[Step]], None], life: Sequence[Step]) -> Exception | None:
    try:
        live(life)
    except Exception as error:  # noqa: BLE001  whatever it is, it is what the test has found
        return error
    return None


def _shorten(
    live: Callable[[Sequence[Step]], None], life: Sequence[Step], error: Exception
) -> tuple[Sequence[Step], Exception]:
    """Leaves out ever smaller parts as long as the rest fails, for some seconds."""
    deadline = time.monotonic() + _SHORTEN_SECONDS
    part = len(life) // 2
    while part and time.monotonic() < deadline:
        # From the end: what follows the failure goes first.
        for start in range(len(life) - part, -1, -part):
            rest = [*life[:start], *life[start + part :]]
            failure = _failure(live, rest) if time.monotonic() < deadline else None
            if failure is not None:
                life, error = rest, failure
        part //= 2
    return life, error
