# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of a function that outlives the process: config space, interrupts, registers, reply to a request.

It lies in two banks of a memfd that the service manager keeps. After each request, timer or fd handler the whole
state is written into the inactive bank, and a single byte then makes that bank the active one. A process that is
killed within a handler leaves the state from before it, so the request is executed again. What a handler changed
and the reply to its request become valid together.

The bytes before the banks tell how far a request, or an assertion, has come. Each changes by one store, which a
kill can't divide. Behind them are slots for requests that have been taken out of the socket: see remoted.keptlink.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

from common import mpqemu
from common.errors import IohubError
from common.fields import Buffer, Register, fields_of
from remoted.function import PciFunction
from remoted.msi import VectorKind

__all__ = ["FunctionState", "StateMismatch"]

_MAGIC = b"iohub\x00\x00\x06"
_ACTIVE = len(_MAGIC) + 4
_SENT = _ACTIVE + 1
_OWES_ASSERT = _ACTIVE + 2
_IRQFDS = _ACTIVE + 3
_RAM = _ACTIVE + 4
_SLOTS = 24
_SLOT_SIZE = mpqemu.HEADER.size + mpqemu.BAR.size
"""bytes of the longest request of mpqemu that has a reply"""
_CLEARED = b"\xff" * _SLOT_SIZE
_TABLES = _SLOTS + 2 * _SLOT_SIZE
"""where the payloads of two SYNC_SYSMEMs are, each with its files' names: one in use, one stored or dropped"""
_NAME_SIZE = 32
_TABLE_SIZE = mpqemu.SYSMEM.size + mpqemu.MAX_FDS * _NAME_SIZE
_BANKS = _TABLES + 2 * _TABLE_SIZE + -2 * _TABLE_SIZE % 8


class StateMismatch(IohubError):
    """The file holds the state of another class, version or device, or none."""


def _byte(offset: int) -> Any:
    """A property for one of the bytes before the banks."""

    def get(self: FunctionState) -> int:
        return self._map[offset]

    def put(self: FunctionState, value: int) -> None:
        self._map[offset] = value & 0xFF

    return property(get, put)


