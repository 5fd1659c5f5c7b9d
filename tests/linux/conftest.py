# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests with Linux guests need."""

from __future__ import annotations

import pytest

from tests.support import linuxguest


@pytest.fixture(scope="session", autouse=True)
def requires_linux_guest() -> None:
    """Skips the tests where no Linux guest was made."""
    if not linuxguest.build():
        pytest.skip("needs a Linux guest: make linux-guest")
