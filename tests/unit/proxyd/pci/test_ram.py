# SPDX-License-Identifier: GPL-2.0-or-later
"""The RAM of a guest that proxyd runs itself."""

from __future__ import annotations

import mmap
import os

import pytest

from common.mpqemu import MAX_FDS, SYSMEM
from proxyd.pci.ram import Ram
from tests.support.fds import count_fds
from tests.support.mappings import dumped_mappings

SIZE = 16 * mmap.PAGESIZE


def test_ram_is_a_file_of_fixed_size_that_no_core_dump_has() -> None:
    before = count_fds()
    ram = Ram(SIZE)
    for size in (SIZE - mmap.PAGESIZE, SIZE + mmap.PAGESIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(ram.fd, size)
    assert dumped_mappings("guest-ram") == [False]
    ram.mapping[SIZE - 1] = 7
    assert os.pread(ram.fd, 1, SIZE - 1) == b"\7"
    ram.close()
    ram.close()
    assert dumped_mappings("guest-ram") == []
    assert count_fds() == before


def test_the_table_has_one_region_with_the_files_start() -> None:
    ram = Ram(SIZE)
    table = SYSMEM.unpack(ram.sysmem)
    assert table[::MAX_FDS] == (0, SIZE, 0)
    ram.close()
