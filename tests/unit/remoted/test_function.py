# SPDX-License-Identifier: GPL-2.0-or-later
"""The PCI function: config space, BARs, INTx, reset. The test is the bus and watches the line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest

from common.loop import Loop
from remoted.device import Bar, BarKind, Host, PciFunction
from remoted.memory import GuestMemory
from tests.support.remotebench import IO_BASE, MEM64_BASE, MEM_BASE, LineDevice, Recorder

ONES = 0xFFFFFFFFFFFFFFFF
COMMAND, STATUS, INTX_DISABLE = 0x04, 0x06, 0x400


class Board:
    """One function and what it told the hub."""

    def __init__(self, model: type[PciFunction] = LineDevice) -> None:
        self.lines: list[bool] = []
        self.log = Recorder()
        loop = Loop()
        loop.close()
        self.function = model(Host("dev0", loop, self.log.logger, GuestMemory(), self.lines.append), {})
        self.function.full_reset()

    def enable(self, command: int = 0x3) -> None:
        write = self.function.config_write
        write(0x10, 4, IO_BASE)
        write(0x14, 4, MEM_BASE)
        write(0x18, 8 // 2, MEM64_BASE & 0xFFFFFFFF)
        write(0x1C, 4, MEM64_BASE >> 32)
        write(COMMAND, 2, command)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def function(board: Board) -> PciFunction:
    return board.function


def test_identity_in_config_space(function: PciFunction) -> None:
    whole = b"".join(function.config_read(addr, 4).to_bytes(4, "little") for addr in range(0, 64, 4))
    assert whole == bytes.fromhex(
        "361b4200 00000000 07028007 00000000"  # ids, command and status, revision and class, header type 0
        "01000000 00000000 0c000000 00000000"  # I/O; 32-bit memory; 64-bit prefetchable memory
        "00000000 00000000 00000000 f41a0011"  # subsystem 1af4:1100
        "00000000 00000000 00000000 00010000"  # line 0, pin INTA
    )


@pytest.mark.parametrize("pin", range(5))
def test_interrupt_pin(pin: int) -> None:
    class Model(LineDevice):
        INTERRUPT_PIN: ClassVar[int] = pin

    board = Board(Model)
    assert board.function.config_read(0x3D, 1) == pin
    board.function.set_intx(True)
    assert board.lines == ([True] if pin else [])


def test_every_byte_of_config_space_can_be_read_alone(function: PciFunction) -> None:
    function.bus_config_write(0xFC, 4, 0xA4A3A2A1)
    assert [function.bus_config_read(addr, 1) for addr in range(0xFC, 0x100)] == [0xA1, 0xA2, 0xA3, 0xA4]
    assert function.bus_config_read(0xFE, 2) == 0xA4A3
    assert all(function.bus_config_read(addr, 1) <= 0xFF for addr in range(256))


@pytest.mark.parametrize(
    ("addr", "size"),
    [
        (0xFD, 4),
        (0xFE, 4),
        (0xFF, 2),
        (0x100, 1),
        (0xFFFFFFFF, 1),
        (0, 0),
        (0, 3),
        (0, 5),
        (0, 8),
        (0, 64),
        (0, 256),
        (0, -1),
        (4, -0x80000000),
        (0, 0x7FFFFFFF),
    ],
)
def test_config_access_out_of_range_is_all_ones_and_writes_nothing(
    function: PciFunction, addr: int, size: int
) -> None:
    function.config_write(0xFC, 4, 0x12345678)
    before = [function.config_read(at, 4) for at in range(0, 256, 4)]
    assert function.bus_config_read(addr, size) == ONES
    assert not function.bus_config_write(addr, size, 0xFFFFFFFF)
    assert [function.config_read(at, 4) for at in range(0, 256, 4)] == before


def test_what_writing_all_ones_leaves(function: PciFunction) -> None:
    """Everything read-only is as before; BARs answer with the mask of their size."""
    for addr in range(0, 64, 4):
        assert function.bus_config_write(addr, 4, 0xFFFFFFFF)
    whole = b"".join(function.config_read(addr, 4).to_bytes(4, "little") for addr in range(0, 64, 4))
    assert whole == bytes.fromhex(
        "361b4200 07050000 07028007 ff000000"
        "f1ffffff 00f0ffff 0c00ffff ffffffff"
        "00000000 00000000 00000000 f41a0011"
        "00000000 00000000 00000000 ff010000"
    )


def test_bytewise_writes_are_those_of_a_dword(function: PciFunction) -> None:
    for offset, byte in enumerate((0x78, 0x56, 0x34, 0x12)):
        function.config_write(0x14 + offset, 1, byte)
    assert function.config_read(0x14, 4) == 0x12345000
    function.config_write(0x16, 2, 0xABCD)
    assert function.config_read(0x14, 4) == 0xABCD5000


@pytest.mark.parametrize(
    ("bar", "addr", "mask"),
    [
        (Bar(BarKind.IO, 4), 0x10, 0xFFFFFFFD),
        (Bar(BarKind.IO, 8), 0x10, 0xFFFFFFF9),
        (Bar(BarKind.IO, 256), 0x24, 0xFFFFFF01),
        (Bar(BarKind.MEM32, 16), 0x10, 0xFFFFFFF0),
        (Bar(BarKind.MEM32, 1 << 20), 0x20, 0xFFF00000),
        (Bar(BarKind.MEM32, 4096, prefetchable=True), 0x24, 0xFFFFF008),
        (Bar(BarKind.MEM32, 1 << 31), 0x10, 0x80000000),
        (Bar(BarKind.MEM64, 4096), 0x10, 0xFFFFFFFFFFFFF004),
        (Bar(BarKind.MEM64, 1 << 33, prefetchable=True), 0x20, 0xFFFFFFFE0000000C),
    ],
)
def test_bar_answers_sizing_with_its_mask(bar: Bar, addr: int, mask: int) -> None:
    class Model(LineDevice):
        BARS: ClassVar[Mapping[int, Bar]] = {(addr - 0x10) // 4: bar}

    function = Board(Model).function
    width = 2 if bar.kind is BarKind.MEM64 else 1
    for number in range(6):
        function.config_write(0x10 + 4 * number, 4, 0xFFFFFFFF)
    answers = [function.config_read(0x10 + 4 * number, 4) for number in range(6)]
    number = (addr - 0x10) // 4
    assert sum(answers[number + n] << 32 * n for n in range(width)) == mask
    del answers[number : number + width]
    assert not any(answers)


@pytest.mark.parametrize(
    ("memory", "base", "size"),
    [(False, IO_BASE, 16), (True, MEM_BASE, 4096), (True, MEM64_BASE, 1 << 16)],
    ids=["io", "mem32", "mem64"],
)
def test_bar_is_decoded_at_its_address_and_nowhere_else(
    board: Board, memory: bool, base: int, size: int
) -> None:
    function = board.function
    board.enable()
    assert function.bus_write(memory, base + size - 8, 8, 0x8877665544332211)
    assert function.bus_read(memory, base + size - 8, 8) == 0x8877665544332211
    assert function.bus_read(memory, base + size - 8, 4) == 0x44332211
    assert function.bus_read(memory, base + size - 1, 1) == 0x88
    nowhere = [(base - 1, 1), (base + size, 1), (base - 2, 2), (base + size, 4), (base - 8, 8)]
    for addr, width in nowhere + [(base - 1, 2), (base + size - 1, 2), (base + size - 4, 8)] * memory:
        assert function.bus_read(memory, addr, width) == ONES
        assert not function.bus_write(memory, addr, width, 0)
    assert function.bus_read(not memory, base, 1) == ONES
    assert not function.bus_write(not memory, base, 1, 0)
    assert function.bus_read(memory, base + size - 8, 8) == 0x8877665544332211


@pytest.mark.parametrize(
    ("start", "size", "read"),
    [
        (-1, 2, 0x01FF),
        (-3, 4, 0x01FFFFFF),
        (-2, 4, 0x0201FFFF),
        (-4, 8, 0x04030201FFFFFFFF),
        (15, 2, 0xFF10),
        (13, 4, 0xFF100F0E),
        (14, 4, 0xFFFF100F),
        (15, 8, 0xFFFFFFFFFFFFFF10),
    ],
)
def test_io_access_that_is_only_in_part_its_own(board: Board, start: int, size: int, read: int) -> None:
    """The rest is read as all ones, and not written."""
    function = board.function
    board.enable()
    for n in range(16):
        function.bus_write(False, IO_BASE + n, 1, n + 1)
    assert function.bus_read(False, IO_BASE + start, size) == read
    assert function.bus_write(False, IO_BASE + start, size, 0xA8A7A6A5A4A3A2A1)
    for n in range(16):
        written = start <= n < start + size
        assert function.bus_read(False, IO_BASE + n, 1) == (0xA1 + n - start if written else n + 1)


@pytest.mark.parametrize("size", [0, 3, 5, 7, 16, 0xFFFFFFFF])
def test_access_of_an_odd_size_is_all_ones(board: Board, size: int) -> None:
    board.enable()
    assert board.function.bus_read(True, MEM_BASE, size) == ONES
    assert not board.function.bus_write(True, MEM_BASE, size, 1)
    assert board.lines == []


@pytest.mark.parametrize(
    ("command", "io", "memory"),
    [(0x0, False, False), (0x1, True, False), (0x2, False, True), (0x3, True, True)],
)
def test_decoders_follow_the_command_register(board: Board, command: int, io: bool, memory: bool) -> None:
    board.enable(command)
    assert (board.function.bus_read(False, IO_BASE, 1) == 0) is io
    assert (board.function.bus_read(True, MEM_BASE, 1) == 0) is memory
    assert (board.function.bus_read(True, MEM64_BASE, 1) == 0) is memory


def test_a_region_is_accessed_wherever_its_bar_is(board: Board) -> None:
    function = board.function
    assert function.region_write(1, 8, 2, 0x12345678)
    assert function.region_read(1, 8, 4) == 0x5678, "two bytes were written"
    assert function.region_write(0, 8, 1, 0x99)
    board.enable()
    assert function.bus_read(True, MEM_BASE + 8, 4) == 0x5678
    assert function.bus_read(False, IO_BASE + 8, 1) == 0x99
    assert function.region_read(2, 0xFFF8, 8) == 0


@pytest.mark.parametrize(
    ("bar", "offset", "size"),
    [
        (3, 0, 4),
        (-1, 0, 4),
        (7, 0, 4),
        (1, -4, 4),
        (1, 4096, 1),
        (1, 4092, 8),
        (1, 0, 3),
        (1, 0, 0),
        (1, 0, 16),
        (1, 1 << 64, 4),
    ],
)
def test_an_access_that_is_not_within_a_region(board: Board, bar: int, offset: int, size: int) -> None:
    assert board.function.region_read(bar, offset, size) == ONES
    assert not board.function.region_write(bar, offset, size, 0)
    assert board.function.errors == 0


def test_a_function_without_bars_needs_no_decoding() -> None:
    class Model(LineDevice):
        BARS: ClassVar[Mapping[int, Bar]] = {}

    assert Board(Model).function.is_decoded


def test_moved_bar(board: Board) -> None:
    board.enable()
    board.function.config_write(0x14, 4, 0xE0000000)
    assert board.function.bus_read(True, MEM_BASE, 4) == ONES
    assert board.function.bus_read(True, 0xE0000000, 4) == 0
    board.function.config_write(0x1C, 4, 0)
    assert board.function.bus_read(True, MEM64_BASE, 4) == ONES


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_bar_is_decoded_anew_by_any_write_to_it(number: int, size: int) -> None:
    class Model(LineDevice):
        BARS: ClassVar[Mapping[int, Bar]] = {number: Bar(BarKind.MEM32, 16)}

        def bar_read(self, bar: int, offset: int, size: int) -> int:
            return 10 + bar

    function = Board(Model).function
    addr = 0x10 + 4 * number
    function.config_write(COMMAND, 2, 0x2)
    function.config_write(addr, 4, 0x11223340)
    assert function.bus_read(True, 0x11223340, 4) == 10 + number
    last = addr + 4 - size
    function.config_write(last, size, 0x55667780 >> 8 * (4 - size))
    moved = function.config_read(addr, 4)
    assert moved != 0x11223340
    assert function.bus_read(True, 0x11223340, 4) == ONES
    assert function.bus_read(True, moved, 4) == 10 + number


@pytest.mark.parametrize("number", range(6))
def test_reset_clears_each_bar(number: int) -> None:
    class Model(LineDevice):
        BARS: ClassVar[dict[int, Bar]] = {number: Bar(BarKind.MEM32, 16)}

    function = Board(Model).function
    addr = 0x10 + 4 * number
    function.config_write(addr, 4, 0x11223340)
    Model.BARS[number] = Bar(BarKind.IO, 256)  # too late
    function.config_write(COMMAND, 2, 0x2)
    assert function.bus_read(True, 0x11223340, 4) == 0
    assert function.full_reset()
    assert function.config_read(addr, 4) == 0


def test_a_write_that_crosses_into_the_command_register_counts(board: Board) -> None:
    """It begins below and ends above: any write that touches a byte of the command takes effect."""
    function = board.function
    board.enable(0)
    function.config_write(0x05, 1, 0x04)
    function.set_intx(True)
    assert board.lines == []
    function.config_write(0x03, 2, 0x0300)
    assert function.bus_read(False, IO_BASE, 1) == 0
    function.config_write(0x05, 1, 0)
    assert board.lines == [True]


def test_bar_at_zero_or_being_sized_is_decoded_nowhere(board: Board) -> None:
    board.enable()
    for value in (0, 0xFFFFFFFF):
        for addr in (0x10, 0x14, 0x18, 0x1C):
            board.function.config_write(addr, 4, value)
        for memory, addr in ((False, 0), (False, 0xFFFFFFF0), (True, 0), (True, 0xFFFFF000)):
            assert board.function.bus_read(memory, addr, 1) == ONES
        assert board.function.bus_read(True, ONES - 0xFFFF, 1) == ONES


def test_status_bit_3_is_the_raw_level(board: Board) -> None:
    """Whatever INTX_DISABLE says; the dword is the one that QEMU shows for a line that is high and disabled."""
    function = board.function
    function.set_intx(True)
    assert function.config_read(STATUS, 2) == 0x08
    function.config_write(COMMAND, 2, 0x406)
    assert function.config_read(COMMAND, 4) == 0x80406
    function.set_intx(False)
    assert function.config_read(STATUS, 2) == 0
    function.set_intx(True)
    assert function.config_read(COMMAND, 4) == 0x80406
    assert board.lines == [True, False]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_status_bit_3_is_read_only(board: Board, size: int) -> None:
    function = board.function
    addr = COMMAND if size == 4 else STATUS
    function.config_write(addr, size, 0xFFFFFBFF)
    assert function.config_read(STATUS, 2) == 0
    function.set_intx(True)
    for value in (0, 0xFFFFFBFF, 0x08 << 8 * (STATUS - addr)):
        function.config_write(addr, size, value)
        assert function.config_read(STATUS, 2) == 0x08
    assert board.lines == [True]


def test_line_is_a_boolean(board: Board) -> None:
    for _ in range(3):
        board.function.set_intx(True)
    for _ in range(3):
        board.function.set_intx(False)
    assert board.lines == [True, False]


def test_line_is_level_and_not_intx_disable(board: Board) -> None:
    function = board.function
    function.config_write(COMMAND, 2, INTX_DISABLE)
    function.set_intx(True)
    assert board.lines == []
    function.config_write(COMMAND, 2, 0)
    assert board.lines == [True]
    function.config_write(COMMAND, 2, INTX_DISABLE)
    assert board.lines == [True, False]
    function.set_intx(False)
    function.config_write(COMMAND, 2, 0)
    assert board.lines == [True, False]


@pytest.mark.parametrize(("addr", "size", "value"), [(0x04, 4, 0x400), (0x05, 1, 0x04), (0x04, 2, 0x400)])
def test_intx_disable_by_any_width(board: Board, addr: int, size: int, value: int) -> None:
    board.function.set_intx(True)
    board.function.config_write(addr, size, value)
    assert board.lines == [True, False]
    board.function.config_write(addr, size, 0)
    assert board.lines == [True, False, True]


def test_other_config_writes_leave_the_line_alone(board: Board) -> None:
    board.function.set_intx(True)
    for addr in (0x00, 0x08, 0x0C, 0x10, 0x14, 0x24, 0x28, 0x30, 0x3C, 0x40, 0xFC):
        board.function.config_write(addr, 4, 0xFFFFFFFF)
    assert board.lines == [True]


def test_reset_lowers_the_line_before_the_devices_own_reset() -> None:
    seen: list[tuple[bool, int, int]] = []

    class Model(LineDevice):
        def reset(self) -> None:
            super().reset()
            seen.append((self.intx_level, self.config_read(COMMAND, 4), self.bar_read(0, 4, 1)))

    board = Board(Model)
    board.enable()
    board.function.bus_write(False, IO_BASE + 4, 1, 0x55)
    board.function.set_intx(True)
    board.function.full_reset()
    assert board.lines == [True, False]
    assert seen[1:] == [(False, 0, 0)]


def test_reset_gives_config_space_its_power_on_values(board: Board) -> None:
    function = board.function
    power_on = [function.config_read(addr, 4) for addr in range(0, 64, 4)]
    for addr in range(0, 256, 4):
        function.config_write(addr, 4, 0xFFFFFFFF)
    function.set_intx(True)
    function.full_reset()
    assert [function.config_read(addr, 4) for addr in range(0, 64, 4)] == power_on
    assert board.lines == []


def test_reset_leaves_device_specific_config_space_alone(board: Board) -> None:
    """As pci_do_device_reset() in QEMU's hw/pci/pci.c."""
    function = board.function
    for addr in range(0x40, 0x100, 4):
        function.config_write(addr, 4, 0xA5000000 | addr)
    function.full_reset()
    assert [function.config_read(addr, 4) for addr in range(0x40, 0x100, 4)] == [
        0xA5000000 | addr for addr in range(0x40, 0x100, 4)
    ]


def test_reset_ends_decoding_and_intx_disable(board: Board) -> None:
    board.enable(0x403)
    board.function.full_reset()
    assert board.function.bus_read(False, IO_BASE, 1) == ONES
    assert board.function.bus_read(True, MEM_BASE, 1) == ONES
    board.function.set_intx(True)
    assert board.lines == [True]


def test_device_may_raise_its_line_in_reset() -> None:
    class Model(LineDevice):
        def reset(self) -> None:
            self.set_intx(True)

    board = Board(Model)
    board.function.full_reset()
    assert board.lines == [True, False, True]
    assert board.function.config_read(STATUS, 2) == 0x08
