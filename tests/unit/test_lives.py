# SPDX-License-Identifier: GPL-2.0-or-later
"""The helper that lives random lives: it finds what fails, and tells the steps that matter."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from tests.support.lives import check_lives

STEPS = "abcdefgh"


def draw(random: Random) -> str:
    return "".join(random.choices(STEPS, k=100))


def has_b_after_a(life: Sequence[str]) -> None:
    text = "".join(life)
    assert "b" not in text.partition("a")[2]


def test_a_failing_life_is_cut_down_to_the_steps_that_matter() -> None:
    with pytest.raises(AssertionError) as caught:
        check_lives(10, draw, has_b_after_a, str.upper)
    assert caught.value.__notes__ == ["life 0, in 2 steps: A; B"]


def test_every_life_is_lived_and_the_same_in_each_run() -> None:
    lived: list[Sequence[str]] = []
    for _ in range(2):
        check_lives(10, draw, lived.append, str)
    assert lived[:10] == lived[10:]
    assert len(set(lived)) == 10


def test_a_failure_that_comes_only_once_is_told_with_all_its_steps() -> None:
    lived: list[Sequence[str]] = []

    def live(life: Sequence[str]) -> None:
        lived.append(life)
        if len(lived) == 3:
            raise ValueError("once")

    with pytest.raises(ValueError, match="once") as caught:
        check_lives(10, draw, live, str)
    assert caught.value.__notes__ == [f"life 2, in 100 steps: {'; '.join(lived[2])}"]
