# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted, proxyd and a stock QEMU, and the test's own monitor of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.monitorclient import MonitorClient
from tests.support.qmpbench import QmpBench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[QmpBench]:
    """Nothing runs yet."""
    with closing(QmpBench(tmp_path)) as bench:
        yield bench


@pytest.fixture
def monitor(bench: QmpBench) -> MonitorClient:
    """remoted and QEMU run; proxyd doesn't, yet."""
    bench.start_remoted()
    return bench.start_guest()
