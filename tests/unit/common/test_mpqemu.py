# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire format against the C structures of QEMU's include/hw/remote/mpqemu-link.h."""

from __future__ import annotations

import ctypes
from struct import Struct

import pytest

from common import mpqemu
from common.errors import ProtocolError
from common.mpqemu import Command


class MPQemuHeader(ctypes.Structure):
    _fields_ = [("cmd", ctypes.c_int), ("size", ctypes.c_uint64)]


class PciConfDataMsg(ctypes.Structure):
    _fields_ = [("addr", ctypes.c_uint32), ("val", ctypes.c_uint32), ("len", ctypes.c_int)]


class BarAccessMsg(ctypes.Structure):
    _fields_ = [
        ("addr", ctypes.c_uint64),
        ("val", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("memory", ctypes.c_bool),
    ]


class SyncSysmemMsg(ctypes.Structure):
    _fields_ = [
        ("gpas", ctypes.c_uint64 * 8),
        ("sizes", ctypes.c_uint64 * 8),
        ("offsets", ctypes.c_int64 * 8),
    ]


class Ret(ctypes.Structure):
    _fields_ = [("u64", ctypes.c_uint64)]


GPAS = tuple(0x1_0000_0000 + n for n in range(8))
SIZES = tuple(0x2_0000_0000 + n for n in range(8))
OFFSETS = tuple(-3 - n for n in range(8))


@pytest.mark.parametrize(
    ("structure", "ours", "size", "offsets", "values"),
    [
        (MPQemuHeader, mpqemu.HEADER, 16, {"cmd": 0, "size": 8}, (-2, 0x1122334455667788)),
        (PciConfDataMsg, mpqemu.CONFIG, 12, {"addr": 0, "val": 4, "len": 8}, (0x81828384, 0x91929394, -5)),
        (
            BarAccessMsg,
            mpqemu.BAR,
            24,
            {"addr": 0, "val": 8, "size": 16, "memory": 20},
            (0x8182838485868788, 0x9192939495969798, 0xA1A2A3A4, True),
        ),
        (SyncSysmemMsg, mpqemu.SYSMEM, 192, {"gpas": 0, "sizes": 64, "offsets": 128}, None),
        (Ret, mpqemu.RET, 8, {"u64": 0}, (0x8182838485868788,)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_layout_is_that_of_the_c_structure(
    structure: type[ctypes.Structure],
    ours: Struct,
    size: int,
    offsets: dict[str, int],
    values: tuple[int | bool, ...] | None,
) -> None:
    assert ours.size == ctypes.sizeof(structure) == size
    assert {name: getattr(structure, name).offset for name in offsets} == offsets
    if values is None:
        c_bytes = bytes(SyncSysmemMsg((ctypes.c_uint64 * 8)(*GPAS), (ctypes.c_uint64 * 8)(*SIZES), OFFSETS))
        values = GPAS + SIZES + OFFSETS
    else:
        c_bytes = bytes(structure(*values))
    assert ours.pack(*values) == c_bytes
    assert ours.unpack(c_bytes) == values


@pytest.mark.parametrize(
    ("number", "name"),
    list(
        enumerate(
            [
                "SYNC_SYSMEM",
                "RET",
                "PCI_CFGWRITE",
                "PCI_CFGREAD",
                "BAR_WRITE",
                "BAR_READ",
                "SET_IRQFD",
                "DEVICE_RESET",
            ]
        )
    ),
)
def test_command_numbers_are_those_of_merged_qemu(number: int, name: str) -> None:
    assert Command[name] == number
    assert mpqemu.command_name(number) == name


def test_there_is_no_ninth_command() -> None:
    assert len(Command) == 8
    assert mpqemu.command_name(8) == "command 8"
    assert mpqemu.command_name(-1) == "command -1"


WITHOUT_REPLY = (Command.SYNC_SYSMEM, Command.SET_IRQFD)

REQUESTS = [
    # command, payload size, most fds
    (Command.SYNC_SYSMEM, 192, 8),
    (Command.PCI_CFGWRITE, 12, 0),
    (Command.PCI_CFGREAD, 12, 0),
    (Command.BAR_WRITE, 24, 0),
    (Command.BAR_READ, 24, 0),
    (Command.SET_IRQFD, 0, 2),
    (Command.DEVICE_RESET, 0, 0),
]


@pytest.mark.parametrize(("command", "size", "most"), REQUESTS)
def test_rule_of_each_request(command: Command, size: int, most: int) -> None:
    assert mpqemu.check_request(command, size) == (size, most)


@pytest.mark.parametrize(("command", "size"), [request[:2] for request in REQUESTS])
def test_any_other_size_is_refused(command: Command, size: int) -> None:
    wrong = {0, 1, 8, 12, 16, 24, 191, 192, 193, size + 1, 1 << 31, 1 << 32, (1 << 64) - 1} - {size}
    for other in wrong:
        with pytest.raises(ProtocolError, match=rf"{command.name} with {other} bytes"):
            mpqemu.check_request(command, other)


@pytest.mark.parametrize("command", [Command.RET, 8, 9, -1, 0x7FFFFFFF, -0x80000000])
@pytest.mark.parametrize("size", [0, 8, 12, 192])
def test_what_is_no_request_is_refused(command: int, size: int) -> None:
    with pytest.raises(ProtocolError, match="is not a request"):
        mpqemu.check_request(command, size)


@pytest.mark.parametrize("request_", [request[0] for request in REQUESTS if request[0] not in WITHOUT_REPLY])
def test_the_only_reply_is_ret_with_a_u64(request_: Command) -> None:
    mpqemu.check_reply(request_, Command.RET, 8)
    for size in (1, 4, 7, 9, 16, 192, 1000, (1 << 64) - 1):
        with pytest.raises(ProtocolError, match=f"RET with {size} bytes"):
            mpqemu.check_reply(request_, Command.RET, size)
    for command in (Command.PCI_CFGREAD, Command.DEVICE_RESET, 8, -1):
        with pytest.raises(ProtocolError, match="instead of RET"):
            mpqemu.check_reply(request_, command, 8)


def test_only_a_reset_may_be_answered_without_a_value() -> None:
    mpqemu.check_reply(Command.DEVICE_RESET, Command.RET, 0)
    for command in (Command.PCI_CFGWRITE, Command.PCI_CFGREAD, Command.BAR_WRITE, Command.BAR_READ):
        with pytest.raises(ProtocolError):
            mpqemu.check_reply(command, Command.RET, 0)


def test_frames_byte_by_byte() -> None:
    payload = mpqemu.CONFIG.pack(0x10, 0xFFFFFFFF, 4)
    assert mpqemu.request_frame(Command.PCI_CFGWRITE, payload) == bytes.fromhex(
        "02000000 00000000 0c00000000000000 10000000 ffffffff 04000000"
    )
    assert mpqemu.reply_frame(0x12345678) == bytes.fromhex(
        "01000000 00000000 0800000000000000 7856341200000000"
    )
    assert mpqemu.reply_frame(mpqemu.ERROR) == bytes.fromhex(
        "01000000 00000000 0800000000000000 ffffffffffffffff"
    )


@pytest.mark.parametrize(
    ("command", "payload", "text"),
    [
        (Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(0x3C, 5, 1), "PCI_CFGWRITE of 1 bytes at 0x3c"),
        (
            Command.BAR_READ,
            mpqemu.BAR.pack(0xFEBF0008, 0, 4, True),
            "BAR_READ of 4 bytes at memory 0xfebf0008",
        ),
        (Command.BAR_WRITE, mpqemu.BAR.pack(0xC010, 9, 2, False), "BAR_WRITE of 2 bytes at port 0xc010"),
        (Command.DEVICE_RESET, b"", "DEVICE_RESET"),
    ],
)
def test_a_request_is_described_by_what_it_accesses(command: Command, payload: bytes, text: str) -> None:
    assert mpqemu.describe_request(command, payload) == text
