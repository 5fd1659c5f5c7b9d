# SPDX-License-Identifier: GPL-2.0-or-later
"""A vfio-user client, written from the specification alone: docs/interop/vfio-user.rst in QEMU's sources.

It shares no code with the server. Constants, layouts and checks of replies are its own, so that a mistake in the
server's wire format is not repeated here. Everything is synchronous; send_frame() sends what is malformed.

Sizes are in bytes. All integers are little-endian: the protocol has the host's order, and remoted runs on x86-64.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

# Commands
VERSION = 1
DMA_MAP = 2
DMA_UNMAP = 3
GET_INFO = 4
GET_REGION_INFO = 5
GET_REGION_IO_FDS = 6
GET_IRQ_INFO = 7
SET_IRQS = 8
REGION_READ = 9
REGION_WRITE = 10
DMA_READ = 11
DMA_WRITE = 12
RESET = 13
WRITE_MULTI = 15
FEATURE = 16
MIG_DATA_READ = 17
MIG_DATA_WRITE = 18

# Message flags
REPLY = 0x1
NO_REPLY = 0x10
ERROR = 0x20

# Device, region and interrupt flags of linux/vfio.h
DEVICE_RESET, DEVICE_PCI = 1, 2
REGION_READABLE, REGION_WRITABLE, REGION_MMAP, REGION_CAPS = 1, 2, 4, 8
SPARSE_MMAP = 1
IRQ_EVENTFD, IRQ_MASKABLE, IRQ_AUTOMASKED, IRQ_NORESIZE = 1, 2, 4, 8
DATA_NONE, DATA_BOOL, DATA_EVENTFD = 1, 2, 4
MASK, UNMASK, TRIGGER = 8, 0x10, 0x20
DMA_READABLE, DMA_WRITABLE = 1, 2

# Indexes of a PCI device
ROM_REGION, CONFIG_REGION, VGA_REGION = 6, 7, 8
INTX, MSI, MSIX, ERR, REQ = range(5)

HEADER = struct.Struct("<HHIII")
MAP = struct.Struct("<IIQQQ")
UNMAP = struct.Struct("<IIQQ")
QUAD = struct.Struct("<IIII")
REGION_INFO = struct.Struct("<IIIIQQ")
CAPABILITY = struct.Struct("<HHI")
AREAS = struct.Struct("<II")
AREA = struct.Struct("<QQ")
IRQ_SET = struct.Struct("<IIIII")
ACCESS = struct.Struct("<QII")
SINGLE_WRITE = struct.Struct("<QII8s")

MAX_FDS = 64
"""room for file descriptors with a reply: more than the protocol lets a server send"""
MAX_REPLY = 1 << 21
PATIENCE = 20.0

CAPABILITIES: Mapping[str, Any] = {
    "max_msg_fds": 16,
    "max_data_xfer_size": 1 << 20,
    "max_dma_maps": 65535,
    "pgsizes": 4096,
}


class Refused(Exception):
    """The server replied with an error; ``errno`` is its number, 0 where it gave none."""

    def __init__(self, command: int, errno: int) -> None:
        super().__init__(f"command {command}: {os.strerror(errno) if errno else 'an error without a number'}")
        self.errno = errno


class BrokenServer(Exception):
    """A message of the server breaks the specification."""


class Message(NamedTuple):
    """One message as it came; the fds belong to whoever has it."""

    id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: list[int]


class DeviceInfo(NamedTuple):
    """The reply to GET_INFO."""

    flags: int
    regions: int
    irqs: int


class RegionInfo(NamedTuple):
    """The reply to GET_REGION_INFO; ``fd`` is -1 where none came, and else the caller's to close."""

    argsz: int
    flags: int
    size: int
    offset: int
    areas: tuple[tuple[int, int], ...] | None
    """offset and size of what may be mapped; None without a capability that says so"""
    fd: int


class IrqInfo(NamedTuple):
    """The reply to GET_IRQ_INFO."""

    flags: int
    vectors: int


def frame(
    command: int,
    payload: bytes = b"",
    message_id: int = 1,
    flags: int = 0,
    size: int | None = None,
    error: int = 0,
) -> bytes:
    """A message of one's own; ``size`` is what the header says, where that isn't true."""
    length = HEADER.size + len(payload) if size is None else size
    return HEADER.pack(message_id, command, length, flags, error) + payload


