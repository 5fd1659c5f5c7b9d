# SPDX-License-Identifier: GPL-2.0-or-later
"""Loading a flat guest image by the address fields of its multiboot header.

Multiboot Specification 0.6.96, sections 3.1.1 and 3.1.3; QEMU's ``-kernel`` loads the same images.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from common.errors import UsageError

__all__ = ["Image", "parse_image"]

_MAGIC = 0x1BADB002
_HAS_ADDRESSES = 1 << 16
_HEADER = struct.Struct("<3I5I")
_SEARCHED = 8192


class Image(NamedTuple):
    """What to copy where, and where to start."""

    data: bytes
    load_address: int
    memory_end: int
    """first guest-physical address that the image doesn't use"""
    entry: int


def parse_image(file: bytes, name: str) -> Image:
    """Finds the header in the file's first 8 KiB. Raises UsageError without one that carries addresses."""
    for offset in range(0, min(len(file), _SEARCHED) - _HEADER.size + 1, 4):
        magic, flags, checksum, header, load, load_end, memory_end, entry = _HEADER.unpack_from(file, offset)
        if magic == _MAGIC and (magic + flags + checksum) & 0xFFFFFFFF == 0 and flags & _HAS_ADDRESSES:
            start = offset - (header - load)
            end = start + load_end - load
            if 0 <= start <= end <= len(file) and load <= entry < memory_end and load_end <= memory_end:
                return Image(file[start:end], load, memory_end, entry)
    raise UsageError(f"{name} is not a multiboot image with load addresses")
