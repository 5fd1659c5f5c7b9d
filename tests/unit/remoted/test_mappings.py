# SPDX-License-Identifier: GPL-2.0-or-later
"""What stays mapped of the guest's RAM: which parts, how many, and for how long."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from remoted.mappings import Mappings
from remoted.memory import GuestMemory
from tests.support.mappings import dumped_mappings

NAME = "mapped-ram"
PAGE = 4096
PART = 2 << 20
"""bytes of one mapping"""
SIZE = 40 * PART


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    yield fd
    os.close(fd)


@pytest.fixture
def memory(ram: int) -> Iterator[GuestMemory]:
    memory = GuestMemory()
    memory.map(0, SIZE, 0, os.dup(ram))
    yield memory
    for fd in memory.clear():
        os.close(fd)


def mapped() -> int:
    """How many mappings of the file there are; none is in a core dump."""
    dumped = dumped_mappings(NAME)
    assert not any(dumped)
    return len(dumped)


def test_a_part_that_was_accessed_stays_mapped_until_its_region_goes(memory: GuestMemory, ram: int) -> None:
    memory.write(10, b"one")
    memory.write(PART - 3, b"two")
    with memory.view(PAGE, 4) as view:
        view[:] = b"view"
    assert mapped() == 1
    assert [os.pread(ram, 4, offset) for offset in (10, PART - 4, PAGE)] == [b"one\0", b"\0two", b"view"]
    for fd in memory.unmap(0, SIZE):
        os.close(fd)
    assert mapped() == 0


def test_nothing_is_mapped_after_the_client(memory: GuestMemory) -> None:
    for part in range(4):
        memory.write(part * PART, b"x")
    assert mapped() == 4
    for fd in memory.clear():
        os.close(fd)
    assert mapped() == 0


def test_the_part_that_was_used_longest_ago_makes_room(memory: GuestMemory, ram: int) -> None:
    memory.write(0, b"x")
    with memory.view(0, 1) as view:
        address = view.obj
        for part in range(1, 30):
            memory.write(part * PART, bytes((part,)))
            memory.write(0, b"x")
            assert mapped() <= 17, "16, and the one of the view"
        with memory.view(0, 1) as again:
            assert again.obj is address, "it was in use all the time"
    assert mapped() == 16
    assert [os.pread(ram, 1, part * PART)[0] for part in range(1, 30)] == list(range(1, 30))


def test_an_access_across_parts_is_mapped_for_itself(memory: GuestMemory, ram: int) -> None:
    with memory.view(PART - 2, 4) as view:
        view[:] = b"abcd"
    memory.write(3 * PART - 2, b"efgh")
    assert os.pread(ram, 4, PART - 2) + os.pread(ram, 4, 3 * PART - 2) == b"abcdefgh"
    memory.write(5 * PART - 1, bytes(2 * PART))
    assert mapped() == 0


def test_a_view_that_is_kept_outlives_its_region(memory: GuestMemory) -> None:
    view = memory.view(0, 4)
    for fd in memory.unmap(0, SIZE):
        os.close(fd)
    assert mapped() == 1
    assert bytes(view) == bytes(4)
    view.release()
    assert mapped() == 0


def test_regions_of_one_part(ram: int) -> None:
    """A short one first: what is mapped for it does not reach the next one."""
    memory = GuestMemory()
    memory.map(0, PAGE, 0, os.dup(ram))
    for fd in memory.map(PART, PART - PAGE, PAGE, os.dup(ram)):
        os.close(fd)
    memory.write(0, b"x")
    memory.write(PART, b"y")
    memory.write(2 * PART - 2 * PAGE, b"z")
    assert mapped() == 1
    assert [os.pread(ram, 1, offset) for offset in (0, PAGE, PART - PAGE)] == [b"x", b"y", b"z"]
    for fd in memory.clear():
        os.close(fd)


def test_files_are_told_apart(ram: int) -> None:
    other = os.memfd_create(NAME, os.MFD_CLOEXEC)
    os.ftruncate(other, PAGE)
    mappings = Mappings()
    for fd, text in ((ram, b"ram"), (other, b"etc")):
        view = mappings.view(fd, 0, 3, PAGE)
        assert view is not None
        with view:
            view[:] = text
    assert (os.pread(ram, 3, 0), os.pread(other, 3, 0)) == (b"ram", b"etc")
    mappings.drop(other)
    assert mapped() == 1
    mappings.drop_all()
    os.close(other)
