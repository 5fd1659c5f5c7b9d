# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire format of vfio-user: commands, layouts, limits, validation. No I/O.

Numbers and layouts are those of QEMU's docs/interop/vfio-user.rst, version 0.0, on a little-endian host; what the
protocol shares with VFIO is in the kernel's include/uapi/linux/vfio.h.

A message is a 16-byte header (id u16, command u16, size u32 of the whole message, flags u32, errno u32) and its
payload; file descriptors ride on the message's first bytes as SCM_RIGHTS. Each request is answered by a message of
the same id and command, unless its flags say that no reply is wanted. A reply that reports an error is a header
only. The client may send further requests before it has read a reply; they are handled in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

from common.errors import ProtocolError

__all__ = [
    "DEVICE_INFO",
    "DMA_MAP",
    "DMA_UNMAP",
    "HEADER",
    "IRQ_INFO",
    "IRQ_SET",
    "MAX_DATA",
    "MAX_DMA_MAPS",
    "MAX_FDS",
    "MAX_SIZE",
    "NUM_IRQS",
    "NUM_REGIONS",
    "REGION_ACCESS",
    "REGION_INFO",
    "RULES",
    "VERSION",
    "Command",
    "DeviceFlag",
    "DmaFlag",
    "Flag",
    "IrqFlag",
    "IrqIndex",
    "IrqSetFlag",
    "RefusedError",
    "RegionFlag",
    "RegionIndex",
    "Rule",
    "UnmapFlag",
    "check_header",
    "command_name",
    "sparse_areas",
]


class Command(IntEnum):
    """The header's command; the numbers are the wire's."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Flag(IntFlag):
    """The header's flags."""

    REPLY = 1
    """of the four bits of the type; a request has none of them"""
    NO_REPLY = 0x10
    ERROR = 0x20


class DmaFlag(IntFlag):
    """Of DMA_MAP."""

    READ = 1
    WRITE = 2


class UnmapFlag(IntFlag):
    """Of DMA_UNMAP."""

    GET_DIRTY_PAGES = 1
    ALL = 2


class DeviceFlag(IntFlag):
    """Of DEVICE_GET_INFO (VFIO_DEVICE_FLAGS)."""

    RESET = 1
    PCI = 2


class RegionFlag(IntFlag):
    """Of DEVICE_GET_REGION_INFO (VFIO_REGION_INFO_FLAG)."""

    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


class RegionIndex(IntEnum):
    """The regions of a PCI device behind its six BARs (VFIO_PCI_CONFIG_REGION_INDEX and its neighbours)."""

    ROM = 6
    CONFIG = 7
    VGA = 8


class IrqIndex(IntEnum):
    """The kinds of interrupts of a PCI device (VFIO_PCI_INTX_IRQ_INDEX and following)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class IrqFlag(IntFlag):
    """Of DEVICE_GET_IRQ_INFO (VFIO_IRQ_INFO)."""

    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


class IrqSetFlag(IntFlag):
    """Of DEVICE_SET_IRQS (VFIO_IRQ_SET): one of the data's kinds, and one of the actions."""

    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    MASK = 8
    UNMASK = 16
    TRIGGER = 32


HEADER = Struct("<HHIII")
"""id, command, size of the whole message, flags, errno"""
VERSION = Struct("<HH")
"""major, minor; JSON that ends with a null byte may follow"""
DMA_MAP = Struct("<IIQQQ")
"""argsz, flags, offset in the file, guest physical address, size"""
DMA_UNMAP = Struct("<IIQQ")
"""argsz, flags, guest physical address, size"""
DEVICE_INFO = Struct("<IIII")
"""argsz, flags, number of regions, number of kinds of interrupts"""
REGION_INFO = Struct("<IIIIQQ")
"""argsz, flags, index, offset of the first capability, size, offset in the file that is mapped"""
IRQ_INFO = Struct("<IIII")
"""argsz, flags, index, count"""
IRQ_SET = Struct("<IIIII")
"""argsz, flags, index, start, count; with DATA_BOOL so many bytes follow"""
REGION_ACCESS = Struct("<QII")
"""offset, region, count; in a REGION_WRITE so many bytes follow, as they do in the reply to a REGION_READ"""
_SPARSE = Struct("<HHIII")
"""VFIO_REGION_INFO_CAP_SPARSE_MMAP: id, version, offset of the next capability, number of areas, 0"""
_SPARSE_ID, _SPARSE_VERSION = 1, 1
_AREA = Struct("<QQ")
"""offset in the region, size"""

