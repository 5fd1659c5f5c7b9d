# SPDX-License-Identifier: GPL-2.0-or-later
"""Work that another process may hold up."""

from __future__ import annotations

import threading

import pytest

from common.errors import IohubError, PeerGone
from proxyd.vm.bounded import run_bounded


def test_gives_what_the_work_gives() -> None:
    assert run_bounded("add", 20.0, lambda: 2 + 3) == 5


def test_raises_what_the_work_raises() -> None:
    def fail() -> None:
        raise PeerGone("gone")

    with pytest.raises(PeerGone, match=r"^gone$"):
        run_bounded("fail", 20.0, fail)


def test_leaves_behind_what_takes_too_long_and_discards_what_comes_of_it() -> None:
    may_end, discarded = threading.Event(), threading.Event()
    results: list[int] = []

    def work() -> int:
        assert may_end.wait(20.0)
        return 5

    def discard(result: int) -> None:
        results.append(result)
        discarded.set()

    with pytest.raises(IohubError, match=r"^can't add: not done within 0\.01 s$"):
        run_bounded("add", 0.01, work, discard)
    assert results == []
    may_end.set()
    assert discarded.wait(20.0)
    assert results == [5]
