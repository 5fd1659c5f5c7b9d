# SPDX-License-Identifier: GPL-2.0-or-later
"""The texts that describe a far end."""

from __future__ import annotations

import pytest

from common.errors import UsageError
from tests.support.chardevbench import Device
from tests.support.fds import count_fds


def test_null(device: Device) -> None:
    device.open("null")
    device.write(b"x" * 100)
    assert device.chardev.connected


@pytest.mark.parametrize(
    "spec",
    [
        *("", "nul", "null:x", "pty:x", "file", "file:", "unix:", "tcp:1", "file:/nonexistent/x"),
        *("file:a\0b", "unix:/nonexistent/x", "unix:a\0b", "unix:" + "x" * 200, "file:/", "unix:/"),
    ],
)
def test_bad_specs(device: Device, spec: str) -> None:
    """One line that begins with the option."""
    before = count_fds()
    with pytest.raises(UsageError) as caught:
        device.open(spec)
    assert str(caught.value).startswith(f"chardev={spec}:")
    assert "\n" not in str(caught.value)
    assert count_fds() == before
