# SPDX-License-Identifier: GPL-2.0-or-later
"""Listening sockets on a loop that the test steps, and paths for them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.fds import no_fd_is_left
from tests.support.listenbench import ListenBench


@pytest.fixture
def bench() -> Iterator[ListenBench]:
    with no_fd_is_left(), closing(ListenBench()) as bench:
        yield bench


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "edu0.sock")


@pytest.fixture
def open_path() -> Iterator[str]:
    """In a directory that all users can reach."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield os.path.join(directory, "edu0.sock")
