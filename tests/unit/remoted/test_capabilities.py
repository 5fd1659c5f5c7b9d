# SPDX-License-Identifier: GPL-2.0-or-later
"""Capabilities: the lists that a guest walks, what it can write, power states and function-level resets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

import pytest

from common import pci
from common.errors import UsageError
from remoted.capabilities import Capability
from remoted.device import (
    Bar,
    BarKind,
    DeviceSerialNumber,
    ExtendedVendorSpecific,
    Msi,
    Msix,
    PciExpress,
    PciFunction,
    PowerManagement,
    VendorSpecific,
    register,
)
from remoted.msi import VectorKind
from tests.support.messageboard import MessageBoard

ONES = 0xFFFFFFFFFFFFFFFF
MEM_BASE = 0xFEB00000
COMMAND = pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER
VENDOR = VendorSpecific(b"abcde", writable=b"\xff\x0f")


class Full(PciFunction):
    """One of each."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x0001
    BARS: ClassVar = {0: Bar(BarKind.MEM32, 4096)}
    CAPABILITIES: ClassVar[Sequence[Capability]] = (
        PowerManagement(),
        DeviceSerialNumber(0x0123456789ABCDEF),
        VENDOR,
        PciExpress(),
        VendorSpecific(b""),
        ExtendedVendorSpecific(0xBEEF, b"xyz", revision=5, writable=b"\x00\xff"),
    )
    MSI: ClassVar[Msi | None] = Msi(4)
    MSIX: ClassVar[Msix | None] = Msix(3)

    value: int = register(8)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        return self.value

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.value = value & 0xFF


class Lasting(Full):
    """A way back from D3hot that is no reset."""

    CAPABILITIES = (PowerManagement(no_soft_reset=True),)


def wake(board: MessageBoard, state: int) -> None:
    pmcsr = board.capability(pci.PCI_CAP_ID_PM) + 4
    assert board.function.bus_config_write(pmcsr, 2, state)


def enabled(model: type[PciFunction]) -> MessageBoard:
    """BAR 0 is decoded, and the function bus master."""
    board = MessageBoard(model)
    assert board.function.bus_config_write(pci.PCI_BASE_ADDRESS_0, 4, MEM_BASE)
    board.command(COMMAND)
    return board


def config(board: MessageBoard, start: int, end: int) -> bytes:
    return bytes(board.function.bus_config_read(addr, 1) for addr in range(start, end))


def test_the_list_as_guests_walk_it() -> None:
    board = MessageBoard(Full)
    assert board.function.config_size == 4096
    assert config(board, 0x34, 0x35) == b"\x40"
    assert config(board, 0x40, 0x48).hex() == "0148" + "0300" + "0000" + "0000"
    assert config(board, 0x48, 0x50).hex() == "0950" + "08" + b"abcde".hex()
    assert config(board, 0x50, 0x8C).hex() == (
        "108c" + "0200" + "00800010" + "1028" + "0000" + "11004000" + "0000" + "1100"
        "0000000000000000000000000000000010000000" + "0000" + "0000" + "02000000" + "0100" + "0000" + "00" * 8
    )
    assert config(board, 0x8C, 0x90).hex() == "0990" + "03" + "00"
    assert config(board, 0x90, 0xA8).hex() == "05a8" + "8401" + "00" * 20
    assert config(board, 0xA8, 0xB4).hex() == "1100" + "0200" + "05000000" + "35000000"
    assert config(board, 0x100, 0x10C).hex() == "0300c110" + "efcdab8967452301"
    assert config(board, 0x10C, 0x118).hex() == "0b000100" + "efbeb500" + b"xyz\0".hex()
    assert config(board, 0x118, 0x1000) == bytes(0x1000 - 0x118)


def test_over_mpqemu_the_others_are_where_they_were() -> None:
    board = MessageBoard(Full, has_messages=False)
    assert board.function.config_size == 256
    assert config(board, 0x8C, 0x8F).hex() == "090003"
    assert board.capability(pci.PCI_CAP_ID_EXP) == 0x50
    assert board.function.bus_config_read(0x100, 4) == ONES
    assert not board.function.bus_config_write(0x100, 4, 0)
    assert board.function.capability_offset(VENDOR) == 0x48
    with pytest.raises(LookupError, match="config space does not show DeviceSerialNumber"):
        board.function.capability_offset(Full.CAPABILITIES[1])


