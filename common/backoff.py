# SPDX-License-Identifier: GPL-2.0-or-later
"""Pauses between attempts, each twice as long as the one before."""

from __future__ import annotations

__all__ = ["FIRST_SECONDS", "Backoff"]

FIRST_SECONDS = 0.02


class Backoff:
    """The pauses of one sequence of attempts."""

    def __init__(self) -> None:
        self._seconds = FIRST_SECONDS

    def reset(self) -> None:
        """Begins anew, after an attempt that has succeeded."""
        self._seconds = FIRST_SECONDS

    def next(self, most: float) -> float:
        """The seconds until the next attempt, ``most`` at most."""
        seconds = min(self._seconds, most)
        self._seconds = min(2 * self._seconds, most)
        return seconds
