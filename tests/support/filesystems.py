# SPDX-License-Identifier: GPL-2.0-or-later
"""Filesystems that tests mount."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["small_filesystem"]

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


@contextmanager
def small_filesystem(directory: Path, size: int) -> Iterator[Path]:
    """A tmpfs of so many bytes, mounted at a new directory. Skips the test where none can be mounted."""
    directory.mkdir()
    if _libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, f"size={size}".encode()):
        pytest.skip(f"needs to mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    try:
        yield directory
    finally:
        _libc.umount2(os.fsencode(directory), _MNT_DETACH)
