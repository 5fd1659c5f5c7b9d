# SPDX-License-Identifier: GPL-2.0-or-later
"""A kept link: a process may be killed at any line of it, and each request is done and answered exactly once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import ClassVar, Self

import pytest

from common.disposal import Disposal, count_unread
from common.errors import ProtocolError
from common.fields import buffer, register
from common.mpqemu import BAR, CONFIG, HEADER, RET, Command, request_frame
from remoted import keptframelink, keptlink, state
from remoted.device import Bar, BarKind, PciFunction
from remoted.host import Host
from remoted.keptlink import KeptLink
from remoted.memory import GuestMemory
from remoted.state import FunctionState
from tests.support.fds import send_fds
from tests.support.killing import killed_at
from tests.support.remotebench import IO_BASE, Recorder

COUNT, LAST = 0, 4
SOURCES = (keptframelink.__file__, keptlink.__file__, state.__file__)
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
        self.tables = 0
        """how many requests without a reply have come"""

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
        """Handles what is there, and before it, once, what the process before has left."""
        command, self.link.taken = self.link.taken, -1
        while command >= 0 or (command := self.link.receive()) >= 0:
            self.handle(command)
            command = -1

    def handle(self, command: int) -> None:
        """Handles the request that was received."""
        if command == Command.PCI_CFGWRITE:
            addr, value, size = CONFIG.unpack_from(self.link.payload)
            self.link.reply(not self.function.bus_config_write(addr, size, value))
        elif command in (Command.BAR_READ, Command.BAR_WRITE):
            addr, value, size, memory = BAR.unpack_from(self.link.payload)
            if command == Command.BAR_READ:
                self.link.reply(self.function.bus_read(memory, addr, size))
            else:
                self.link.reply(not self.function.bus_write(memory, addr, size, value))
        else:
            self.tables += 1

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

    def check_write(self, value: int) -> None:
        """A process of its own does such a write, and nothing else."""
        process = Process(self.files).start()
        count = process.function.count
        self.client.sendall(write_frame(value))
        process.serve()
        assert self.reply() == 0
        assert (process.function.count, bytes(process.function.last)) == (count + 1, bytes((value,)))
        process.vanish()

    def close(self) -> None:
        self.client.close()
        for fd in self.files:
            os.close(fd)


def write_frame(value: int, last_byte: int = 0) -> bytes:
    """A write of a byte to the counter. The frame's last byte is padding, which clients may fill as they like."""
    return request_frame(Command.BAR_WRITE, BAR.pack(IO_BASE, value, 1, False))[:-1] + bytes((last_byte,))


def new_bench() -> Bench:
    """A bench whose function has its BAR, with a link on which the client waits for nothing."""
    bench = Bench()
    process = Process(bench.files).start()
    for addr, value in ((0x10, IO_BASE), (0x04, 1)):
        bench.request(Command.PCI_CFGWRITE, CONFIG.pack(addr, value, 4))
        process.serve()
        assert bench.reply() == 0
    process.vanish()
    return bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    with closing(new_bench()) as bench:
        yield bench


def kill_at_each_line(
    bench: Bench, send: Callable[[], None], check: Callable[[Process, Process], None]
) -> None:
    """Sends, and kills the process that serves it at each line, after a write that it has served.

    ``check(process, successor)`` is called after each.
    """
    line, was_killed = 1, True
    while was_killed:
        process = Process(bench.files).start()
        bench.client.sendall(write_frame(0))
        process.serve()
        assert bench.reply() == 0
        send()
        was_killed = killed_at(line, process.serve, SOURCES)
        process.vanish()
        successor = Process(bench.files).start()
        successor.serve()
        check(process, successor)
        successor.vanish()
        line += 1
    assert line > 20


@pytest.mark.parametrize("last_byte", [0, 0xFF])
def test_kill_at_any_line(bench: Bench, last_byte: int) -> None:
    """A write counts once, and is answered once, wherever the process was."""
    count = 0

    def send() -> None:
        nonlocal count
        bench.client.sendall(write_frame(0xA0 + count % 16, last_byte))
        count += 2

    def check(_process: Process, successor: Process) -> None:
        assert bench.reply() == 0
        assert successor.function.count == count
        assert successor.function.last == bytes((0xA0 + (count - 2) % 16,))
        assert successor.function.intx_level is False

    kill_at_each_line(bench, send, check)


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


