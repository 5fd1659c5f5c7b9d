# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire format of QEMU's multi-process link: commands, layouts, limits, validation. No I/O.

A frame is a 16-byte header (command i32, 4 bytes of padding, payload size u64, host byte order) and its
payload; file descriptors ride on the header's bytes as SCM_RIGHTS. There are no message ids: one request is
outstanding at a time and is answered in order. Numbers and layouts are those of QEMU's
include/hw/remote/mpqemu-link.h as merged in 6.0, on a little-endian host.

Two commands have no reply (SYNC_SYSMEM and SET_IRQFD); every other one is answered by RET with a u64, all
ones meaning an error. BAR accesses carry absolute bus addresses: the device side finds the BAR by the
addresses that config writes have programmed.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from common.errors import ProtocolError

__all__ = [
    "BAR",
    "CONFIG",
    "ERROR",
    "HEADER",
    "MAX_FDS",
    "MAX_PAYLOAD",
    "RET",
    "RULES",
    "SYSMEM",
    "Command",
    "Rule",
    "check_reply",
    "check_request",
    "command_name",
    "describe_request",
    "reply_frame",
    "request_frame",
]


class Command(IntEnum):
    """MPQemuCmd of the header; the numbers are the wire's."""

    SYNC_SYSMEM = 0
    RET = 1
    PCI_CFGWRITE = 2
    PCI_CFGREAD = 3
    BAR_WRITE = 4
    BAR_READ = 5
    SET_IRQFD = 6
    DEVICE_RESET = 7


HEADER = Struct("<i4xQ")
"""command i32, payload size u64"""
CONFIG = Struct("<IIi")
"""addr u32, value u32, length i32"""
BAR = Struct("<QQI?3x")
"""absolute bus address u64, value u64, size u32, memory (else I/O) bool"""
RET = Struct("<Q")
"""value u64"""
SYSMEM = Struct("<8Q8Q8q")
"""guest physical addresses u64[8], sizes u64[8], file offsets i64[8]; one entry per fd is used"""

MAX_FDS = 8
"""fds in one message (QEMU's REMOTE_MAX_FDS)"""
MAX_PAYLOAD = SYSMEM.size
ERROR = (1 << 64) - 1
"""the value of a RET that reports an error"""


class Rule(NamedTuple):
    """What a request must look like."""

    size: int
    max_fds: int


RULES: dict[int, Rule] = {
    Command.SYNC_SYSMEM: Rule(SYSMEM.size, MAX_FDS),
    Command.PCI_CFGWRITE: Rule(CONFIG.size, 0),
    Command.PCI_CFGREAD: Rule(CONFIG.size, 0),
    Command.BAR_WRITE: Rule(BAR.size, 0),
    Command.BAR_READ: Rule(BAR.size, 0),
    Command.SET_IRQFD: Rule(0, 2),
    Command.DEVICE_RESET: Rule(0, 0),
}


def command_name(command: int) -> str:
    """The command's name, or its number where it has none."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


def describe_request(command: Command, payload: bytes) -> str:
    """What a request of ours accesses, such as ``BAR_READ of 4 bytes at memory 0xfebf0008``."""
    if command in (Command.PCI_CFGREAD, Command.PCI_CFGWRITE):
        addr, _, size = CONFIG.unpack(payload)
        return f"{command.name} of {size} bytes at {addr:#x}"
    if command in (Command.BAR_READ, Command.BAR_WRITE):
        addr, _, size, memory = BAR.unpack(payload)
        return f"{command.name} of {size} bytes at {'memory' if memory else 'port'} {addr:#x}"
    return command.name


def check_request(command: int, size: int) -> Rule:
    """The rule of a request's header, before anything of its payload is read.

    Raises ProtocolError for a command that is not a request and for a size that is not exactly the command's:
    after either the stream can't be trusted to be in step.
    """
    rule = RULES.get(command)
    if rule is None:
        # The first 4 bytes of a VERSION of vfio-user: any id, and 1.
        hint = ": a client of transport=vfio-user?" if command >> 16 == 1 else ""
        raise ProtocolError(f"{command_name(command)} is not a request{hint}")
    if size != rule.size:
        raise ProtocolError(f"{command_name(command)} with {size} bytes of payload instead of {rule.size}")
    return rule


def check_reply(request: int, command: int, size: int) -> None:
    """Checks a reply's header: RET with 8 bytes, or, to DEVICE_RESET, with none as the stock remote sends it.

    Raises ProtocolError otherwise.
    """
    if command != Command.RET:
        raise ProtocolError(f"{command_name(command)} instead of RET to {command_name(request)}")
    if size != RET.size and not (size == 0 and request == Command.DEVICE_RESET):
        raise ProtocolError(f"RET with {size} bytes of payload to {command_name(request)}")


def request_frame(command: Command, payload: bytes = b"") -> bytes:
    """Header and payload of one message."""
    return HEADER.pack(command, len(payload)) + payload


def reply_frame(value: int) -> bytes:
    """A RET frame with a u64."""
    return HEADER.pack(Command.RET, RET.size) + RET.pack(value)
