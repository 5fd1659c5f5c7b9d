# SPDX-License-Identifier: GPL-2.0-or-later
"""Registers that a class declares, so that they can be reset, saved and restored without code of its own.

A field is declared in the class and used as a plain attribute of the instance::

    class Doorbell(PciFunction):
        rings: int = register(32)

The declaration stays in the class; the value lies in the instance, so that an access costs what any attribute's
does. set_to_reset_values() must have run before the first access.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

__all__ = ["Buffer", "Register", "buffer", "fields_of", "register", "set_to_reset_values"]

_MAX_BUFFER = 1 << 16


class Register(NamedTuple):
    """An unsigned number: its width in bits, and its value after a reset."""

    bits: int
    reset: int


class Buffer(NamedTuple):
    """A bytearray of at most ``capacity`` bytes, and its content after a reset."""

    capacity: int
    reset: bytes


def register(bits: int, reset: int = 0) -> int:
    """Declares an unsigned number of 1 to 64 bits. Raises ValueError for an impossible one."""
    if not 1 <= bits <= 64 or reset < 0 or reset >> bits:
        raise ValueError(f"register({bits}, {reset:#x}): wants 1 to 64 bits, and a reset value that fits")
    return cast(int, Register(bits, reset))


def buffer(capacity: int, reset: bytes = b"") -> bytearray:
    """Declares a bytearray of at most ``capacity`` bytes, 65536 at most. Raises ValueError."""
    if not 1 <= capacity <= _MAX_BUFFER or len(reset) > capacity:
        raise ValueError(f"buffer({capacity}): wants 1 to {_MAX_BUFFER} bytes, and a reset value that fits")
    return cast(bytearray, Buffer(capacity, bytes(reset)))


def fields_of(kind: type) -> dict[str, Register | Buffer]:
    """The fields that a class and its bases declare, by name, the bases' first."""
    return dict(_fields(kind))


_known: dict[type, tuple[tuple[str, Register | Buffer], ...]] = {}
"""to look for a class's fields takes longer than to set them, and a class has many instances"""


def _fields(kind: type) -> tuple[tuple[str, Register | Buffer], ...]:
    if kind not in _known:
        _known[kind] = tuple(_declared(kind))
    return _known[kind]


def _declared(kind: type) -> Iterator[tuple[str, Register | Buffer]]:
    for base in reversed(kind.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, Register | Buffer) and getattr(kind, name) is value:
                yield name, value


def set_to_reset_values(owner: object) -> None:
    """Gives every field of an object its reset value."""
    for name, field in _fields(type(owner)):
        setattr(owner, name, field.reset if isinstance(field, Register) else bytearray(field.reset))
