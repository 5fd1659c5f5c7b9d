# SPDX-License-Identifier: GPL-2.0-or-later
"""A control server that a first client has called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.controlbench import STATUS, Bench
from tests.support.fds import count_fds, no_fd_is_left
from tests.support.wait import wait_until


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with no_fd_is_left(), closing(Bench(tmp_path)) as bench:
        before = count_fds()
        with bench.connect() as first:  # the first call's answer comes later: see test_loading.py
            first.send(STATUS)
            assert "parameters" in first.reply()

        def has_gone() -> bool:
            bench.loop.step()
            return count_fds() == before

        wait_until(has_gone, "nothing is left of the first client")
        bench.calls.status = 0
        yield bench
