# SPDX-License-Identifier: GPL-2.0-or-later
"""A remote function's config space over its link: what it is, and the registers that a guest programs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from common import mpqemu, pci
from common.errors import ProtocolError
from common.mpqemu import Command
from proxyd.pci.bars import DecodedBar, size_bars

__all__ = ["Identity", "identify", "read_registers", "write_registers"]

Request = Callable[[Command, bytes], int]
"""a round trip over the link, as Client.request()"""

_PROGRAMMED = (
    (pci.PCI_CACHE_LINE_SIZE, 1),
    (pci.PCI_INTERRUPT_LINE, 1),
    *((offset, 4) for offset in range(pci.PCI_BASE_ADDRESS_0, pci.PCI_BASE_ADDRESS_5 + 4, 4)),
    (pci.PCI_ROM_ADDRESS, 4),
    (pci.PCI_COMMAND, 2),
)
"""Offset and size of what a guest programs and a restarted remote has lost. The command register is the last one,
since it enables decoding."""


class Identity(NamedTuple):
    """What makes a function the same one after a reconnect."""

    vendor: int
    device: int
    class_code: int
    pin: int
    """interrupt pin register: 1 to 4 for INTA to INTD, 0 for none"""
    bars: tuple[DecodedBar, ...]


def identify(request: Request) -> Identity:
    """Reads what the function is, and sizes its BARs.

    Raises PeerGone, and ProtocolError for what can't be a PCI function.
    """
    vendor_device = _config_read(request, pci.PCI_VENDOR_ID, 4)
    if vendor_device & 0xFFFF in (0xFFFF, 0):
        raise ProtocolError(f"no PCI function: vendor and device id {vendor_device:#x}")
    pin = _config_read(request, pci.PCI_INTERRUPT_PIN, 1)
    if pin > 4:
        raise ProtocolError(f"invalid interrupt pin {pin}")
    class_code = _config_read(request, pci.PCI_REVISION_ID, 4) >> 8
    bars = size_bars(partial(_config_read, request), partial(_config_write, request))
    return Identity(vendor_device & 0xFFFF, vendor_device >> 16, class_code, pin, tuple(bars))


def read_registers(request: Request) -> bytearray:
    """A copy of config space that holds the registers that a guest programs; the rest of it is 0.

    Raises PeerGone and ProtocolError.
    """
    registers = bytearray(pci.PCI_CONFIG_SIZE)
    for offset, size in _PROGRAMMED:
        registers[offset : offset + size] = _config_read(request, offset, size).to_bytes(size, "little")
    return registers


def write_registers(request: Request, registers: bytearray) -> None:
    """Gives the function the registers that a guest had programmed. Raises PeerGone and ProtocolError."""
    for offset, size in _PROGRAMMED:
        _config_write(request, offset, size, int.from_bytes(registers[offset : offset + size], "little"))


def _config_read(request: Request, offset: int, size: int) -> int:
    value = request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(offset, 0, size))
    return value & ((1 << 8 * size) - 1)


def _config_write(request: Request, offset: int, size: int, value: int) -> None:
    request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(offset, value, size))
