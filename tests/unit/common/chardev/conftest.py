# SPDX-License-Identifier: GPL-2.0-or-later
"""A device whose chardev is to be opened, and who uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chardevbench import Device, PtyUser, UnixUser
from tests.support.steploop import CountingLoop


@pytest.fixture
def device(counting_loop: CountingLoop) -> Iterator[Device]:
    device = Device(counting_loop)
    yield device
    device.chardev.close()


@pytest.fixture
def pty_user(device: Device, caplog: pytest.LogCaptureFixture) -> PtyUser:
    return PtyUser(device, caplog)


@pytest.fixture
def unix_user(device: Device, tmp_path: Path) -> UnixUser:
    return UnixUser(device, tmp_path / "line")
