# SPDX-License-Identifier: GPL-2.0-or-later
"""Config space of a function of header type 0: values at power-on and write masks, as in QEMU's hw/pci/pci.c."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from common import pci
from common.pci import Bar, BarKind

__all__ = ["power_on_config", "write_masks"]


class Identity(Protocol):
    """The attributes of a function that its config space shows."""

    VENDOR_ID: ClassVar[int]
    DEVICE_ID: ClassVar[int]
    REVISION: ClassVar[int]
    CLASS_CODE: ClassVar[int]
    SUBSYSTEM_VENDOR_ID: ClassVar[int]
    SUBSYSTEM_ID: ClassVar[int]
    INTERRUPT_PIN: ClassVar[int]


def power_on_config(function: Identity, bars: Mapping[int, Bar], size: int) -> bytearray:
    """The ``size`` (256 or 4096) bytes after power-on, without capabilities."""
    config = bytearray(size)
    _put(config, pci.PCI_VENDOR_ID, 2, function.VENDOR_ID)
    _put(config, pci.PCI_DEVICE_ID, 2, function.DEVICE_ID)
    _put(config, pci.PCI_REVISION_ID, 4, function.CLASS_CODE << 8 | function.REVISION)
    _put(config, pci.PCI_SUBSYSTEM_VENDOR_ID, 2, function.SUBSYSTEM_VENDOR_ID)
    _put(config, pci.PCI_SUBSYSTEM_ID, 2, function.SUBSYSTEM_ID)
    config[pci.PCI_INTERRUPT_PIN] = function.INTERRUPT_PIN
    for number, bar in bars.items():
        config[pci.PCI_BASE_ADDRESS_0 + 4 * number] = pci.bar_flags(bar)
    return config


def write_masks(bars: Mapping[int, Bar], size: int) -> bytearray:
    """For each of the ``size`` bytes the bits that the guest can write, without capabilities."""
    wmask = bytearray(size)
    _put(
        wmask,
        pci.PCI_COMMAND,
        2,
        pci.PCI_COMMAND_IO
        | pci.PCI_COMMAND_MEMORY
        | pci.PCI_COMMAND_MASTER
        | pci.PCI_COMMAND_SERR
        | pci.PCI_COMMAND_INTX_DISABLE,
    )
    wmask[pci.PCI_CACHE_LINE_SIZE] = 0xFF
    wmask[pci.PCI_INTERRUPT_LINE] = 0xFF
    for offset in range(pci.PCI_STD_HEADER_SIZE, pci.PCI_CONFIG_SIZE):
        wmask[offset] = 0xFF
    for number, bar in bars.items():
        offset = pci.PCI_BASE_ADDRESS_0 + 4 * number
        _put(wmask, offset, 8 if bar.kind is BarKind.MEM64 else 4, ~(bar.size - 1))
    return wmask


def _put(buffer: bytearray, offset: int, size: int, value: int) -> None:
    buffer[offset : offset + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
