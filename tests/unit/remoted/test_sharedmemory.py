# SPDX-License-Identifier: GPL-2.0-or-later
"""BARs that the guest may map: the test maps the file as a client does, and reads and writes as one that can't."""

from __future__ import annotations

import errno
import gc
import mmap
import os
from collections.abc import Iterator
from typing import ClassVar

import pytest

from common import pci
from remoted.device import Bar, BarKind, Msix, PciFunction
from tests.support.fds import no_fd_is_left
from tests.support.mappings import dumped_mappings
from tests.support.messageboard import MessageBoard

PAGE = 4096
ONES = 0xFFFFFFFFFFFFFFFF
BASES = {0: 0xFEA0_0000, 2: 0xE000_0000}


class Card(PciFunction):
    """BAR 0 has registers, memory, the table of MSI-X and memory again; BAR 2 is memory."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x0001
    BARS: ClassVar = {
        0: Bar(BarKind.MEM32, 8 * PAGE, shared=((0x5000, 0x1000), (0x1000, 0x2000))),
        2: Bar(BarKind.MEM64, 4 * PAGE, prefetchable=True, shared=True),
    }
    MSIX: ClassVar[Msix | None] = Msix(vectors=2, bar=0, table=0x3010)

    accesses: ClassVar[list[tuple[int, int, int]]] = []

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        self.accesses.append((bar, offset, size))
        return 0x1122334455667788

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.accesses.append((bar, offset, size))


@pytest.fixture(params=[True, False], ids=["messages", "line"])
def card(request: pytest.FixtureRequest) -> Iterator[PciFunction]:
    Card.accesses.clear()
    with no_fd_is_left():
        function = MessageBoard(Card, has_messages=request.param).function
        for number, base in BASES.items():
            assert function.bus_config_write(pci.PCI_BASE_ADDRESS_0 + 4 * number, 4, base)
        assert function.bus_config_write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
        yield function
        close(function)


def test_no_core_dump_has_it(card: PciFunction) -> None:
    assert card.shared_memory(2) is not None
    assert dumped_mappings("iohub-bar") == [False, False]


def close(function: PciFunction) -> None:
    for fd in function.shut_down():
        os.close(fd)


def test_the_device_the_client_s_map_and_the_bus_see_the_same(card: PciFunction) -> None:
    memory = card.shared_memory(2)
    assert memory is not None
    assert memory.areas == ((0, 4 * PAGE),)
    with mmap.mmap(memory.fd, 4 * PAGE) as mapped:
        for size in (1, 2, 4, 8):
            for offset in (0, 8, 13, 4 * PAGE - size):
                pattern = 0x8877665544332211 + offset & (1 << 8 * size) - 1
                assert card.bus_write(True, BASES[2] + offset, size, pattern)
                content = pattern.to_bytes(size, "little")
                assert mapped[offset : offset + size] == content
                assert card.bar_memory(2)[offset : offset + size] == content
                assert card.region_read(2, offset, size) == pattern
        mapped[100:104] = b"abcd"
        assert card.bus_read(True, BASES[2] + 100, 4) == int.from_bytes(b"abcd", "little")
        assert card.region_write(2, 100, 2, ONES)
        assert mapped[100:104] == b"\xff\xffcd"
        assert card.region_read(2, 4 * PAGE - 4, 8) == ONES
        assert not card.region_write(2, 4 * PAGE - 4, 8, 0)
    assert Card.accesses == []


def test_registers_and_memory_in_one_bar(card: PciFunction) -> None:
    memory = card.shared_memory(0)
    assert memory is not None
    assert memory.areas == ((0x1000, 0x2000), (0x5000, 0x1000))
    served = []
    for offset in (
        0x0,
        0xFFC,
        0x1000,
        0x2FFC,
        0x3000,
        0x3010,
        0x302C,
        0x3030,
        0x3038,
        0x4FFC,
        0x5000,
        0x6000,
        0x7FFC,
    ):
        card.bus_read(True, BASES[0] + offset, 4)
        card.region_read(0, offset, 4)
        card.bus_write(True, BASES[0] + offset, 4, 0)
        card.region_write(0, offset, 4, 0)
        assert Card.accesses in ([], [(0, offset, 4)] * 4)
        served += [offset] if Card.accesses else []
        Card.accesses.clear()
    assert served == [0x0, 0xFFC, 0x3000, 0x3038, 0x4FFC, 0x6000, 0x7FFC]
    assert card.errors == 0


@pytest.mark.parametrize("edge", [0x1000, 0x3000, 0x3010, 0x3030, 0x3038, 0x5000, 0x6000])
def test_an_access_across_the_edge_of_an_area_is_not_done(card: PciFunction, edge: int) -> None:
    card.bar_memory(0)[:] = b"m" * 8 * PAGE
    assert card.bus_read(True, BASES[0] + edge - 4, 8) == card.region_read(0, edge - 4, 8) == ONES
    assert not card.bus_write(True, BASES[0] + edge - 4, 8, 0)
    assert not card.region_write(0, edge - 4, 8, 0)
    assert Card.accesses == []
    assert bytes(card.bar_memory(0)) == b"m" * 8 * PAGE


def test_a_reset_leaves_the_contents_alone(card: PciFunction) -> None:
    card.bar_memory(2)[7] = 5
    card.full_reset()
    assert card.bar_memory(2)[7] == 5


def test_the_file_can_not_be_cut(card: PciFunction) -> None:
    memory = card.shared_memory(2)
    assert memory is not None
    for size in (0, 8 * PAGE):
        with pytest.raises(OSError, match="Operation not permitted") as caught:
            os.ftruncate(memory.fd, size)
        assert caught.value.errno == errno.EPERM


def test_a_bar_that_is_nothing_but_memory_is_decoded() -> None:
    class Ram(Card):
        BARS: ClassVar = {2: Card.BARS[2]}
        MSIX = None

    function = MessageBoard(Ram).function
    assert not function.is_decoded
    assert function.bus_config_write(0x18, 4, BASES[2])
    assert function.bus_config_write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
    assert function.is_decoded
    close(function)


def test_a_view_of_the_device_outlives_the_memory(card: PciFunction) -> None:
    part = card.bar_memory(2)[:4]
    close(card)
    part[:] = b"abcd"
    assert bytes(part) == b"abcd"
    del part
    gc.collect()


def test_a_bar_without_memory(card: PciFunction) -> None:
    assert card.shared_memory(1) is None
    with pytest.raises(LookupError, match="BAR 1 is not declared with shared="):
        card.bar_memory(1)
