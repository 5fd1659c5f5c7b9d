# SPDX-License-Identifier: GPL-2.0-or-later
"""Config space of a function of header type 0: its bytes, what the guest can write, capabilities, power states.

Values at power-on and write masks are those of QEMU's hw/pci/pci.c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from common import pci
from common.pci import Bar, BarKind
from remoted.capabilities import (
    DEVICE_CONTROL,
    LINK_CONTROL,
    PMCSR,
    Capability,
    PciExpress,
    PowerManagement,
    add_capabilities,
)

__all__ = ["ConfigSpace"]

_BARS_END = pci.PCI_BASE_ADDRESS_0 + 4 * pci.PCI_NUM_BARS
_RESET_SPANS = (
    (pci.PCI_COMMAND, 2),
    (pci.PCI_CACHE_LINE_SIZE, 1),
    (pci.PCI_BASE_ADDRESS_0, 4 * pci.PCI_NUM_BARS),
    (pci.PCI_INTERRUPT_LINE, 1),
)
"""offsets and lengths, in the header, of what a reset sets to power-on values"""
_D0, _D3HOT = 0, 3
_FLR = 0x80
"""Initiate Function Level Reset, in the upper byte of Device Control"""


class Identity(Protocol):
    """The attributes of a function that its config space shows."""

    VENDOR_ID: ClassVar[int]
    DEVICE_ID: ClassVar[int]
    REVISION: ClassVar[int]
    CLASS_CODE: ClassVar[int]
    SUBSYSTEM_VENDOR_ID: ClassVar[int]
    SUBSYSTEM_ID: ClassVar[int]
    INTERRUPT_PIN: ClassVar[int]


class ConfigSpace:
    """The 256 or 4096 bytes, and what the power and reset bits in them ask for."""

    def __init__(
        self, function: Identity, bars: Mapping[int, Bar], capabilities: Sequence[Capability]
    ) -> None:
        """It has 4096 bytes if one of the capabilities is extended. Raises UsageError when they don't fit."""
        is_extended = any(each.IS_EXTENDED for each in capabilities)
        size = pci.PCI_CFG_SPACE_EXP_SIZE if is_extended else pci.PCI_CONFIG_SIZE
        self.data = bytearray(size)
        self.wmask = bytearray(size)
        """for each byte the bits that the guest can write"""
        self._put_header(function, bars)
        offsets = add_capabilities(capabilities, self.data, self.wmask)
        self._places = tuple(zip(capabilities, offsets, strict=True))
        self._power_on = bytes(self.data)
        ends = (offset + each.size for each, offset in self._places if not each.IS_EXTENDED)
        self.watched_end = max((_BARS_END, *ends))
        """behind the last byte that has an effect on the function"""
        self._reset_spans = (*_RESET_SPANS, *((offset, each.size) for each, offset in self._places))
        self._power_state = _D0
        self._pmcsr = self._express = 0
        """offsets; 0: there is none"""
        self._keeps_state = False
        self._kept_link_control: bytes | None = None
        for each, offset in self._places:
            if isinstance(each, PowerManagement):
                self._pmcsr, self._keeps_state = offset + PMCSR, each.no_soft_reset
            elif isinstance(each, PciExpress):
                self._express = offset

    def offset_of(self, capability: Capability) -> int:
        """Where a capability is. Raises LookupError for one that is not shown."""
        for each, offset in self._places:
            if each is capability:
                return offset
        raise LookupError(f"config space does not show {capability!r}")

    @property
    def is_awake(self) -> bool:
        """Whether the function is in D0."""
        return self._power_state == _D0

    @property
    def is_bus_master(self) -> bool:
        """Whether the function may send memory writes: DMA and messages."""
        return self.is_awake and bool(self.data[pci.PCI_COMMAND] & pci.PCI_COMMAND_MASTER)

    def settle(self) -> bool:
        """Lets what was written take effect on the power state; True when the function is to be reset.

        A power state that there isn't is not taken (PCI Bus Power Management 1.2, 3.2.4).
        """
        data, pmcsr = self.data, self._pmcsr
        if self._express and data[self._express + DEVICE_CONTROL + 1] & _FLR:
            link_control = self._express + LINK_CONTROL
            self._kept_link_control = bytes(data[link_control : link_control + 2])
            return True
        if pmcsr:
            before, state = self._power_state, data[pmcsr] & pci.PCI_PM_CTRL_STATE_MASK
            if state not in (_D0, _D3HOT):
                data[pmcsr] = data[pmcsr] & ~pci.PCI_PM_CTRL_STATE_MASK | before
            elif state != before:
                self._power_state = state
                return state == _D0 and not self._keeps_state
        return False

    def reset(self) -> None:
        """Sets what the guest can write to power-on values.

        Device-specific bytes from 0x40 on are left alone, as in QEMU; and the settings of the link by a
        function-level reset (PCI Express Base 3.0, 6.6.2).
        """
        data, wmask, power_on = self.data, self.wmask, self._power_on
        for start, length in self._reset_spans:
            for offset in range(start, start + length):
                data[offset] = data[offset] & ~wmask[offset] | power_on[offset] & wmask[offset]
        if self._kept_link_control is not None:
            link_control = self._express + LINK_CONTROL
            data[link_control : link_control + 2] = self._kept_link_control
            self._kept_link_control = None
        self._power_state = _D0

    def resume(self, data: bytes) -> None:
        """Takes the bytes of the previous process."""
        self.data[:] = data
        if self._pmcsr:
            self._power_state = self.data[self._pmcsr] & pci.PCI_PM_CTRL_STATE_MASK

    def _put_header(self, function: Identity, bars: Mapping[int, Bar]) -> None:
        data, wmask = self.data, self.wmask
        _put(data, pci.PCI_VENDOR_ID, 2, function.VENDOR_ID)
        _put(data, pci.PCI_DEVICE_ID, 2, function.DEVICE_ID)
        _put(data, pci.PCI_REVISION_ID, 4, function.CLASS_CODE << 8 | function.REVISION)
        _put(data, pci.PCI_SUBSYSTEM_VENDOR_ID, 2, function.SUBSYSTEM_VENDOR_ID)
        _put(data, pci.PCI_SUBSYSTEM_ID, 2, function.SUBSYSTEM_ID)
        data[pci.PCI_INTERRUPT_PIN] = function.INTERRUPT_PIN
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
            data[offset] = pci.bar_flags(bar)
            _put(wmask, offset, 8 if bar.kind is BarKind.MEM64 else 4, ~(bar.size - 1))


def _put(buffer: bytearray, offset: int, size: int, value: int) -> None:
    buffer[offset : offset + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
