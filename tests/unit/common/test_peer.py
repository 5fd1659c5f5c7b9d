# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom a log line is about: the pid in what names a peer, whatever its process calls itself."""

from __future__ import annotations

import pytest

from common.peer import parse_pid


@pytest.mark.parametrize(
    ("peer", "pid"),
    [
        ("qemu[12]", 12),
        ("[1][23]", 23),
        ("pid 4194304", 4194304),
        ("pid 7[8]", 8),
        ("", None),
        ("12", None),
        ("12]", None),
        ("qemu[]", None),
        ("qemu[-1]", None),
        ("qemu[1_0]", None),
        ("qemu[\u0661]", None),
        ("qemu[12] ", None),
        ("qemu pid 12", None),
        ("pid ", None),
        ("pid 12]", None),
        ("qemu[12345678901]", None),
    ],
)
def test_the_pid_is_what_the_kernel_has_told(peer: str, pid: int | None) -> None:
    assert parse_pid(peer) == pid
