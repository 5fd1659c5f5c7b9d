# SPDX-License-Identifier: GPL-2.0-or-later
"""Mutated vfio-user messages, the same ones for the same seed, and a client that checks each reply to them."""

from __future__ import annotations

import itertools
import os
import select
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from random import Random
from typing import NamedTuple, Self

from tests.support import vfiouserclient as vfu
from tests.support import vfiouserdevice as device
from tests.support.vfiouserprocess import Event, memory

_TEMPLATES: tuple[tuple[int, bytes, int], ...] = (
    (vfu.DMA_MAP, vfu.MAP.pack(32, 3, 0, 0, 1 << 20), 1),
    (vfu.DMA_MAP, vfu.MAP.pack(32, 1, 4096, 1 << 30, 1 << 16), 1),
    (vfu.DMA_MAP, vfu.MAP.pack(32, 3, 0, 1 << 31, 1 << 16), 0),
    (vfu.DMA_UNMAP, vfu.UNMAP.pack(24, 0, 0, 1 << 20), 0),
    (vfu.DMA_UNMAP, vfu.UNMAP.pack(24, 0, 1 << 30, 1 << 16), 0),
    (vfu.DMA_UNMAP, vfu.UNMAP.pack(24, 2, 0, 0), 0),
    (vfu.GET_INFO, vfu.QUAD.pack(16, 0, 0, 0), 0),
    *(
        (vfu.GET_REGION_INFO, vfu.REGION_INFO.pack(argsz, 0, index, 0, 0, 0), 0)
        for argsz, index in itertools.product((32, 64), (0, 2, 7))
    ),
    (vfu.GET_REGION_IO_FDS, vfu.QUAD.pack(16, 0, 0, 0), 0),
    *((vfu.GET_IRQ_INFO, vfu.QUAD.pack(16, 0, index, 0), 0) for index in range(3)),
    (vfu.SET_IRQS, vfu.IRQ_SET.pack(20, 0x24, 0, 0, 1), 1),
    (vfu.SET_IRQS, vfu.IRQ_SET.pack(20, 0x14, 0, 0, 1), 1),
    (vfu.SET_IRQS, vfu.IRQ_SET.pack(20, 0x24, 2, 1, 3), 3),
    (vfu.SET_IRQS, vfu.IRQ_SET.pack(20, 0x24, 1, 0, 2), 2),
    (vfu.SET_IRQS, vfu.IRQ_SET.pack(23, 0x0A, 2, 4, 3) + b"\1\0\1", 0),
    *((vfu.SET_IRQS, vfu.IRQ_SET.pack(20, flags, 0, 0, 1), 0) for flags in (0x09, 0x11, 0x21, 0x24)),
    (vfu.SET_IRQS, vfu.IRQ_SET.pack(20, 0x21, 2, 0, 0), 0),
    *(
        (vfu.REGION_READ, vfu.ACCESS.pack(offset, region, 4), 0)
        for region, offset in itertools.product((0, 1, 2, 7), (0, 4, 0x1C))
    ),
    (vfu.REGION_READ, vfu.ACCESS.pack(0, 7, 256), 0),
    (vfu.REGION_READ, vfu.ACCESS.pack(device.SHARED[0], 2, 2048), 0),
    *(
        (vfu.REGION_WRITE, vfu.ACCESS.pack(offset, region, 4) + b"\1\0\0\0", 0)
        for region, offset in itertools.product((0, 2, 7), (0, 4, 8, 0x18))
    ),
    (vfu.REGION_WRITE, vfu.ACCESS.pack(4, 7, 2) + b"\7\0", 0),
    (vfu.REGION_WRITE, vfu.ACCESS.pack(device.DMA_ADDRESS, 0, 8) + b"\0\0\1\0\0\0\0\0", 0),
    (vfu.RESET, b"", 0),
    (vfu.WRITE_MULTI, b"\1" + bytes(7) + vfu.SINGLE_WRITE.pack(0, 0, 4, bytes(8)), 0),
    (vfu.FEATURE, b"\x10\0\0\0\1\0\1\0" + bytes(8), 0),
    (vfu.MIG_DATA_READ, b"\x08\0\0\0\0\1\0\0", 0),
)
"""command, payload, and the number of fds"""
_NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 20, 0x21, 0x24, 0x40, 0xFF, 0x100, 0x1000, 0x1001, 0xFFFF),
    *(1 << 20, (1 << 20) + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFE, 0xFFFFFFFF),
)
_MOST_FDS = 16
_WILD = 0.01
"""the share of messages that put the stream out of step, or may end the session for another reason"""


class Mutant(NamedTuple):
    """A message that is to be sent."""

    data: bytes
    fds: list[int]
    reply: tuple[int, int] | None
    """the id and the command of the reply that it must get"""
    is_wild: bool
    """whether what comes after it in the stream can't be foretold"""