NUM_REGIONS = RegionIndex.VGA + 1
NUM_IRQS = IrqIndex.REQ + 1

MAX_FDS = 16
"""fds in one message"""
MAX_DATA = 4096
"""bytes of one region access: it bounds for how long one request may keep all other clients waiting"""
MAX_DMA_MAPS = 16384
MAX_SIZE = HEADER.size + REGION_ACCESS.size + MAX_DATA
"""bytes of a whole request"""


class RefusedError(ProtocolError):
    """A request that is answered with an errno, after which the session goes on."""

    def __init__(self, code: int, text: str = "") -> None:
        """``text`` says what is wrong with the request; empty if a client may ask for what isn't supported."""
        super().__init__(text)
        self.code = code


class Rule(NamedTuple):
    """What a request's payload must look like; what is in it is up to the command."""

    least: int
    most: int
    max_fds: int


_ANY = MAX_SIZE - HEADER.size
RULES: dict[int, Rule] = {
    Command.VERSION: Rule(VERSION.size, _ANY, 0),
    Command.DMA_MAP: Rule(DMA_MAP.size, DMA_MAP.size, 1),
    Command.DMA_UNMAP: Rule(DMA_UNMAP.size, DMA_UNMAP.size, 0),
    # argsz may announce room for capabilities, which some clients then send as well.
    Command.DEVICE_GET_INFO: Rule(DEVICE_INFO.size, _ANY, 0),
    Command.DEVICE_GET_REGION_INFO: Rule(REGION_INFO.size, _ANY, 0),
    Command.DEVICE_GET_IRQ_INFO: Rule(IRQ_INFO.size, IRQ_INFO.size, 0),
    Command.DEVICE_SET_IRQS: Rule(IRQ_SET.size, _ANY, MAX_FDS),
    Command.REGION_READ: Rule(REGION_ACCESS.size, REGION_ACCESS.size, 0),
    Command.REGION_WRITE: Rule(REGION_ACCESS.size, _ANY, 0),
    Command.DEVICE_RESET: Rule(0, 0, 0),
}
"""by command; those that are missing are not supported"""


def command_name(command: int) -> str:
    """The command's name, or its number where it has none."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


def check_header(command: int, size: int, flags: int) -> None:
    """Checks a request's header, before anything else of the message is read.

    Raises ProtocolError for a size that is impossible or exceeds what was negotiated, and for a reply: after
    either the stream can't be trusted to be in step.
    """
    if not HEADER.size <= size <= MAX_SIZE:
        # The upper half of an mpqemu command, and padding.
        hint = ": a client of transport=mpqemu?" if command == size == 0 else ""
        text = f"{command_name(command)} of {size} bytes, {HEADER.size} to {MAX_SIZE} are possible{hint}"
        raise ProtocolError(text)
    if flags & 0xF:
        raise ProtocolError(
            f"{command_name(command)} of type {flags & 0xF}, where only requests are expected"
        )


def sparse_areas(areas: Sequence[tuple[int, int]]) -> bytes:
    """The capability that tells which parts of a region can be mapped: offset and size of each, in bytes."""
    head = _SPARSE.pack(_SPARSE_ID, _SPARSE_VERSION, 0, len(areas), 0)
    return head + b"".join(_AREA.pack(*area) for area in areas)
