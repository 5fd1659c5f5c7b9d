# SPDX-License-Identifier: GPL-2.0-or-later
"""The data structures of Identify (NVM Express 1.4, 5.15.2), 4096 bytes each."""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

from remoted.devices.nvme.events import MAX_REQUESTS
from remoted.devices.nvme.features import CRITICAL_TEMPERATURE, WARNING_TEMPERATURE
from remoted.devices.nvme.logs import MAX_ERRORS
from remoted.devices.nvme.nvme_h import VERSION

__all__ = [
    "FIRMWARE",
    "MAX_TRANSFER",
    "Identity",
    "active_namespaces",
    "controller",
    "descriptors",
    "namespace",
]

FIRMWARE = b"1.0     "
_MODEL = b"iohub nvme"
_MDTS = 7
MAX_TRANSFER = 4096 << _MDTS
"""bytes of data of one command at most"""
_SIZE = 4096

_CONTROLLER_IS_IO = 1
_FIRMWARE_ONE_READ_ONLY_SLOT = 0x03
_LOG_COMMAND_EFFECTS, _LOG_EXTENDED_DATA = 1 << 1, 1 << 2
_ONCS_DATASET_MANAGEMENT, _ONCS_WRITE_ZEROES, _ONCS_SELECT = 1 << 2, 1 << 3, 1 << 4
_WRITE_CACHE, _FLUSH_ALL_NAMESPACES = 1 << 0, 3 << 1
_ABORT_LIMIT = 4
_READ_ZEROS, _WRITE_ZEROES_DEALLOCATES = 0x1, 1 << 3
_NAMESPACE_WRITE_PROTECTED = 1 << 0
_UUID_DESCRIPTOR = 3


class Identity(NamedTuple):
    """What tells a controller and its namespace from others."""

    vendor: int
    subsystem_vendor: int
    serial: str
    """up to 20 characters of ASCII"""
    blocks: int
    block_size: int
    is_read_only: bool

    @property
    def uuid(self) -> bytes:
        """Of the namespace, 16 bytes: made of the serial number, a version 8 UUID (RFC 9562)."""
        digest = bytearray(hashlib.sha256(b"iohub nvme namespace 1 " + self.serial.encode()).digest()[:16])
        digest[6] = digest[6] & 0x0F | 0x80
        digest[8] = digest[8] & 0x3F | 0x80
        return bytes(digest)


def controller(identity: Identity) -> bytes:
    """The Identify Controller data structure (figure 247)."""
    data = bytearray(_SIZE)
    struct.pack_into(
        "<HH20s40s8s", data, 0, identity.vendor, identity.subsystem_vendor,
        identity.serial.encode().ljust(20), _MODEL.ljust(40), FIRMWARE,
    )  # fmt: skip
    data[77] = _MDTS
    struct.pack_into("<HI", data, 78, 1, VERSION)
    data[111] = _CONTROLLER_IS_IO
    data[258] = _ABORT_LIMIT - 1
    data[259] = MAX_REQUESTS - 1
    data[260] = _FIRMWARE_ONE_READ_ONLY_SLOT
    data[261] = _LOG_COMMAND_EFFECTS | _LOG_EXTENDED_DATA
    data[262] = MAX_ERRORS - 1
    struct.pack_into("<HH", data, 266, WARNING_TEMPERATURE, CRITICAL_TEMPERATURE)
    data[512], data[513] = 0x66, 0x44  # entries of 64 and 16 bytes
    struct.pack_into("<IH", data, 516, 1, _ONCS_DATASET_MANAGEMENT | _ONCS_WRITE_ZEROES | _ONCS_SELECT)
    data[525] = _WRITE_CACHE | _FLUSH_ALL_NAMESPACES
    uuid = identity.uuid.hex()
    name = f"nqn.2014-08.org.nvmexpress:uuid:{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:]}"
    data[768 : 768 + len(name)] = name.encode()
    struct.pack_into("<H2xII", data, 2048, 2500, 16, 4)  # power state 0: 25 W, entry and exit in microseconds
    return bytes(data)


def namespace(identity: Identity) -> bytes:
    """The Identify Namespace data structure (figure 245)."""
    data = bytearray(_SIZE)
    struct.pack_into("<QQQ", data, 0, identity.blocks, identity.blocks, identity.blocks)
    data[33] = _READ_ZEROS | _WRITE_ZEROES_DEALLOCATES
    data[99] = _NAMESPACE_WRITE_PROTECTED if identity.is_read_only else 0
    data[130] = identity.block_size.bit_length() - 1
    return bytes(data)


def active_namespaces(after: int) -> bytes:
    """The list of active namespaces whose identifier is greater (figure 246)."""
    return struct.pack("<I", 1 if after < 1 else 0).ljust(_SIZE, b"\0")


def descriptors(identity: Identity) -> bytes:
    """The identification descriptors of the namespace (figure 250)."""
    return (bytes((_UUID_DESCRIPTOR, 16, 0, 0)) + identity.uuid).ljust(_SIZE, b"\0")
