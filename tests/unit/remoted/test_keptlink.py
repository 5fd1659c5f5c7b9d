# SPDX-License-Identifier: GPL-2.0-or-later
"""A kept link: a process may be killed at any line of it, and each request is done and answered exactly once."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import ClassVar, Self

import pytest

from common.disposal import Disposal
from common.fields import buffer, register
from common.mpqemu import BAR, CONFIG, HEADER, RET, Command, request_frame
from remoted import keptlink, state
from remoted.device import Bar, BarKind, PciFunction
from remoted.host import Host
from remoted.keptlink import KeptLink
from remoted.memory import GuestMemory
from remoted.state import FunctionState
from tests.support.killing import killed_at
from tests.support.remotebench import IO_BASE, Recorder

COUNT, LAST = 0, 4
SOURCES = (keptlink.__file__, state.__file__)
"""what must stand a kill at any line"""


class Counter(PciFunction):
    """Counts what is written, keeps the last values, and has its line high while the count is odd."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x0001
    BARS: ClassVar = {0: Bar(BarKind.IO, 16)}
    count: int = register(32)
    last: bytearray = buffer(8)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        return self.count if offset == COUNT else int.from_bytes(self.last, "little")

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.count += 1
        self.last[:] = value.to_bytes(size, "little")
        self.set_intx(self.count & 1 == 1)


class Process:
    """One life of a remoted, on files that outlive it."""

    def __init__(self, files: tuple[int, int, int, int]) -> None:
        log = Recorder().logger
        self.function = Counter(Host("dev0", None, log, GuestMemory(), ignore), {})  # type: ignore[arg-type]
        self._fds = [os.dup(fd) for fd in files]
        self._socket = socket.socket(fileno=self._fds[1])

    def start(self) -> Self:
        self.state = FunctionState(self.function, self._fds[0], pytest.fail)
        if self.state.is_new:
            self.function.full_reset()
        else:
            self.state.restore()
            self.function.go_on()
        self.state.commit()
        self.link = KeptLink(self._socket, (self._fds[2], self._fds[3]), self.state, Disposal())
        return self

    def start_and_serve(self) -> None:
        self.start().serve()

    def serve(self) -> None:
        """Handles what is there."""
        while (command := self.link.receive()) >= 0:
            if command == Command.PCI_CFGWRITE:
                addr, value, size = CONFIG.unpack_from(self.link.payload)
                self.link.reply(not self.function.bus_config_write(addr, size, value))
            elif command in (Command.BAR_READ, Command.BAR_WRITE):
                addr, value, size, memory = BAR.unpack_from(self.link.payload)
                if command == Command.BAR_READ:
                    self.link.reply(self.function.bus_read(memory, addr, size))
                else:
                    self.link.reply(not self.function.bus_write(memory, addr, size, value))

    def vanish(self) -> None:
        """Closes what a kill closes."""
        self._socket.detach()
        for fd in self._fds:
            os.close(fd)


def ignore(_level: bool) -> None:
    """Drives no line."""


class Bench:
    """The files that the fd store would hold, and the client."""

    def __init__(self) -> None:
        self.client, server = socket.socketpair()
        self.client.settimeout(5.0)
        self.files = (os.memfd_create("state"), server.detach(), *os.pipe2(os.O_NONBLOCK))

    def request(self, command: Command, payload: bytes) -> None:
        self.client.sendall(request_frame(command, payload))

    def reply(self) -> int:
        frame = self.client.recv(1024)
        assert len(frame) == HEADER.size + RET.size, "exactly one reply"
        return int(RET.unpack_from(frame, HEADER.size)[0])

    def close(self) -> None:
        self.client.close()
        for fd in self.files:
            os.close(fd)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    process = Process(bench.files).start()
    for addr, value in ((0x10, IO_BASE), (0x04, 1)):
        bench.request(Command.PCI_CFGWRITE, CONFIG.pack(addr, value, 4))
        process.serve()
        assert bench.reply() == 0
    process.vanish()
    yield bench
    bench.close()


def test_kill_at_any_line(bench: Bench) -> None:
    """A write counts once, and is answered once, wherever the first process was and wherever the second."""
    count, line = 0, 1
    was_killed = True
    while was_killed:
        process = Process(bench.files).start()
        bench.request(Command.BAR_WRITE, BAR.pack(IO_BASE, 0, 1, False))
        process.serve()
        assert bench.reply() == 0
        bench.request(Command.BAR_WRITE, BAR.pack(IO_BASE, 0xA0 + count % 16, 1, False))
        count += 2
        was_killed = killed_at(line, process.serve, SOURCES)
        process.vanish()
        successor = Process(bench.files).start()
        successor.serve()
        assert bench.reply() == 0
        assert successor.function.count == count, f"killed at line {line}"
        assert successor.function.last == bytes((0xA0 + (count - 2) % 16,))
        assert successor.function.intx_level is False
        successor.vanish()
        line += 1
    assert line > 20


@pytest.mark.parametrize("stride", [1, 5, 11])
def test_kill_of_the_successor_too(bench: Bench, stride: int) -> None:
    """The second process is killed at other lines than the first, and the third ends what both began."""
    count, line, second = 0, 1, 0
    first_was_killed = True
    while first_was_killed:
        process = Process(bench.files).start()
        bench.request(Command.BAR_WRITE, BAR.pack(IO_BASE, count, 4, False))
        count += 1
        first_was_killed = killed_at(line, process.serve, SOURCES)
        process.vanish()
        second += stride
        process = Process(bench.files)
        if not killed_at(second, process.start_and_serve, SOURCES):
            second = 0
        process.vanish()
        successor = Process(bench.files).start()
        successor.serve()
        assert bench.reply() == 0
        assert successor.function.count == count, f"killed at line {line}, then at {second}"
        successor.vanish()
        line += 1
