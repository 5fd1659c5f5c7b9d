# SPDX-License-Identifier: GPL-2.0-or-later
"""A vfio-user client of a RemoteBench's device, at the level of messages."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple, Self

from common.vfiouser import (
    DMA_MAP,
    DMA_UNMAP,
    HEADER,
    IRQ_SET,
    REGION_ACCESS,
    VERSION,
    Command,
    Flag,
    IrqSetFlag,
    RegionIndex,
)
from tests.support.fds import send_fds
from tests.support.remotebench import RemoteBench

TRIGGER = int(IrqSetFlag.DATA_EVENTFD | IrqSetFlag.TRIGGER)
UNMASK_BY = int(IrqSetFlag.DATA_EVENTFD | IrqSetFlag.UNMASK)
MASK, UNMASK = int(IrqSetFlag.DATA_NONE | IrqSetFlag.MASK), int(IrqSetFlag.DATA_NONE | IrqSetFlag.UNMASK)
DISABLE = int(IrqSetFlag.DATA_NONE | IrqSetFlag.TRIGGER)


class Reply(NamedTuple):
    """One reply: its errno, 0 for success, and its payload."""

    error: int
    payload: bytes


class VfioUserPeer:
    """A client. Context manager: closes its socket."""

    def __init__(self, bench: RemoteBench, name: str, *, version: bool = True) -> None:
        self.bench = bench
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(bench.path(name))
        self.sock.setblocking(False)
        self._id = 0
        bench.settle()
        if version:
            assert self.call(Command.VERSION, VERSION.pack(0, 0) + b"{}\0").error == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()
        self.bench.settle()

    def send(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> int:
        """Queues a request. Returns its id."""
        self._id = self._id + 1 & 0xFFFF
        send_fds(
            self.sock, HEADER.pack(self._id, command, HEADER.size + len(payload), flags, 0) + payload, fds
        )
        return self._id

    def receive(self, message: int, command: int) -> Reply:
        """The reply that has arrived."""
        data = self.sock.recv(1 << 16)
        if not data:
            raise EOFError
        got, got_command, size, flags, error = HEADER.unpack_from(data)
        assert (got, got_command, size) == (message, command, len(data))
        assert flags == (Flag.REPLY | Flag.ERROR if error else Flag.REPLY)
        return Reply(error, data[HEADER.size :])

    def call(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Reply:
        """A whole round trip."""
        message = self.send(command, payload, fds)
        self.bench.settle()
        return self.receive(message, command)

    def has_ended(self) -> bool:
        self.bench.settle()
        try:
            return not self.sock.recv(1 << 16)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def read(self, region: int, offset: int, count: int) -> Reply:
        reply = self.call(Command.REGION_READ, REGION_ACCESS.pack(offset, region, count))
        return Reply(reply.error, reply.payload[REGION_ACCESS.size :])

    def post(self, region: int, offset: int, data: bytes) -> None:
        """Queues a posted write."""
        payload = REGION_ACCESS.pack(offset, region, len(data)) + data
        self.send(Command.REGION_WRITE, payload, flags=int(Flag.NO_REPLY))

    def write(self, region: int, offset: int, data: bytes) -> Reply:
        return self.call(Command.REGION_WRITE, REGION_ACCESS.pack(offset, region, len(data)) + data)

    def set_command(self, value: int) -> None:
        """Writes the command register."""
        assert self.write(RegionIndex.CONFIG, 4, value.to_bytes(2, "little")).error == 0

    def set_irqs(
        self,
        flags: int,
        index: int = 0,
        start: int = 0,
        count: int = 1,
        data: bytes = b"",
        fds: Sequence[int] = (),
    ) -> int:
        """Returns the errno."""
        payload = IRQ_SET.pack(IRQ_SET.size, flags, index, start, count) + data
        return self.call(Command.DEVICE_SET_IRQS, payload, fds).error

    def map(self, address: int, size: int, fd: int = -1, offset: int = 0, flags: int = 3) -> int:
        """Returns the errno."""
        payload = DMA_MAP.pack(DMA_MAP.size, flags, offset, address, size)
        return self.call(Command.DMA_MAP, payload, () if fd == -1 else (fd,)).error

    def unmap(self, address: int, size: int, flags: int = 0) -> Reply:
        return self.call(Command.DMA_UNMAP, DMA_UNMAP.pack(DMA_UNMAP.size, flags, address, size))


def signals(eventfd: int) -> int:
    """How often it was signalled since the last look."""
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0
