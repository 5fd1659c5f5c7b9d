# SPDX-License-Identifier: GPL-2.0-or-later
"""Physical Region Pages: where in the guest's RAM the data of a command is (NVM Express 1.4, 4.3)."""

from __future__ import annotations

import struct

from remoted.device import DmaError, GuestMemory
from remoted.devices.nvme.nvme_h import CommandError, Status

__all__ = ["Ranges", "find_ranges", "read_data", "write_data"]

Ranges = list[tuple[int, int]]
"""addresses and sizes in bytes, in the order of the data"""

_ENTRY = 8
_PRP1, _PRP2 = 24, 32
"""bytes of the command, for the error log"""


def find_ranges(memory: GuestMemory, page: int, prp1: int, prp2: int, length: int) -> Ranges:
    """The ranges that hold ``length`` bytes of data; pages that adjoin are one range.

    ``page`` is the memory page size, CC.MPS, in bytes. The caller has bounded the length. Raises CommandError.
    """
    if prp1 & 3:
        raise CommandError(Status.PRP_OFFSET_INVALID, _PRP1)
    first = min(length, page - prp1 % page)
    rest = length - first
    if not rest:
        return [(prp1, first)]
    if rest <= page:
        if prp2 % page:
            raise CommandError(Status.PRP_OFFSET_INVALID, _PRP2)
        return [(prp1, length)] if prp2 == prp1 + first else [(prp1, first), (prp2, rest)]
    ranges = [(prp1, first)]
    for address in _read_list(memory, page, prp2, -(-rest // page)):
        size = min(rest, page)
        rest -= size
        start, before = ranges[-1]
        if start + before == address:
            ranges[-1] = start, before + size
        else:
            ranges.append((address, size))
    return ranges


def read_data(memory: GuestMemory, ranges: Ranges) -> list[bytes]:
    """A copy of the data, a part for each range. Raises CommandError."""
    try:
        return [memory.read(address, size) for address, size in ranges]
    except DmaError as error:
        raise CommandError(Status.DATA_TRANSFER_ERROR) from error


def write_data(memory: GuestMemory, ranges: Ranges, data: bytes | bytearray | memoryview) -> None:
    """Copies data to the ranges. Raises CommandError; a part of it may have been copied then."""
    view = memoryview(data)
    done = 0
    try:
        for address, size in ranges:
            memory.write(address, view[done : done + size])
            done += size
    except DmaError as error:
        raise CommandError(Status.DATA_TRANSFER_ERROR) from error


def _read_list(memory: GuestMemory, page: int, address: int, count: int) -> list[int]:
    """So many page addresses of a PRP list. The last entry of a full page points to the rest of the list."""
    if address % _ENTRY:
        raise CommandError(Status.PRP_OFFSET_INVALID, _PRP2)
    entries: list[int] = []
    while True:
        room = (page - address % page) // _ENTRY
        wanted = count - len(entries)
        taken = min(room, wanted)
        try:
            read = struct.unpack(f"<{taken}Q", memory.read(address, taken * _ENTRY))
        except DmaError as error:
            raise CommandError(Status.DATA_TRANSFER_ERROR, _PRP2) from error
        if any(entry % page for entry in read):
            raise CommandError(Status.PRP_OFFSET_INVALID, _PRP2)
        if wanted <= room:
            entries += read
            return entries
        entries += read[:-1]
        address = read[-1]
