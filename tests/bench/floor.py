# SPDX-License-Identifier: GPL-2.0-or-later
"""The floor of the language: what floor.c does, in Python, with nothing else around it.

    python floor.py LINK POLL_US

What CPU time remoted takes beyond it is the price of what it checks, keeps and tells. What this takes beyond
floor.c is the price of Python. It imports modules of C only.
"""

import _socket
import posix
import select
import sys
import time
from _struct import Struct

CONFIG_WRITE, CONFIG_READ, BAR_WRITE, BAR_READ, SET_IRQFD = range(2, 7)
IER, IER_THRI = 1, 2
COMMAND, BAR_0, INTERRUPT_PIN = 0x04, 0x10, 0x3D
HEADER, CONFIG, BAR, RET = Struct("=iIQ"), Struct("=IIi"), Struct("=QQ"), Struct("=iIQQ")
NO_FD = -1


class Floor:
    """One link and its interrupt."""

    def __init__(self, fd: int, poll: float) -> None:
        self.link = _socket.socket(fileno=fd)
        self.epoll = select.epoll()
        self.epoll.register(fd, select.EPOLLIN)
        self.poll = poll
        self.frame = bytearray(256)
        self.buffers = [self.frame]
        self.answer = bytearray(RET.pack(1, 0, 8, 0))
        self.counter = [bytearray(8)]
        self.registers = bytearray(8)
        self.config = bytearray(256)
        self.config[:3] = b"\x36\x1b\x02"
        self.config[BAR_0] = self.config[INTERRUPT_PIN] = 1
        self.irqfd = self.resamplefd = NO_FD

    def serve(self) -> None:
        """One message."""
        count, ancillary, _, _ = self.link.recvmsg_into(self.buffers, 64)
        if not count:
            sys.exit()
        command = HEADER.unpack_from(self.frame)[0]
        value = 0
        if command == BAR_WRITE:
            addr, data = BAR.unpack_from(self.frame, HEADER.size)
            self.registers[addr & 7] = data & 0xFF
            if addr & 7 == IER and data & IER_THRI:
                posix.eventfd_write(self.irqfd, 1)
        elif command == BAR_READ:
            addr, _ = BAR.unpack_from(self.frame, HEADER.size)
            value = self.registers[addr & 7]
        elif command == CONFIG_READ:
            addr, _, size = CONFIG.unpack_from(self.frame, HEADER.size)
            value = int.from_bytes(self.config[addr : addr + size], "little")
        elif command == CONFIG_WRITE:
            addr, data, _ = CONFIG.unpack_from(self.frame, HEADER.size)
            if addr in (COMMAND, BAR_0):
                data = data & ~7 | 1 if addr == BAR_0 else data
                self.config[addr : addr + 4] = data.to_bytes(4, "little")
        elif command == SET_IRQFD:
            fds = memoryview(ancillary[0][2]).cast("i")
            self.irqfd, self.resamplefd = fds
            self.epoll.register(self.resamplefd, select.EPOLLIN)
            return
        elif not command:  # SYNC_SYSMEM
            return
        RET.pack_into(self.answer, 0, 1, 0, 8, value)
        self.link.send(self.answer)

    def resample(self) -> None:
        """One EOI."""
        posix.readv(self.resamplefd, self.counter)
        if self.registers[IER] & IER_THRI:
            posix.eventfd_write(self.irqfd, 1)

    def run(self) -> None:
        """Until the client hangs up."""
        while True:
            for fd, _ in self.wait():
                if fd == self.resamplefd:
                    self.resample()
                else:
                    self.serve()

    def wait(self) -> list[tuple[int, int]]:
        """The next events, looked for before it sleeps."""
        poll, clock = self.epoll.poll, time.monotonic
        end = clock() + self.poll
        while clock() < end:
            events = poll(0)
            if events:
                return events
        return poll(None)


Floor(int(sys.argv[1]), int(sys.argv[2]) / 1e6).run()