def test_when_a_request_is_taken_out_of_the_socket(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the function has handled it, and before its state becomes valid: see keptlink."""
    process = Process(bench.files).start()
    unread = []

    def write(function: Counter, *access: int) -> None:
        unread.append(count_unread(process.link.fileno()))
        bar_write(function, *access)

    def commit(state: FunctionState, reply: int) -> None:
        unread.append(count_unread(process.link.fileno()))
        commit_reply(state, reply)

    bar_write, commit_reply = Counter.bar_write, FunctionState.commit_reply
    monkeypatch.setattr(Counter, "bar_write", write)
    monkeypatch.setattr(FunctionState, "commit_reply", commit)
    for value in range(3):
        bench.client.sendall(write_frame(value))
        process.serve()
        assert bench.reply() == 0
    assert unread == [len(write_frame(0)), 0] * 3
    process.vanish()


def test_what_has_no_reply_is_in_the_socket_until_it_has_been_handled(bench: Bench) -> None:
    """Its files may not be in the fd store before."""
    process = Process(bench.files).start()
    bench.request(Command.SET_IRQFD, b"")
    for _ in range(2):
        assert process.link.receive() == Command.SET_IRQFD
        assert count_unread(process.link.fileno()) == HEADER.size
        process.vanish()
        process = Process(bench.files).start()
    assert process.link.receive() == Command.SET_IRQFD
    assert process.link.receive() == -1
    assert count_unread(process.link.fileno()) == 0
    process.vanish()


def test_what_has_no_reply_is_not_lost_behind_what_has(bench: Bench) -> None:
    """Another thread of the client may send it while one waits for its reply."""
    count = 0

    def send() -> None:
        nonlocal count
        count += 2
        bench.client.sendall(write_frame(count) + request_frame(Command.SET_IRQFD))

    def check(process: Process, successor: Process) -> None:
        assert bench.reply() == 0
        assert successor.function.count == count
        assert process.tables + successor.tables >= 1

    kill_at_each_line(bench, send, check)


def test_a_client_that_does_not_wait_for_replies(bench: Bench) -> None:
    """Each of its requests is done once all the same."""
    count = 0

    def send() -> None:
        nonlocal count
        bench.client.sendall(write_frame(count) + write_frame(count + 1))
        count += 3

    def check(_process: Process, successor: Process) -> None:
        assert len(bench.client.recv(1024)) == 2 * (HEADER.size + RET.size)
        assert successor.function.count == count

    kill_at_each_line(bench, send, check)


@pytest.mark.parametrize("fds_at", [0, 16, 39])
def test_a_request_that_brings_fds_by_mistake(fds_at: int) -> None:
    """It is done once. If the process is killed between the reads that it takes, the link may end instead."""
    line, was_killed, ends = 1, True, 0
    while was_killed:
        with closing(new_bench()) as bench:
            process = Process(bench.files).start()
            frame = write_frame(line % 256)
            bench.client.sendall(frame[:fds_at])
            send_fds(bench.client, frame[fds_at:], [0])
            was_killed = killed_at(line, process.serve, SOURCES)
            process.vanish()
            successor = Process(bench.files)
            try:
                successor.start_and_serve()
            except ProtocolError:
                ends += 1
                assert was_killed
                assert successor.function.count == 0
            else:
                assert bench.reply() == 0
                assert (successor.function.count, bytes(successor.function.last)) == (1, bytes((line % 256,)))
            successor.vanish()
        line += 1
    assert ends < 10 if fds_at else not ends


@pytest.mark.parametrize("cut", range(40))
def test_a_copy_that_a_kill_has_cut_short(bench: Bench, cut: int) -> None:
    """The kernel may wait for a page of the slot within its copy. The request is still in the socket then."""
    bench.check_write(1)
    process = Process(bench.files).start()
    slot = process.state.slots[process.state.serial + 1 & 1]
    slot[:cut] = write_frame(2)[:cut]
    process.vanish()
    count = process.function.count
    bench.client.sendall(write_frame(2))
    successor = Process(bench.files).start()
    successor.serve()
    assert bench.reply() == 0
    assert (successor.function.count, bytes(successor.function.last)) == (count + 1, b"\2")
    successor.vanish()
    bench.check_write(3)
