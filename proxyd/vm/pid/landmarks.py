# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things are in another process's address space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from common.errors import IohubError
from proxyd.vm.pid import ptrace

__all__ = [
    "RESTORE_RT_MAX",
    "SYSCALL_RET",
    "Landmarks",
    "find_landmarks",
    "find_stack",
    "find_vdso",
    "is_restore_rt",
    "match_gadgets",
]

SYSCALL_RET = b"\x0f\x05\xc3"
_RESTORE_RT = (b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05", b"\xb8\x0f\x00\x00\x00\x0f\x05")
RESTORE_RT_MAX = len(_RESTORE_RT[0])
_CHUNK = 1 << 20
_MAX_CODE = 1 << 30
"""bytes that are looked through: a mapping can have any size"""


class Landmarks(NamedTuple):
    """Two pieces of code that every C library has; they stay until the process executes another program."""

    syscall_ret: int
    """address of ``syscall; ret``"""
    restore_rt: int
    """address of ``mov $15, %rax; syscall``, where signal handlers return to"""


def match_gadgets(code: bytes) -> tuple[int, int]:
    """Offsets of the first of each piece in ``code``, -1 where there is none."""
    found = [offset for offset in map(code.find, _RESTORE_RT) if offset >= 0]
    return code.find(SYSCALL_RET), min(found, default=-1)


def is_restore_rt(code: bytes) -> bool:
    """Whether ``code``, RESTORE_RT_MAX bytes of it, begins with that piece."""
    return code.startswith(_RESTORE_RT)


def find_landmarks(pid: int) -> Landmarks:
    """Looks through the executable mappings of a process, the dynamic linker and the libraries first.

    Raises OSError if they can't be read, IohubError if something isn't there.
    """
    syscall_ret = restore_rt = -1
    for address, code in _executable_code(pid):
        first, second = match_gadgets(code)
        syscall_ret = address + first if syscall_ret < 0 <= first else syscall_ret
        restore_rt = address + second if restore_rt < 0 <= second else restore_rt
        if syscall_ret >= 0 and restore_rt >= 0:
            return Landmarks(syscall_ret, restore_rt)
    raise IohubError(f"process {pid} has no code that makes a system call or that returns from a signal")


def find_stack(pid: int) -> range:
    """The main thread's stack with the room that it has to grow: down to the next mapping.

    Raises OSError, IohubError if there is none.
    """
    below = 0
    for fields in _mappings(pid):
        where = _range(fields)
        if fields[5:] == ["[stack]\n"]:
            return range(below, where.stop)
        below = where.stop
    raise IohubError(f"process {pid} has no main stack in its address space")


def find_vdso(pid: int) -> int | None:
    """Where the kernel's vdso is, None if the process has none. Raises OSError."""
    return next((_range(fields).start for fields in _mappings(pid) if fields[5:] == ["[vdso]\n"]), None)


def _mappings(pid: int) -> list[list[str]]:
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
        return [line.split(maxsplit=5) for line in file]


def _executable_code(pid: int) -> Iterator[tuple[int, bytes]]:
    left = _MAX_CODE
    for fields in reversed(_mappings(pid)):
        if fields[1] != "r-xp" or fields[4] == "0":
            continue  # of the others only files' are sure to be readable and to stay
        where = _range(fields)
        if len(where) > left:
            continue
        left -= len(where)
        for address in range(where.start, where.stop, _CHUNK):
            # A pattern may begin in one chunk and end in the next.
            size = min(where.stop - address, _CHUNK + RESTORE_RT_MAX - 1)
            yield address, ptrace.read_memory(pid, address, size)


def _range(fields: list[str]) -> range:
    start, stop = (int(bound, 16) for bound in fields[0].split("-"))
    return range(start, stop)
