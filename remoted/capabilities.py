# SPDX-License-Identifier: GPL-2.0-or-later
"""Capabilities in config space: what a class declares, and where each is put.

Those of the first 256 bytes are linked from 0x34 (PCI Local Bus 3.0, 6.7); extended ones begin at 0x100 (PCI
Express Base 3.0, 7.9.1).
"""

from __future__ import annotations

from collections.abc import Iterable

from common import pci
from common.errors import UsageError

__all__ = [
    "Capability",
    "DeviceSerialNumber",
    "ExtendedVendorSpecific",
    "PciExpress",
    "PowerManagement",
    "VendorSpecific",
    "add_capabilities",
]

PMCSR = 4
"""offset of the register with the power state, in the power management capability"""
DEVICE_CONTROL, LINK_CONTROL = 0x08, 0x10
"""offsets in the PCI Express capability"""
_EXPRESS_SIZE = 0x3C
_HEADER_SIZE, _EXTENDED_HEADER_SIZE = 2, 4
_MAX_LENGTH = 0xFF
_MAX_EXTENDED_LENGTH = 0xFFF


class Capability:
    """A structure in config space that a class declares. Its subclasses are what a device author uses."""

    __slots__: tuple[str, ...] = ()
    IS_EXTENDED = False
    """whether it lies behind the first 256 bytes"""
    IS_UNIQUE = True
    """whether a function has at most one"""

    def __repr__(self) -> str:
        """As in the class's source, with all values: errors show it, and kept state is told apart by it."""
        names = (name for kind in type(self).__mro__ for name in getattr(kind, "__slots__", ()))
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({values})"

    @property
    def cap_id(self) -> int:
        """The number that tells guests what it is."""
        raise NotImplementedError

    def body(self) -> bytes:
        """What follows the header (id and next pointer), after a reset."""
        raise NotImplementedError

    def write_mask(self) -> bytes:
        """The bits of the body that the guest can write."""
        return bytes(len(self.body()))

    @property
    def size(self) -> int:
        """Its bytes, those of the header among them."""
        return (_EXTENDED_HEADER_SIZE if self.IS_EXTENDED else _HEADER_SIZE) + len(self.body())

    def check(self) -> None:
        """Raises UsageError for a value that is not possible."""


class PowerManagement(Capability):
    """Power states D0 and D3hot (PCI Bus Power Management 1.2, 3.2), without PME.

    In D3hot the function decodes no BAR, does no DMA and signals nothing; a client's mappings of shared memory
    stay. The way back to D0 resets it, unless ``no_soft_reset`` is set: then everything is as it was before.
    """

    __slots__ = ("no_soft_reset",)

    def __init__(self, no_soft_reset: bool = False) -> None:
        self.no_soft_reset = no_soft_reset

    @property
    def cap_id(self) -> int:
        return pci.PCI_CAP_ID_PM

    def body(self) -> bytes:
        return bytes((3, 0, pci.PCI_PM_CTRL_NO_SOFT_RESET if self.no_soft_reset else 0, 0, 0, 0))

    def write_mask(self) -> bytes:
        return bytes((0, 0, pci.PCI_PM_CTRL_STATE_MASK, 0, 0, 0))

    def check(self) -> None:
        if type(self.no_soft_reset) is not bool:
            raise UsageError(f"CAPABILITIES: no_soft_reset {self.no_soft_reset!r} is neither True nor False")


class PciExpress(Capability):
    """A PCI Express endpoint with a function-level reset, on a link of one lane (PCI Express Base 3.0, 7.8).

    A function-level reset (bit 15 of Device Control) is one like every other for the device.
    """

    @property
    def cap_id(self) -> int:
        return pci.PCI_CAP_ID_EXP

    def body(self) -> bytes:
        return self._registers(
            {
                0x02: (2, 2),  # version 2, endpoint
                0x04: (4, 1 << 28 | 1 << 15),  # function-level reset, role-based errors, payload of 128
                DEVICE_CONTROL: (2, 2 << 12 | 1 << 11 | 1 << 4),  # reads of 512 bytes, no snoop, relaxed
                0x0C: (4, 1 << 22 | 1 << 4 | 1),  # ASPM optionality, one lane, 2.5 GT/s
                0x12: (2, 1 << 4 | 1),  # one lane, 2.5 GT/s
                0x24: (4, 1 << 4),  # the completion timeout can be disabled
                0x2C: (4, 1 << 1),  # 2.5 GT/s
                0x30: (2, 1),  # 2.5 GT/s
            }
        )

    def write_mask(self) -> bytes:
        return self._registers(
            {
                DEVICE_CONTROL: (2, 1 << 15 | 7 << 12 | 1 << 11 | 1 << 4 | 0xF),
                LINK_CONTROL: (2, 1 << 7 | 1 << 6 | 1 << 3 | 3),
                0x28: (2, 1 << 4),
            }
        )

    @staticmethod
    def _registers(values: dict[int, tuple[int, int]]) -> bytes:
        """The body, with values of so many bytes at offsets in the capability."""
        content = bytearray(_EXPRESS_SIZE)
        for offset, (size, value) in values.items():
            content[offset : offset + size] = value.to_bytes(size, "little")
        return bytes(content[_HEADER_SIZE:])