class VfioUserClient:
    """One connection. A context manager, which closes it."""

    def __init__(self, sock: socket.socket, settle: Callable[[], None] | None = None) -> None:
        """Takes ownership of a connected socket.

        ``settle`` runs the server where that is in the test's own thread: it is called after each send, and what
        the server has to say must be there when it returns.
        """
        self.sock = sock
        self.capabilities: dict[str, Any] = {}
        """the server's, after version()"""
        self._settle = settle
        self._last_id = 0
        sock.settimeout(PATIENCE if settle is None else 0)

    @classmethod
    def connect(cls, path: str, settle: Callable[[], None] | None = None) -> Self:
        """A client of the device that listens at ``path``; it has yet to negotiate."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(path)
        except BaseException:
            sock.close()
            raise
        return cls(sock, settle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    # Messages

    def send_frame(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends bytes, the fds with the first of them, and lets the server handle them."""
        sent = self.sock.sendmsg([data], rights(fds))
        if sent != len(data):
            self.sock.sendall(data[sent:])
        if self._settle is not None:
            self._settle()

    def send(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> int:
        """Sends a command and returns its id."""
        self._last_id = (self._last_id + 1) & 0xFFFF
        self.send_frame(frame(command, payload, self._last_id, flags), fds)
        return self._last_id

    def receive(self) -> Message:
        """The next message. Raises EOFError at the end of the stream, and BrokenServer."""
        data, ancillary, flags, _ = self.sock.recvmsg(HEADER.size, socket.CMSG_SPACE(4 * MAX_FDS))
        fds = received_fds(ancillary)
        try:
            if not data:
                raise EOFError("the server has closed the connection")
            if flags & socket.MSG_CTRUNC:
                raise BrokenServer("a message with more file descriptors than fit")
            data += self._receive_exactly(HEADER.size - len(data))
            message_id, command, size, message_flags, error = HEADER.unpack(data)
            if not HEADER.size <= size <= MAX_REPLY:
                raise BrokenServer(f"a message of {size} bytes")
            payload = self._receive_exactly(size - HEADER.size)
        except BaseException:
            close_all(fds)
            raise
        return Message(message_id, command, message_flags, error, payload, fds)

    def receive_reply(self, command: int, message_id: int) -> Message:
        """The next message, which must be the reply to that command. Raises Refused where it is an error."""
        reply = self.receive()
        if (reply.id, reply.command, reply.flags & ~ERROR) != (message_id, command, REPLY):
            close_all(reply.fds)
            raise BrokenServer(f"not the reply to command {command}, id {message_id}: {reply}")
        if reply.flags & ERROR:
            close_all(reply.fds)
            if reply.payload or reply.fds:
                raise BrokenServer(f"an error with more than a header: {reply}")
            raise Refused(command, reply.error)
        return reply

    def call(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), reply_fds: bool = False
    ) -> Message:
        """Sends a command and returns its reply, which has fds only where that is expected. Raises Refused."""
        reply = self.receive_reply(command, self.send(command, payload, fds))
        if reply.fds and not reply_fds:
            close_all(reply.fds)
            raise BrokenServer(f"file descriptors with the reply to command {command}")
        return reply

    @property
    def has_ended(self) -> bool:
        """Whether the server has closed the connection; what it had sent before is dropped."""
        if self._settle is not None:
            self._settle()
        try:
            while True:
                close_all(self.receive().fds)
        except (EOFError, ConnectionResetError):
            return True
        except (BlockingIOError, TimeoutError):
            return False

    @property
    def most_data(self) -> int:
        """The largest count of a read or write."""
        return int(self.capabilities.get("max_data_xfer_size", 1 << 20))

    @property
    def is_silent(self) -> bool:
        """Whether nothing has come that is yet to be received."""
        if self._settle is not None:
            self._settle()
        return not select.select([self.sock], [], [], 0)[0]

    # Commands

    def version(
        self, capabilities: Mapping[str, Any] | None = CAPABILITIES, major: int = 0, minor: int = 0
    ) -> dict[str, Any]:
        """Negotiates, and returns the server's capabilities; with None it sends no version data."""
        data = b"" if capabilities is None else json.dumps({"capabilities": capabilities}).encode() + b"\0"
        reply = self.call(VERSION, struct.pack("<HH", major, minor) + data)
        theirs_major, theirs_minor = struct.unpack_from("<HH", reply.payload)
        if theirs_major != major or theirs_minor > minor:
            raise BrokenServer(f"version {theirs_major}.{theirs_minor} in reply to {major}.{minor}")
        text = reply.payload[4:]
        if not text:
            return {}
        if text[-1] or 0 in text[:-1]:
            raise BrokenServer(f"version data with a NUL elsewhere than at the end: {text!r}")
        self.capabilities = dict(json.loads(text[:-1]).get("capabilities", {}))
        return self.capabilities

    def dma_map(
        self,
        address: int,
        size: int,
        fd: int | None = None,
        offset: int = 0,
        flags: int = DMA_READABLE | DMA_WRITABLE,
    ) -> None:
        """Shows a range of memory; without an fd the server can reach it by messages only."""
        payload = MAP.pack(MAP.size, flags, offset, address, size)
        self._expect_no_payload(self.call(DMA_MAP, payload, [] if fd is None else [fd]))

    def dma_unmap(self, address: int, size: int, flags: int = 0) -> None:
        """Takes a range back."""
        payload = UNMAP.pack(UNMAP.size, flags, address, size)
        reply = self.call(DMA_UNMAP, payload)
        if reply.payload != payload:
            raise BrokenServer(f"not the entry of the request: {reply.payload.hex()}")

    def device_info(self) -> DeviceInfo:
        """What the device has."""
        argsz, *info = QUAD.unpack(self.call(GET_INFO, QUAD.pack(QUAD.size, 0, 0, 0)).payload)
        if argsz != QUAD.size:
            raise BrokenServer(f"GET_INFO with argsz {argsz}")
        return DeviceInfo(*info)

    def region_info(self, index: int, argsz: int = REGION_INFO.size) -> RegionInfo:
        """A region, with what an answer of ``argsz`` bytes can tell of it."""
        request = REGION_INFO.pack(argsz, 0, index, 0, 0, 0)
        reply = self.call(GET_REGION_INFO, request, reply_fds=True)
        try:
            return self._parse_region(index, argsz, reply)
        except BaseException:
            close_all(reply.fds)
            raise

    def whole_region_info(self, index: int) -> RegionInfo:
        """A region with its capabilities, asked for twice where it has any."""
        info = self.region_info(index)
        if info.argsz == REGION_INFO.size:
            return info
        if info.fd != -1:
            os.close(info.fd)
        return self.region_info(index, info.argsz)

    def irq_info(self, index: int) -> IrqInfo:
        """A kind of interrupt."""
        reply = self.call(GET_IRQ_INFO, QUAD.pack(QUAD.size, 0, index, 0))
        argsz, flags, echoed, count = QUAD.unpack(reply.payload)
        if (argsz, echoed) != (QUAD.size, index):
            raise BrokenServer(f"GET_IRQ_INFO {index}: argsz {argsz}, index {echoed}")
        return IrqInfo(flags, count)

    def set_irqs(
        self,
        flags: int,
        index: int,
        start: int = 0,
        count: int = 1,
        fds: Sequence[int] = (),
        data: bytes = b"",
    ) -> None:
        """Sets actions for ``count`` interrupts of a kind."""
        payload = IRQ_SET.pack(IRQ_SET.size + len(data), flags, index, start, count) + data
        self._expect_no_payload(self.call(SET_IRQS, payload, fds))

    def attach(self, index: int, start: int, fds: Sequence[int]) -> None:
        """Gives eventfds to interrupts from ``start`` on, which the server signals from then on."""
        self.set_irqs(DATA_EVENTFD | TRIGGER, index, start, len(fds), fds)

    def detach(self, index: int, start: int = 0, count: int = 1) -> None:
        """Takes the eventfds of some interrupts away."""
        self.set_irqs(DATA_EVENTFD | TRIGGER, index, start, count)

    def disable(self, index: int) -> None:
        """Disables a kind of interrupt."""
        self.set_irqs(DATA_NONE | TRIGGER, index, 0, 0)

    def mask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Masks interrupts."""
        self.set_irqs(DATA_NONE | MASK, index, start, count)

    def unmask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Unmasks interrupts."""
        self.set_irqs(DATA_NONE | UNMASK, index, start, count)

    def attach_unmask(self, fd: int) -> None:
        """Gives the eventfd by which the client unmasks INTx."""
        self.set_irqs(DATA_EVENTFD | UNMASK, INTX, 0, 1, [fd])

    def read_bytes(self, region: int, offset: int, count: int) -> bytes:
        """Bytes of a region."""
        reply = self.call(REGION_READ, ACCESS.pack(offset, region, count))
        if reply.payload[: ACCESS.size] != ACCESS.pack(offset, region, count):
            raise BrokenServer(f"the reply is to another read: {reply.payload[: ACCESS.size].hex()}")
        if len(reply.payload) != ACCESS.size + count:
            raise BrokenServer(f"{len(reply.payload) - ACCESS.size} bytes instead of {count}")
        return reply.payload[ACCESS.size :]

    def read(self, region: int, offset: int, size: int = 4) -> int:
        """A register."""
        return int.from_bytes(self.read_bytes(region, offset, size), "little")

    def write_bytes(self, region: int, offset: int, data: bytes, posted: bool = False) -> None:
        """Writes bytes to a region; ``posted`` wants no reply."""
        payload = ACCESS.pack(offset, region, len(data)) + data
        if posted:
            self.send(REGION_WRITE, payload, flags=NO_REPLY)
            return
        reply = self.call(REGION_WRITE, payload)
        if reply.payload != payload[: ACCESS.size]:
            raise BrokenServer(f"the reply is to another write: {reply.payload.hex()}")

    def write(self, region: int, offset: int, value: int, size: int = 4, posted: bool = False) -> None:
        """Writes a register."""
        self.write_bytes(region, offset, value.to_bytes(size, "little"), posted)

    def reset(self) -> None:
        """Resets the device."""
        self._expect_no_payload(self.call(RESET))

    @staticmethod
    def _expect_no_payload(reply: Message) -> None:
        if reply.payload:
            raise BrokenServer(f"a payload with the reply to command {reply.command}: {reply.payload.hex()}")

    def _receive_exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = self.sock.recv(count)
            if not part:
                raise BrokenServer("the stream ends within a message")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    @staticmethod
    def _parse_region(index: int, argsz: int, reply: Message) -> RegionInfo:
        needed, flags, echoed, cap_offset, size, offset = REGION_INFO.unpack_from(reply.payload)
        if echoed != index:
            raise BrokenServer(f"region {echoed} instead of {index}")
        is_whole = needed <= argsz
        if len(reply.payload) != (needed if is_whole else REGION_INFO.size):
            raise BrokenServer(f"{len(reply.payload)} bytes where {needed} are needed and {argsz} fit")
        if bool(flags & REGION_CAPS) != bool(cap_offset):
            raise BrokenServer(f"flags {flags:#x} with cap_offset {cap_offset}")
        if len(reply.fds) > 1 or (is_whole and bool(reply.fds) != bool(flags & REGION_MMAP)):
            raise BrokenServer(f"flags {flags:#x} with {len(reply.fds)} file descriptors")
        areas = None
        if cap_offset and is_whole:
            areas = tuple(_sparse_areas(reply.payload, cap_offset, size))
        return RegionInfo(needed, flags, size, offset, areas, reply.fds[0] if reply.fds else -1)


def _sparse_areas(payload: bytes, position: int, size: int) -> Iterator[tuple[int, int]]:
    """The areas of the capability that says what may be mapped, which must lie in order within the region."""
    seen = set()
    while position:
        if position in seen or position < REGION_INFO.size:
            raise BrokenServer("a list of capabilities that doesn't end")
        seen.add(position)
        kind, version, following = CAPABILITY.unpack_from(payload, position)
        if kind == SPARSE_MMAP:
            if version != 1:
                raise BrokenServer(f"version {version} of the sparse mmap capability")
            count, _ = AREAS.unpack_from(payload, position + CAPABILITY.size)
            end = 0
            for number in range(count):
                start, length = AREA.unpack_from(
                    payload, position + CAPABILITY.size + AREAS.size + number * AREA.size
                )
                if start < end or start + length > size or not length:
                    raise BrokenServer(f"an area of {length:#x} bytes at {start:#x}")
                end = start + length
                yield start, length
        position = following


def rights(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    """The ancillary data that sends fds."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def received_fds(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The fds that have come with ancillary data."""
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return list(fds)


def close_all(fds: Sequence[int]) -> None:
    """Closes what came with a message."""
    for fd in fds:
        os.close(fd)
