# SPDX-License-Identifier: GPL-2.0-or-later
"""What of a vfio-user client outlives the process besides its files: how far its requests have come, its tables.

It lies in a memfd of its own beside the function's state (remoted.state), whose serial number of the last request
says which half is valid: each request is noted in the half of its own number, and becomes valid when the
function's state names that number. There are two tables of interrupts, of which the valid half doesn't refer to
the one that is written; the table of RAM is in remoted.vfiouser.ramtable.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from common.vfiouser import HEADER, MAX_SIZE
from remoted.msi import VectorKind
from remoted.vfiouser.ramtable import TABLE_SIZE, RamTable

__all__ = ["ClientState", "IrqTable", "Request"]

_VECTORS = {VectorKind.MSI: 32, VectorKind.MSIX: 2048}
"""the most that a function can have"""
_NOTE = Struct(f"<{HEADER.size}sI????B3xQ")
_KINDS = tuple(_VECTORS)
_IRQS = Struct("<?3xII")
_VECTOR = Struct("<HHI")
"""index of the kind, vector, identity plus 1 of its eventfd"""
_COUNT = Struct("<I4x")
_CONSUMED = HEADER.size
_HALF = _NOTE.size + MAX_SIZE
_HALVES = 64
_IRQ_SIZE = _IRQS.size + _COUNT.size + sum(_VECTOR.size * count + count // 8 for count in _VECTORS.values())
_IRQ_TABLES = _HALVES + 2 * _HALF + -2 * _HALF % 8
_RAM_TABLE = _IRQ_TABLES + 2 * _IRQ_SIZE + -2 * _IRQ_SIZE % 8
_SIZE = _RAM_TABLE + TABLE_SIZE


class Request(NamedTuple):
    """A request that was done, and what is valid since."""

    header: bytes = bytes(HEADER.size)
    reply_size: int = 0
    """0 if there is none"""
    has_fds: bool = False
    """whether fds go with the reply"""
    is_divided: bool = False
    """whether it takes more than one read to take the request out of its socket"""
    is_negotiated: bool = False
    """whether the client's VERSION was accepted"""
    has_tables: bool = False
    irq_table: int = 0
    ram_change: int = 0
    """the last change of the table of RAM"""


class IrqTable(NamedTuple):
    """The eventfds, by their identity plus 1; 0: none."""

    is_masked: bool
    """whether the client has masked the INTx line"""
    trigger: int
    unmask: int
    attached: dict[VectorKind, dict[int, int]]
    masked: dict[VectorKind, set[int]]


class ClientState:
    """One client's file, mapped."""

    def __init__(self, fd: int) -> None:
        """Takes ownership of a memfd, which may be empty; OSError leaves it with the caller."""
        if os.fstat(fd).st_size != _SIZE:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, _SIZE)
        self._map = mmap.mmap(fd, _SIZE)
        os.close(fd)
        self._view = memoryview(self._map)
        self.received = self._view[: HEADER.size]
        """where the header of a request goes when that is taken out of its socket"""
        self.ram = RamTable(self._view[_RAM_TABLE:])

    @property
    def consumed(self) -> int:
        """Serial number of the last request that was taken out of its socket, modulo 256."""
        return self._map[_CONSUMED]

    @consumed.setter
    def consumed(self, serial: int) -> None:
        self._map[_CONSUMED] = serial

    def close(self) -> None:
        """Unmaps the file."""
        self.ram.close()
        self.received.release()
        self._view.release()
        self._map.close()

    def request(self, serial: int) -> Request:
        """The request of that serial number."""
        return Request._make(_NOTE.unpack_from(self._map, _half(serial)))

    def reply(self, serial: int) -> memoryview:
        """The reply to the request of that serial number."""
        start = _half(serial) + _NOTE.size
        return self._view[start : start + self.request(serial).reply_size]

    def note(self, serial: int, request: Request, reply: bytes) -> None:
        """Notes the request that is to have that serial number."""
        start = _half(serial)
        _NOTE.pack_into(self._map, start, *request)
        self._view[start + _NOTE.size : start + _NOTE.size + len(reply)] = reply

    def irqs(self, index: int) -> IrqTable:
        """One of the two tables of interrupts."""
        position = _IRQ_TABLES + index * _IRQ_SIZE
        is_masked, trigger, unmask = _IRQS.unpack_from(self._map, position)
        position += _IRQS.size
        masked = {}
        for kind, count in _VECTORS.items():
            bits = int.from_bytes(self._view[position : position + count // 8], "little")
            masked[kind] = {vector for vector in range(bits.bit_length()) if bits >> vector & 1}
            position += count // 8
        attached: dict[VectorKind, dict[int, int]] = {kind: {} for kind in _KINDS}
        for number, vector, identity in _VECTOR.iter_unpack(self._rows(position, _VECTOR)):
            attached[_KINDS[number]][vector] = identity
        return IrqTable(is_masked, trigger, unmask, attached, masked)

    def put_irqs(self, index: int, table: IrqTable) -> None:
        """Writes one of the two tables of interrupts."""
        position = _IRQ_TABLES + index * _IRQ_SIZE
        _IRQS.pack_into(self._map, position, table.is_masked, table.trigger, table.unmask)
        position += _IRQS.size
        for kind, count in _VECTORS.items():
            bits = sum(1 << vector for vector in table.masked[kind])
            self._view[position : position + count // 8] = bits.to_bytes(count // 8, "little")
            position += count // 8
        self._put_rows(
            position,
            [
                _VECTOR.pack(number, vector, identity)
                for number, kind in enumerate(_KINDS)
                for vector, identity in table.attached[kind].items()
            ],
        )

    def _rows(self, position: int, layout: Struct) -> memoryview:
        """The rows of a table, behind their number."""
        (count,) = _COUNT.unpack_from(self._map, position)
        start = position + _COUNT.size
        return self._view[start : start + count * layout.size]

    def _put_rows(self, position: int, rows: Sequence[bytes]) -> None:
        _COUNT.pack_into(self._map, position, len(rows))
        content = b"".join(rows)
        start = position + _COUNT.size
        self._view[start : start + len(content)] = content


def _half(serial: int) -> int:
    return _HALVES + (serial & 1) * _HALF