class _Vendor(Capability):
    """Bytes of which iohub knows only which bits the guest can write."""

    __slots__ = ("content", "writable")
    IS_UNIQUE = False
    content: bytes
    writable: bytes

    def _check_bytes(self, max_size: int) -> None:
        for name, value in (("content", self.content), ("writable", self.writable)):
            if not isinstance(value, bytes):
                raise UsageError(f"CAPABILITIES: {name} {value!r} of {type(self).__name__} is not bytes")
        if len(self.content) > max_size:
            raise UsageError(f"CAPABILITIES: {type(self).__name__} holds at most {max_size} bytes")
        if len(self.writable) > len(self.content):
            raise UsageError(f"CAPABILITIES: writable of {type(self).__name__} is longer than its content")

    def _mask(self, header_size: int) -> bytes:
        return bytes(header_size) + self.writable + bytes(len(self.content) - len(self.writable))


class VendorSpecific(_Vendor):
    """Vendor-specific capability (PCI Local Bus 3.0, appendix H): ``content`` follows its length byte.

    ``writable`` has a bit set for each bit of the content that the guest can write; it may be shorter.
    """

    __slots__ = ()

    def __init__(self, content: bytes, writable: bytes = b"") -> None:
        self.content = content
        self.writable = writable

    @property
    def cap_id(self) -> int:
        return pci.PCI_CAP_ID_VNDR

    def body(self) -> bytes:
        return bytes((_HEADER_SIZE + 1 + len(self.content),)) + self.content

    def write_mask(self) -> bytes:
        return self._mask(1)

    def check(self) -> None:
        self._check_bytes(_MAX_LENGTH - _HEADER_SIZE - 1)


class DeviceSerialNumber(Capability):
    """Device Serial Number (PCI Express Base 3.0, 7.12): an EUI-64, 64 bits. Needs PciExpress()."""

    __slots__ = ("number",)
    IS_EXTENDED = True

    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def cap_id(self) -> int:
        return pci.PCI_EXT_CAP_ID_DSN

    def body(self) -> bytes:
        return self.number.to_bytes(8, "little")

    def check(self) -> None:
        if type(self.number) is not int or not 0 <= self.number < 1 << 64:
            raise UsageError(f"CAPABILITIES: the serial number {self.number!r} is not a number of 64 bits")


class ExtendedVendorSpecific(_Vendor):
    """Vendor-specific extended capability (PCI Express Base 3.0, 7.18): ``content`` follows its two headers.

    ``vsec_id`` has 16 bits, ``revision`` 4; ``writable`` is as for VendorSpecific. Needs PciExpress().
    """

    __slots__ = ("revision", "vsec_id")
    IS_EXTENDED = True

    def __init__(self, vsec_id: int, content: bytes, revision: int = 0, writable: bytes = b"") -> None:
        self.vsec_id = vsec_id
        self.content = content
        self.revision = revision
        self.writable = writable

    @property
    def cap_id(self) -> int:
        return pci.PCI_EXT_CAP_ID_VNDR

    def body(self) -> bytes:
        length = _EXTENDED_HEADER_SIZE + 4 + len(self.content)
        return (length << 20 | self.revision << 16 | self.vsec_id).to_bytes(4, "little") + self.content

    def write_mask(self) -> bytes:
        return self._mask(4)

    def check(self) -> None:
        for name, value, bits in (("vsec_id", self.vsec_id, 16), ("revision", self.revision, 4)):
            if type(value) is not int or not 0 <= value < 1 << bits:
                raise UsageError(f"CAPABILITIES: {name} {value!r} is not a number of {bits} bits")
        self._check_bytes(_MAX_EXTENDED_LENGTH - _EXTENDED_HEADER_SIZE - 4)


def add_capabilities(capabilities: Iterable[Capability], config: bytearray, wmask: bytearray) -> list[int]:
    """Puts the capabilities into config space, in this order, and links them; returns the offset of each.

    Raises UsageError when there is no room.
    """
    offsets = []
    link, start = pci.PCI_CAPABILITY_LIST, pci.PCI_STD_HEADER_SIZE
    extended_link, extended_start = 0, pci.PCI_CONFIG_SIZE
    for capability in capabilities:
        body, mask = capability.body(), capability.write_mask()
        if capability.IS_EXTENDED:
            end = extended_start + capability.size
            _check_room(capability, end, len(config))
            header = (1 << 16 | capability.cap_id).to_bytes(_EXTENDED_HEADER_SIZE, "little")
            config[extended_start:end] = header + body
            wmask[extended_start:end] = bytes(_EXTENDED_HEADER_SIZE) + mask
            if extended_link:
                config[extended_link + 2] |= (extended_start & 0xF) << 4
                config[extended_link + 3] = extended_start >> 4
            offsets.append(extended_start)
            extended_link, extended_start = extended_start, end + -end % 4
        else:
            end = start + capability.size
            _check_room(capability, end, pci.PCI_CONFIG_SIZE)
            config[link] = start
            config[start:end] = bytes((capability.cap_id, 0)) + body
            wmask[start:end] = bytes(_HEADER_SIZE) + mask
            wmask[end : end + -end % 4] = bytes(-end % 4)
            config[pci.PCI_STATUS] |= pci.PCI_STATUS_CAP_LIST
            offsets.append(start)
            link, start = start + 1, end + -end % 4
    return offsets


def _check_room(capability: Capability, end: int, limit: int) -> None:
    if end > limit:
        name = type(capability).__name__
        raise UsageError(f"CAPABILITIES: no room for {name}, which would end at {end:#x} of config space")
