# SPDX-License-Identifier: GPL-2.0-or-later
"""A vfio-user client of processes that follow one another, and what it sends them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.fds import no_fd_is_left
from tests.support.keptvfiouser import PAGE, Lives


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    with no_fd_is_left(), closing(Lives(tmp_path)) as lives:
        yield lives


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Lives]:
    """The same for processes that are killed: what these had open stays so in the process of the tests."""
    with closing(Lives(tmp_path)) as lives:
        yield lives


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)