WRITABLE = {
    0x44: 0x03,  # power state
    0x4B: 0xFF,
    0x4C: 0x0F,  # the vendor's
    0x58: 0x1F,
    0x59: 0xF8,  # device control
    0x60: 0xCB,  # link control
    0x78: 0x10,  # device control 2
    0x92: 0x71,  # MSI: multiple message enable, enable
    **dict.fromkeys(range(0x95, 0x9E), 0xFF),
    0x94: 0xFC,
    0xA0: 0x0F,  # masks
    0xAB: 0xC0,  # MSI-X: enable, function mask
    0x115: 0xFF,  # the extended vendor's
}
"""bits of config space that a guest can change, from the first to the last capability"""


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_the_guest_can_write(size: int) -> None:
    """Bit by bit, so that no bit has an effect through another; FLR and the states D1 and D2 read as before."""
    board = MessageBoard(Full)
    unwritable = {0x59: 0x80}
    for addr in (*range(0x40, 0xB4), *range(0x100, 0x118)):
        at, shift = addr - addr % size, 8 * (addr % size)
        found = 0
        for bit in range(8):
            before = board.function.bus_config_read(at, size)
            assert board.function.bus_config_write(at, size, before ^ 1 << bit + shift)
            found |= (board.function.bus_config_read(at, size) ^ before) >> shift & 0xFF
            board.function.full_reset()
        wanted = WRITABLE.get(addr, 0) & ~unwritable.get(addr, 0)
        assert found == (wanted if addr != 0x44 else 0), f"{found:#x} at {addr:#x}"


def test_a_reset_restores_every_capability() -> None:
    board = MessageBoard(Full)
    before = config(board, 0, 0xB4)
    for addr in range(0x50, 0xB4):
        board.function.bus_config_write(addr, 1, 0x5A)
    board.function.bus_config_write(0x48, 4, 0xFFFFFFFF)
    assert config(board, 0, 0xB4) != before
    board.function.full_reset()
    assert config(board, 0, 0xB4) == before


def test_bytes_behind_the_capabilities_are_the_device_s() -> None:
    board = MessageBoard(Full)
    board.function.bus_config_write(0xC0, 4, 0x12345678)
    board.function.full_reset()
    assert board.function.bus_config_read(0xC0, 4) == 0x12345678


def test_a_config_read_of_the_device_s_own_goes_on() -> None:
    class Own(Full):
        def config_read(self, addr: int, size: int) -> int:
            return 0xA5 if addr == self.capability_offset(VENDOR) + 3 else super().config_read(addr, size)

    board = MessageBoard(Own)
    assert config(board, 0x4A, 0x4D) == b"\x08\xa5b"


def test_in_d3hot_nothing_is_decoded_or_signalled() -> None:
    board = enabled(Full)
    board.attach(VectorKind.MSIX, 0, 3)
    board.function.raise_irq(0)
    assert board.line
    wake(board, 3)
    assert not board.line
    assert not board.function.is_bus_master
    assert not board.function.host.memory.is_bus_master
    assert not board.function.is_decoded
    assert board.function.bus_read(True, MEM_BASE, 4) == board.function.region_read(0, 0, 4) == ONES
    assert not board.function.bus_write(True, MEM_BASE, 4, 1)
    assert not board.function.region_write(0, 0, 4, 1)
    assert board.function.bus_config_read(pci.PCI_COMMAND, 2) == COMMAND
    board.msix_control(0x8000)
    board.function.raise_irq(1)
    assert board.port.take() == []


@pytest.mark.parametrize("state", [1, 2])
def test_a_power_state_that_there_is_not(state: int) -> None:
    board = enabled(Full)
    wake(board, state)
    assert board.function.bus_config_read(0x44, 2) == 0
    assert board.function.region_write(0, 0, 1, 5)
    wake(board, 3)
    wake(board, state)
    assert board.function.bus_config_read(0x44, 2) == 3
    assert not board.function.region_write(0, 0, 1, 5)


def test_the_way_from_d3hot_to_d0_is_a_reset() -> None:
    board = enabled(Full)
    board.function.region_write(0, 0, 1, 5)
    wake(board, 3)
    wake(board, 3)
    assert board.function.bus_config_read(0x44, 2) == 3
    wake(board, 0)
    assert board.function.bus_config_read(0x44, 2) == 0
    assert board.function.bus_config_read(pci.PCI_COMMAND, 2) == 0
    assert board.function.bus_config_read(pci.PCI_BASE_ADDRESS_0, 4) == 0
    assert board.function.region_read(0, 0, 1) == 0


def test_with_no_soft_reset_everything_is_as_before() -> None:
    board = enabled(Lasting)
    board.attach(VectorKind.MSIX, 0, 3)
    board.msix_control(0x8000)
    board.function.region_write(0, 0, 1, 5)
    wake(board, 3)
    board.function.raise_irq(2)
    assert board.port.take() == []
    wake(board, 0)
    assert board.port.take() == [2]
    assert board.function.bus_config_read(0x44, 2) == 8
    assert board.function.bus_read(True, MEM_BASE, 1) == 5