class Mutants:
    """Draws messages. A context manager, which closes the fds that it sends with some."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._stack = ExitStack()
        self._events = [self._stack.enter_context(Event()).fd for _ in range(8)]
        self._memory = [self._stack.enter_context(memory(1 << 20)) for _ in range(2)]
        others = [os.open(os.devnull, os.O_RDWR), os.eventfd(0, os.EFD_SEMAPHORE), os.open("/", os.O_RDONLY)]
        for fd in others:
            self._stack.callback(os.close, fd)
        self._others = others

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def draw(self) -> Mutant:
        """The next message."""
        random = self._random
        command, payload, fd_count = random.choice(_TEMPLATES)
        message_id = random.getrandbits(16)
        flags = vfu.NO_REPLY if random.random() < 0.1 else 0
        for _ in range(random.choice((0, 0, 1, 1, 1, 2, 3))):
            payload = self._mutated(payload)
        if random.random() < 0.02:
            command = random.choice((0, 11, 12, 14, 19, random.getrandbits(16)))
        if random.random() < 0.05:
            fd_count = random.randrange(_MOST_FDS + 1)
        size = None
        is_wild = command == vfu.VERSION
        if random.random() < _WILD:
            is_wild = True
            if random.random() < 0.5:
                size = random.choice((*_NUMBERS, len(payload) + 15, len(payload) + 17))
            else:
                flags = random.getrandbits(32)
        data = vfu.frame(command, payload, message_id, flags, size, random.choice((0, 0, 0, 5)))
        reply = None if flags & vfu.NO_REPLY or is_wild else (message_id, command)
        return Mutant(data, self._fds(command, fd_count), reply, is_wild)

    def _fds(self, command: int, count: int) -> list[int]:
        random = self._random
        fitting = self._memory if command == vfu.DMA_MAP else self._events
        anything = [*self._events, *self._memory, *self._others]
        return [random.choice(fitting if random.random() < 0.9 else anything) for _ in range(count)]

    def _mutated(self, payload: bytes) -> bytes:
        random = self._random
        mutated = bytearray(payload)
        kind = random.randrange(5)
        if kind == 0:
            return bytes(mutated[: random.randrange(len(mutated) + 1)])
        if kind == 1:
            return bytes(mutated) + random.randbytes(random.choice((1, 4, 8, 100)))
        if len(mutated) < 4:
            return bytes(mutated)
        at = random.randrange(0, len(mutated) - 3, 4)
        if kind == 2:
            mutated[at + random.randrange(4)] ^= 1 << random.randrange(8)
        elif kind == 3:
            mutated[at : at + 4] = random.choice(_NUMBERS).to_bytes(4, "little")
        else:
            mutated[at : at + 4] = random.randbytes(4)
        return bytes(mutated)


class Stream:
    """What comes back from a server, as heads of messages; whatever fds come with it are closed at once."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.heads: deque[tuple[int, int]] = deque()
        """id and command of each reply"""
        self.has_ended = False
        self._sock = sock
        self._rest = b""

    def send(self, data: bytes, fds: Sequence[int]) -> None:
        """Sends all of it, and takes what comes meanwhile; does nothing once the stream has ended."""
        view = memoryview(data)
        while view and not self.has_ended:
            try:
                view = view[self._sock.sendmsg([view], vfu.rights(fds)) :]
                fds = ()
            except BlockingIOError:
                readable, _, _ = select.select([self._sock], [self._sock], [], vfu.PATIENCE)
                if readable:
                    self.take()
            except (BrokenPipeError, ConnectionResetError):
                self.take()
                self.has_ended = True

    def take(self) -> None:
        """Takes what has come."""
        try:
            while True:
                data, ancillary, _, _ = self._sock.recvmsg(1 << 18, socket.CMSG_SPACE(4 * vfu.MAX_FDS))
                vfu.close_all(vfu.received_fds(ancillary))
                if not data:
                    self.has_ended = True
                    break
                self._rest += data
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self.has_ended = True
        while len(self._rest) >= vfu.HEADER.size:
            message_id, command, size, flags, _ = vfu.HEADER.unpack_from(self._rest)
            if flags & ~vfu.ERROR != vfu.REPLY or not vfu.HEADER.size <= size <= vfu.MAX_REPLY:
                raise vfu.BrokenServer(f"flags {flags:#x}, {size} bytes in reply to command {command}")
            if len(self._rest) < size:
                break
            self._rest = self._rest[size:]
            self.heads.append((message_id, command))

    def wait(self) -> None:
        """Waits for something to come."""
        if not select.select([self._sock], [], [], vfu.PATIENCE)[0]:
            raise vfu.BrokenServer("it doesn't answer")
        self.take()
