# SPDX-License-Identifier: GPL-2.0-or-later
"""PCI configuration space: register offsets, bits, BAR kinds and addresses of functions.

Names and values are those of linux/pci_regs.h and the PCI Local Bus Specification 3.0, chapter 6.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from common.errors import UsageError
from common.text import HEX_DIGITS, consists_of

__all__ = ["Bar", "BarKind", "bar_flags", "format_devfn", "parse_devfn"]

PCI_CONFIG_SIZE = 256
PCI_CFG_SPACE_EXP_SIZE = 4096
PCI_STD_HEADER_SIZE = 64
PCI_DEVFN_MAX = 256

PCI_VENDOR_ID = 0x00
PCI_DEVICE_ID = 0x02
PCI_COMMAND = 0x04
PCI_COMMAND_IO = 0x1
PCI_COMMAND_MEMORY = 0x2
PCI_COMMAND_MASTER = 0x4
PCI_COMMAND_SERR = 0x100
PCI_COMMAND_INTX_DISABLE = 0x400
PCI_STATUS = 0x06
PCI_STATUS_INTERRUPT = 0x08
PCI_STATUS_CAP_LIST = 0x10
PCI_REVISION_ID = 0x08
PCI_CLASS_PROG = 0x09
PCI_CLASS_DEVICE = 0x0A
PCI_CACHE_LINE_SIZE = 0x0C
PCI_HEADER_TYPE = 0x0E
PCI_HEADER_TYPE_MULTIFUNCTION = 0x80
PCI_BASE_ADDRESS_0 = 0x10
PCI_BASE_ADDRESS_5 = 0x24
PCI_NUM_BARS = 6
PCI_BASE_ADDRESS_SPACE_IO = 0x1
PCI_BASE_ADDRESS_MEM_TYPE_MASK = 0x6
PCI_BASE_ADDRESS_MEM_TYPE_64 = 0x4
PCI_BASE_ADDRESS_MEM_PREFETCH = 0x8
PCI_BASE_ADDRESS_IO_MASK = 0xFFFFFFFC
PCI_BASE_ADDRESS_MEM_MASK = 0xFFFFFFF0
PCI_SUBSYSTEM_VENDOR_ID = 0x2C
PCI_SUBSYSTEM_ID = 0x2E
PCI_ROM_ADDRESS = 0x30
PCI_ROM_ADDRESS_ENABLE = 0x1
PCI_ROM_ADDRESS_MASK = 0xFFFFF800
PCI_CAPABILITY_LIST = 0x34
PCI_INTERRUPT_LINE = 0x3C
PCI_INTERRUPT_PIN = 0x3D
PCI_CAP_ID_PM = 0x01
PCI_PM_CTRL_STATE_MASK = 0x3
PCI_PM_CTRL_NO_SOFT_RESET = 0x8
PCI_CAP_ID_MSI = 0x05
PCI_CAP_ID_VNDR = 0x09
PCI_CAP_ID_EXP = 0x10
PCI_CAP_ID_MSIX = 0x11
PCI_EXT_CAP_ID_DSN = 0x03
PCI_EXT_CAP_ID_VNDR = 0x0B

_FUNCTIONS = frozenset("01234567")


class BarKind(Enum):
    """What a base address register decodes."""

    IO = "io"
    MEM32 = "mem32"
    MEM64 = "mem64"


class Bar(NamedTuple):
    """A base address register: its kind, its size in bytes (a power of two), and the prefetchable bit.

    ``shared`` makes it shared memory that the guest may map: all of it (True), or areas of it as (offset, size),
    which are whole pages of 4096 bytes. Its registers are in the rest.
    """

    kind: BarKind
    size: int
    prefetchable: bool = False
    shared: bool | tuple[tuple[int, int], ...] = False

    @property
    def shared_areas(self) -> tuple[tuple[int, int], ...]:
        """The areas of shared memory, in order of offset."""
        if isinstance(self.shared, tuple):
            return tuple(sorted(self.shared))
        return ((0, self.size),) if self.shared else ()


def bar_flags(bar: Bar) -> int:
    """The read-only low bits of the register (PCI 3.0, 6.2.5.1)."""
    if bar.kind is BarKind.IO:
        return PCI_BASE_ADDRESS_SPACE_IO
    flags = PCI_BASE_ADDRESS_MEM_TYPE_64 if bar.kind is BarKind.MEM64 else 0
    return flags | (PCI_BASE_ADDRESS_MEM_PREFETCH if bar.prefetchable else 0)


def parse_devfn(text: str) -> int:
    """The devfn, 0 to 255, of an address like QEMU's ``addr=``: ``05.0``, ``5`` or ``1f.7`` (hexadecimal).

    Raises UsageError.
    """
    slot, dot, function = text.partition(".")
    is_slot = consists_of(slot, HEX_DIGITS, 2) and int(slot, 16) <= 0x1F
    if not is_slot or (dot and not consists_of(function, _FUNCTIONS, 1)):
        raise UsageError(
            f"bad address {text!r}: expected SLOT or SLOT.FN such as 05.0, slot 00 to 1f, function 0 to 7"
        )
    return int(slot, 16) << 3 | int(function or "0")


def format_devfn(devfn: int) -> str:
    """``05.0`` for devfn 40."""
    return f"{devfn >> 3:02x}.{devfn & 7}"