def test_a_function_level_reset() -> None:
    board = enabled(Full)
    board.function.region_write(0, 0, 1, 5)
    board.function.bus_config_write(0x60, 2, 0x40)
    control = board.function.bus_config_read(0x58, 2)
    assert board.function.bus_config_write(0x58, 2, control | 0x8007)
    assert board.function.bus_config_read(0x58, 2) == control
    assert board.function.bus_config_read(0x60, 2) == 0x40, "a function-level reset leaves the link alone"
    assert board.function.bus_config_read(pci.PCI_COMMAND, 2) == 0
    assert board.function.region_read(0, 0, 1) == 0
    board.function.full_reset()
    assert board.function.bus_config_read(0x60, 2) == 0


def test_more_than_there_is_room_for() -> None:
    class Crowded(Full):
        CAPABILITIES: ClassVar[Sequence[Capability]] = (VendorSpecific(bytes(189)),)
        MSI: ClassVar[Msi | None] = None
        MSIX = None

    class Overfull(Crowded):
        MSI = Msi()

    class Endless(Crowded):
        CAPABILITIES = (
            PciExpress(),
            ExtendedVendorSpecific(1, bytes(3800)),
            ExtendedVendorSpecific(1, bytes(40)),
        )

    assert MessageBoard(Crowded).capability(pci.PCI_CAP_ID_VNDR) == 0x40
    with pytest.raises(UsageError, match="CAPABILITIES: no room for Msi, which would end at 0x118 of config"):
        MessageBoard(Overfull)
    with pytest.raises(UsageError, match="no room for ExtendedVendorSpecific, which would end at 0x1010 of"):
        MessageBoard(Endless)


def any_capabilities(chance: random.Random) -> list[Capability]:
    """Some of each kind, in any order, with PciExpress() if it must be there."""
    vendors = [VendorSpecific(chance.randbytes(chance.randrange(20))) for _ in range(chance.randrange(3))]
    extended: list[Capability] = []
    for _ in range(chance.randrange(3)):
        content = chance.randbytes(chance.randrange(40))
        extended.append(
            ExtendedVendorSpecific(chance.getrandbits(16), content, 1, chance.randbytes(len(content)))
        )
    extended += [DeviceSerialNumber(chance.getrandbits(64))] * chance.randrange(2)
    chosen: list[Capability] = [*vendors, *extended]
    chosen += [PowerManagement(chance.random() < 0.5)] * chance.randrange(2)
    chosen += [PciExpress()] * (1 if extended else chance.randrange(2))
    chance.shuffle(chosen)
    return chosen


@pytest.mark.parametrize("seed", range(30))
def test_any_capabilities_are_linked_apart_and_restored_by_a_reset(seed: int) -> None:
    chance = random.Random(seed)
    chosen = any_capabilities(chance)
    messages = [Msi(1 << chance.randrange(6), chance.random() < 0.5)] * chance.randrange(2)

    class Any(Full):
        CAPABILITIES = tuple(chosen)
        MSI = messages[0] if messages else None
        MSIX = None

    board = MessageBoard(Any)
    read, write = board.function.bus_config_read, board.function.bus_config_write
    before = config(board, 0, board.function.config_size)
    plain, extended, at = [], [], before[0x34]
    while at:
        plain.append((at, before[at]))
        at = before[at + 1]
    at = 0x100 if board.function.config_size > 256 else 0
    while at:
        header = read(at, 4)
        extended.append((at, header & 0xFFFF))
        assert header >> 16 & 0xF == 1
        at = header >> 20
    shown = [each for each in [*chosen, *messages] if not each.IS_EXTENDED]
    for found, wanted in ((plain, shown), (extended, [each for each in chosen if each.IS_EXTENDED])):
        assert [cap_id for _, cap_id in found] == [each.cap_id for each in wanted]
        ends = [at + each.size for (at, _), each in zip(found, wanted, strict=True)]
        assert all(at % 4 == 0 for at, _ in found)
        assert all(end <= following for end, (following, _) in zip(ends, found[1:], strict=False))
        assert all(end <= (4096 if found is extended else 256) for end in ends)
    end = max((0x40, *(at + each.size for (at, _), each in zip(plain, shown, strict=True))))
    for _ in range(500):
        addr = chance.choice((chance.randrange(0x40), chance.randrange(end), chance.randrange(0x100, 0x200)))
        write(addr, chance.choice((1, 2, 4)), chance.getrandbits(32))
        assert board.function.errors == 0
    board.function.full_reset()
    assert config(board, 0, end) == before[:end]
    for at in range(0x100, board.function.config_size):
        assert read(at, 1) == before[at]