class FunctionState:
    """One function's state file, mapped."""

    sent: int = _byte(_SENT)
    """serial number of the last request whose reply is in the pipe, or has left it"""
    irqfds: int = _byte(_IRQFDS)
    """serial number of the pair of eventfds in use; 0: there is none"""
    ram: int = _byte(_RAM)
    """serial number of the table of RAM regions in use; 0: there is none"""

    def __init__(self, function: PciFunction, fd: int, on_void: Callable[[str], None]) -> None:
        """Takes ownership of a memfd, and initialises it when it is empty: ``is_new`` says so.

        Raises OSError, and StateMismatch for a file with another state; the fd stays the caller's then.
        """
        self._function = function
        self._on_void = on_void
        config, vectors, _ = function.state
        self._fixed = struct.Struct(f"<{len(config)}s{len(vectors)}s?B6xQ")
        """config space, vectors, INTx level, the serial number of the last request, its reply"""
        fields = list(_fields(function))
        registers = [(name, field) for name, field in fields if isinstance(field, Register)]
        self._values = _getter([name for name, _ in registers])
        self._names = [name for name, _ in registers]
        self._registers = struct.Struct("<" + "".join(_code(field) for _, field in registers))
        self._buffers = [(attrgetter(name), field) for name, field in fields if isinstance(field, Buffer)]
        content = (
            self._fixed.size + self._registers.size + sum(4 + each.capacity for _, each in self._buffers)
        )
        self._bank_size = content + -content % 8
        size = _BANKS + 2 * self._bank_size
        head = _MAGIC + _digest(function, fields)
        self.is_new = not os.fstat(fd).st_size
        if self.is_new:
            os.ftruncate(fd, size)
        elif os.fstat(fd).st_size != size or os.pread(fd, len(head), 0) != head:
            raise StateMismatch("the state is that of another class, version or device")
        self._map = mmap.mmap(fd, size)
        self._map[: len(head)] = head
        self.owes_assert = memoryview(self._map)[_OWES_ASSERT : _OWES_ASSERT + 1]
        """see Pirq"""
        even, odd = _SLOTS, _SLOTS + _SLOT_SIZE
        self.slots = memoryview(self._map)[even:odd], memoryview(self._map)[odd:_TABLES]
        """where a request is that was taken out of the socket, by the parity of its serial number"""
        self.fd = fd
        self._is_void = False
        self.serial = 0
        """of the last request that was done, modulo 256"""
        self.reply = 0
        """the reply to it"""
        if not self.is_new:
            self.serial, self.reply = self._load_fixed()[3:]

    def close(self) -> None:
        """Unmaps and closes the file; a second call does nothing."""
        for view in (self.owes_assert, *self.slots):
            view.release()
        self._map.close()
        fd, self.fd = self.fd, -1
        if fd != -1:
            os.close(fd)

    def clear_slot(self, serial: int) -> None:
        """Marks the slot of that serial number as one without a request: no command is -1."""
        self.slots[serial & 1][:] = _CLEARED

    def commit(self) -> None:
        """Makes the function's present state valid.

        If a field holds a value that doesn't fit its declaration, ``on_void`` is called, once, and no state is
        valid any more: the next process starts from reset.
        """
        self._store(self.serial, self.reply)

    def commit_reply(self, reply: int) -> None:
        """As commit(), together with the reply to a further request."""
        self._store(self.serial + 1 & 0xFF, reply)

    def restore(self) -> bool:
        """Sets the function's fields to what is valid, and calls its resume() with the rest.

        Returns the level that was asserted.
        """
        *state, _, _ = self._load_fixed()
        offset = self._bank() + self._fixed.size
        for name, value in zip(self._names, self._registers.unpack_from(self._map, offset), strict=True):
            owner, _, attribute = name.rpartition(".")
            setattr(attrgetter(owner)(self._function) if owner else self._function, attribute, value)
        offset += self._registers.size
        for content, field in self._buffers:
            length = int.from_bytes(self._map[offset : offset + 4], "little")
            content(self._function)[:] = self._map[offset + 4 : offset + 4 + min(length, field.capacity)]
            offset += 4 + field.capacity
        return self._function.resume(*state)

    @property
    def ram_table(self) -> tuple[bytes, list[str]]:
        """The SYNC_SYSMEM payload of the regions in use, and the names of their files in the fd store."""
        if not self.ram:
            return b"", []
        start = _TABLES + (self.ram & 1) * _TABLE_SIZE
        end = start + mpqemu.SYSMEM.size
        names = (self._map[end + _NAME_SIZE * i : end + _NAME_SIZE * (i + 1)] for i in range(mpqemu.MAX_FDS))
        return self._map[start:end], [name.rstrip(b"\0").decode("ascii") for name in names if any(name)]

    def put_ram_table(self, serial: int, payload: memoryview, names: Sequence[str]) -> None:
        """Stores the payload, and the files' names, that ``ram`` will mean once it is that serial number."""
        start = _TABLES + (serial & 1) * _TABLE_SIZE
        padded = b"".join(name.encode("ascii").ljust(_NAME_SIZE, b"\0") for name in names)
        content = bytes(payload[: mpqemu.SYSMEM.size]) + padded
        self._map[start : start + _TABLE_SIZE] = content.ljust(_TABLE_SIZE, b"\0")

    def _bank(self) -> int:
        return _BANKS + (self._map[_ACTIVE] & 1) * self._bank_size

    def _load_fixed(self) -> tuple[Any, ...]:
        return self._fixed.unpack_from(self._map, self._bank())

    def _store(self, serial: int, reply: int) -> None:
        if not self._is_void:
            try:
                self._fill(serial, reply)
            except (struct.error, ValueError, TypeError, AttributeError) as error:
                self._is_void = True
                self._map[:_ACTIVE] = bytes(_ACTIVE)
                self._on_void(f"a field holds what it was not declared for: {error}")
        self.serial, self.reply = serial, reply

    def _fill(self, serial: int, reply: int) -> None:
        function, state = self._function, self._map
        bank = 1 - state[_ACTIVE]
        offset = _BANKS + bank * self._bank_size
        self._fixed.pack_into(state, offset, *function.state, serial, reply)
        offset += self._fixed.size
        self._registers.pack_into(state, offset, *self._values(function))
        offset += self._registers.size
        for content, field in self._buffers:
            data = content(function)
            length = len(data)
            if length > field.capacity:
                raise ValueError(f"a buffer for {field.capacity} bytes holds {length}")
            state[offset : offset + 4 + length] = length.to_bytes(4, "little") + data
            offset += 4 + field.capacity
        state[_ACTIVE] = bank


def _fields(function: PciFunction) -> Iterator[tuple[str, Register | Buffer]]:
    """Each field with its name as seen from the function, such as ``_uart.ier``."""
    yield from fields_of(type(function)).items()
    for part in function.PARTS:
        for name, field in fields_of(type(attrgetter(part)(function))).items():
            yield f"{part}.{name}", field


def _getter(names: list[str]) -> Callable[[PciFunction], tuple[Any, ...]]:
    """A function that gets the values of all those attributes."""
    if len(names) == 1:
        single = attrgetter(names[0])
        return lambda function: (single(function),)
    return attrgetter(*names) if names else lambda _function: ()


def _code(field: Register) -> str:
    return next(code for bits, code in ((8, "B"), (16, "H"), (32, "I"), (64, "Q")) if field.bits <= bits)


def _digest(function: PciFunction, fields: list[tuple[str, Register | Buffer]]) -> bytes:
    """Tells classes and versions apart. Not by hashlib, whose import takes 3 ms: nobody else writes the file."""
    kind = type(function)
    bars = sorted(function.bars.items())
    shown = [function.vectors(each) for each in VectorKind]
    layout = (
        function.host.name,
        kind.__module__,
        kind.__qualname__,
        bars,
        kind.MSI,
        kind.MSIX,
        kind.CAPABILITIES,
        function.config_size,
        shown,
        fields,
    )
    return zlib.crc32(repr(layout).encode()).to_bytes(4, "little")
