# SPDX-License-Identifier: GPL-2.0-or-later
"""The growth of a count, per second."""

from __future__ import annotations

from common.rate import Rate


def test_growth_is_that_since_the_last_look() -> None:
    now = [10.0]
    rate = Rate(lambda: now[0])
    now[0] = 12.0
    assert rate.update(100) == 50.0
    assert rate.update(100) == 0.0, "no time has passed"
    now[0] = 16.0
    assert rate.update(108) == 2.0
