# SPDX-License-Identifier: GPL-2.0-or-later
"""An nvme device, and the driver of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.loop import Loop
from tests.support.nvmedriver import Driver, driver


@pytest.fixture
def nvme(loop: Loop) -> Iterator[Driver]:
    with driver(loop, drive="memory:1M", serial="S123") as made:
        made.enable()
        yield made
