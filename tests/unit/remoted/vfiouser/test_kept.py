# SPDX-License-Identifier: GPL-2.0-or-later
"""A device on vfio-user below a service manager with an fd store: one process after another serves a client."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import pytest

from common.fdstore import FdStore
from common.fields import buffer, register
from common.journal import RateLimited
from common.vfiouser import DMA_MAP, HEADER, IRQ_SET, REGION_ACCESS, REGION_INFO, Command, Flag
from remoted import clientsession, keeper, keptlink, state
from remoted.device import Bar, BarKind, Msix, PciFunction
from remoted.host import Host
from remoted.memory import GuestMemory
from remoted.ramfiles import RamFiles
from remoted.server import DeviceServer
from remoted.sharedmemory import bar_memory_name
from remoted.vfiouser import clientstate, ramtable, session
from remoted.vfiouser import keeper as vfiouser_keeper
from remoted.vfiouser import keptlink as vfiouser_keptlink
from remoted.vfiouser import line as vfiouser_line
from remoted.vfiouser.line import IntxLine
from remoted.vfiouser.vectors import Vectors
from tests.support.fds import no_fd_is_left
from tests.support.killing import killed_at
from tests.support.remotebench import RemoteBench
from tests.support.storemanager import StoreManager
from tests.support.vfiouserbench import DISABLE, MASK, TRIGGER, UNMASK, UNMASK_BY, VfioUserPeer, signals

DEVFN = 0x28
PAGE = 4096
INTX, MSIX = 0, 2
COUNT, LINE, RAISE, FETCH, LAST = 0, 4, 8, 12, 16
CONFIG = 7
MODULES = (
    *(clientsession, keeper, keptlink, state),
    *(clientstate, ramtable, session, vfiouser_keeper, vfiouser_keptlink),
)
SOURCES = tuple(str(module.__file__) for module in MODULES)
"""what must stand a kill at any line"""


class Kept(PciFunction):
    """Counts writes and keeps the last; drives its line; raises vectors; and fetches a word of RAM."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x0001
    BARS: ClassVar = {0: Bar(BarKind.MEM32, 4096), 2: Bar(BarKind.MEM32, 1 << 16, shared=True)}
    MSIX = Msix(vectors=4)
    count: int = register(32)
    word: int = register(32)
    last: bytearray = buffer(64)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        if offset >= LAST:
            return int.from_bytes(self.last[offset - LAST : offset - LAST + size], "little")
        return self.word if offset == FETCH else self.count

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset == COUNT:
            self.count += 1
            self.last[:] = (bytes(self.last) + value.to_bytes(size, "little"))[-16:]
        elif offset == LINE:
            self.set_intx(bool(value))
        elif offset == RAISE:
            self.raise_irq(value)
        else:
            self.word = int.from_bytes(self.host.memory.read(value, 4), "little")


class Process(RemoteBench):
    """One remoted of a unit whose manager is ``manager``."""

    def __init__(self, directory: Path, manager: StoreManager) -> None:
        super().__init__(directory)
        self.manager = manager
        self.store = FdStore(self.loop, RateLimited(self.log.logger), manager.address, manager.hand_over())
        ram_files = RamFiles(self.store)
        self.line = IntxLine(self.loop, self.hub.owners)
        vectors = Vectors(self.line)
        host = Host(
            "dev",
            self.loop,
            self.log.logger,
            GuestMemory(),
            self.line.set_irq,
            None,
            vectors,
            kept_memory=self._take_memory,
        )
        self.function = Kept(host, {})
        server = DeviceServer(self.loop, self.function, vectors, self._on_idle)
        self.servers["dev"] = server
        server.keep(self.store, ram_files, DEVFN)
        ram_files.end_of_start()
        self.dropped = self.store.drop_inherited()

    def listen(self) -> None:
        self.servers["dev"].listen(self.path("dev"))

    def _take_memory(self, bar: int) -> int:
        fd, *_ = self.store.take(bar_memory_name(f"{DEVFN:02x}.", bar)) or (-1,)
        return fd

    def settle(self) -> None:
        super().settle()
        while self.manager.serve():
            super().settle()

    def close(self) -> None:
        """Closes what a kill closes, and does nothing else."""
        self.function.host.guard.on_done = None
        self.store.close()
        super().close()


class Lives:
    """One process after the other, and one client that notices nothing of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manager = StoreManager(directory)
        self.process = Process(directory, self.manager)
        self.process.listen()
        self.process.settle()
        self.peer = VfioUserPeer(self.process, "dev")

    def restart(self) -> Process:
        """What has been sent is handled before it returns."""
        self.process.close()
        self.process = self.peer.bench = Process(self.directory, self.manager)
        self.process.settle()
        return self.process

    def queue(self, command: int, payload: bytes, fds: Sequence[int] = (), flags: int = 0) -> tuple[int, int]:
        return self.peer.send(command, payload, fds, flags), command

    def write(self, offset: int, value: int, *, is_posted: bool = False) -> tuple[int, int]:
        payload = REGION_ACCESS.pack(offset, 0, 4) + value.to_bytes(4, "little")
        return self.queue(Command.REGION_WRITE, payload, (), int(Flag.NO_REPLY) if is_posted else 0)

    def read(self, offset: int, count: int = 4) -> tuple[int, int]:
        return self.queue(Command.REGION_READ, REGION_ACCESS.pack(offset, 0, count))

    def answers(self) -> list[tuple[int, int, int, bytes]]:
        """Of each answer that has come: id, command, errno, payload."""
        found = []
        try:
            data = self.peer.sock.recv(1 << 20)
        except BlockingIOError:
            return []
        assert data, "the link has ended"
        while data:
            message, command, size, flags, error = HEADER.unpack_from(data)
            assert flags & Flag.REPLY
            assert len(data) >= size
            found.append((message, command, error, data[HEADER.size : size]))
            data = data[size:]
        return found

    def close(self) -> None:
        self.peer.sock.close()
        self.process.settle()
        self.process.servers["dev"].discard()
        self.process.servers.clear()
        self.process.settle()
        self.process.close()
        while self.manager.serve():
            pass
        assert not self.manager.files, "a device that is removed leaves nothing"
        self.manager.close()


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    with no_fd_is_left(), closing(Lives(tmp_path)) as lives:
        yield lives


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Lives]:
    """The same for processes that are killed: what these had open stays so in the process of the tests."""
    with closing(Lives(tmp_path)) as lives:
        yield lives


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(6)]
    yield fds
    for fd in fds:
        os.close(fd)


def test_an_idle_client_goes_on(lives: Lives) -> None:
    lives.peer.write(0, COUNT, b"abcd")
    for _ in range(3):
        process = lives.restart()
        assert process.dropped == []
        assert lives.peer.read(0, LAST, 4).payload == b"abcd"
    assert lives.peer.read(0, COUNT, 4).payload == bytes((1, 0, 0, 0))


def test_requests_are_done_and_answered_once_wherever_the_process_is_killed(mortal: Lives) -> None:
    """Several at once, the first of them posted, with a long answer among them."""
    lives, count, line, was_killed = mortal, 0, 1, True
    while was_killed:
        lives.write(COUNT, count + 1, is_posted=True)
        expected = [lives.write(COUNT, count + 2), lives.read(COUNT), lives.read(LAST, 2048)]
        lives.write(COUNT, count + 3, is_posted=True)
        count += 3
        was_killed = killed_at(line, lives.process.settle, SOURCES)
        lives.restart()
        answers = lives.answers()
        assert [answer[:2] for answer in answers] == expected, f"killed at line {line}"
        assert [answer[2] for answer in answers] == [0, 0, 0]
        assert answers[1][3][REGION_ACCESS.size :] == (count - 1).to_bytes(4, "little"), line
        function = lives.process.function
        assert function.count == count, f"killed at line {line}"
        assert function.last[-12:] == b"".join((count + i).to_bytes(4, "little") for i in (-2, -1, 0))
        line += 11
    assert line > 100


@pytest.mark.filterwarnings("ignore")  # who is killed while it starts leaves open files to the collector
def test_kill_of_the_successor_too(mortal: Lives) -> None:
    lives, count, line, was_killed = mortal, 0, 1, True
    pick = random.Random(1)
    while was_killed:
        lives.write(COUNT, count + 1, is_posted=True)
        expected = [lives.write(COUNT, count + 2), lives.read(COUNT)]
        count += 2
        was_killed = killed_at(line, lives.process.settle, SOURCES)
        for _ in range(2):
            lives.process.function.host.guard.on_done = None
            before = open_fds()
            killed_at(pick.randint(1, 500), lambda: Process(lives.directory, lives.manager).settle(), SOURCES)
            kept = {fd for fds in lives.manager.files.values() for fd in fds}
            for fd in open_fds() - before - kept:
                os.close(fd)
        lives.restart()
        assert [answer[:2] for answer in lives.answers()] == expected, f"killed at line {line}"
        assert lives.process.function.count == count, f"killed at line {line}"
        line += 13


def open_fds() -> set[int]:
    gc.collect()
    names = os.listdir("/proc/self/fd")
    return {int(name) for name in names if os.path.lexists(f"/proc/self/fd/{name}")}


def requests_with_fds(lives: Lives, ram: int, eventfds: list[int]) -> list[tuple[int, int]]:
    """Maps RAM, attaches the line's eventfds and two vectors with one eventfd."""
    return [
        lives.queue(Command.DMA_MAP, DMA_MAP.pack(DMA_MAP.size, 3, PAGE, 0x10000, PAGE), [ram]),
        set_irqs(lives, TRIGGER, INTX, 0, eventfds[:1]),
        set_irqs(lives, UNMASK_BY, INTX, 0, eventfds[1:2]),
        set_irqs(lives, TRIGGER, MSIX, 1, [eventfds[2], eventfds[2]]),
        lives.queue(Command.DMA_MAP, DMA_MAP.pack(DMA_MAP.size, 3, 0, 0x20000, PAGE), [ram]),
    ]


def set_irqs(lives: Lives, flags: int, index: int, start: int, fds: Sequence[int]) -> tuple[int, int]:
    payload = IRQ_SET.pack(IRQ_SET.size, flags, index, start, len(fds))
    return lives.queue(Command.DEVICE_SET_IRQS, payload, fds)


def check_interrupts_and_ram(lives: Lives, ram: int, eventfds: list[int]) -> None:
    """Each works, and interrupts come as often as they should."""
    peer = lives.peer
    for fd in eventfds:
        signals(fd)
    peer.set_command(0x0406)
    peer.write(0, LINE, (0).to_bytes(4, "little"))
    peer.set_command(0x0006)
    for _ in range(2):
        peer.write(0, LINE, (1).to_bytes(4, "little"))
        assert signals(eventfds[0]) == 1
        os.eventfd_write(eventfds[1], 1)
        peer.bench.settle()
        assert signals(eventfds[0]) == 1, "asserted again at the EOI"
        peer.write(0, LINE, (0).to_bytes(4, "little"))
        os.eventfd_write(eventfds[1], 1)
        peer.bench.settle()
        assert signals(eventfds[0]) == 0
    for address, offset in ((0x10000, PAGE), (0x20000, 0)):
        word = os.urandom(4)
        os.pwrite(ram, word, offset + 8)
        peer.write(0, FETCH, (address + 8).to_bytes(4, "little"))
        assert peer.read(0, FETCH, 4).payload == word


def test_interrupts_and_ram_go_on(lives: Lives, ram: int, eventfds: list[int]) -> None:
    requests_with_fds(lives, ram, eventfds)
    lives.process.settle()
    assert [answer[2] for answer in lives.answers()] == [0] * 5
    for _ in range(3):
        lives.restart()
        assert lives.process.dropped == []
        check_interrupts_and_ram(lives, ram, eventfds)
    assert lives.process.log.messages == ["continues the link of the previous process"]


def test_requests_with_fds_are_done_once_wherever_the_process_is_killed(
    mortal: Lives, ram: int, eventfds: list[int]
) -> None:
    lives, line, was_killed = mortal, 1, True
    while was_killed:
        expected = requests_with_fds(lives, ram, eventfds)
        was_killed = killed_at(line, lives.process.settle, SOURCES)
        lives.restart()
        answers = lives.answers()
        assert [answer[:2] for answer in answers] == expected, f"killed at line {line}"
        assert [answer[2] for answer in answers] == [0] * 5, f"killed at line {line}"
        assert "again" not in " ".join(lives.process.log.messages), f"killed at line {line}"
        check_interrupts_and_ram(lives, ram, eventfds)
        for address in (0x10000, 0x20000):
            assert lives.peer.unmap(address, PAGE).error == 0
        for index in (INTX, MSIX):
            assert lives.peer.set_irqs(DISABLE, index, 0, 0) == 0
        line += 6
    assert line > 500


def test_a_vector_that_is_attached_is_signalled_by_a_later_process(lives: Lives, eventfds: list[int]) -> None:
    """And one that the client has masked stays so."""
    peer = lives.peer
    peer.set_command(0x0006)
    position = next(
        offset for offset in range(0x40, 0x100, 4) if peer.read(CONFIG, offset, 1).payload == b"\x11"
    )
    assert peer.set_irqs(TRIGGER, MSIX, 0, 4, fds=eventfds[:4]) == 0
    assert peer.set_irqs(MASK, MSIX, 3) == 0
    assert peer.write(CONFIG, position + 2, (0x8000).to_bytes(2, "little")).error == 0
    lives.restart()
    for vector in range(4):
        peer.write(0, RAISE, vector.to_bytes(4, "little"))
    assert [signals(fd) for fd in eventfds[:4]] == [1, 1, 1, 0]
    lives.restart()
    assert peer.set_irqs(UNMASK, MSIX, 3) == 0
    assert [signals(fd) for fd in eventfds[:4]] == [0, 0, 0, 1]


def test_an_eoi_counts_wherever_the_process_is_killed_while_its_eventfd_is_replaced(
    mortal: Lives, eventfds: list[int]
) -> None:
    lives, number, was_killed = mortal, 1, True
    trigger, first, second, *_ = eventfds
    while was_killed:
        assert lives.peer.set_irqs(TRIGGER, INTX, fds=[trigger]) == 0
        assert lives.peer.set_irqs(UNMASK_BY, INTX, fds=[first]) == 0
        lives.peer.write(0, LINE, (1).to_bytes(4, "little"))
        assert signals(trigger) == 1
        lives.queue(Command.DEVICE_SET_IRQS, IRQ_SET.pack(IRQ_SET.size, UNMASK_BY, INTX, 0, 1), [second])
        os.eventfd_write(first, 1)
        was_killed = killed_at(number, lives.process.settle, [str(vfiouser_line.__file__)])
        lives.restart()
        assert signals(trigger), f"killed at line {number}"
        assert len(lives.answers()) == 1
        lives.peer.write(0, LINE, bytes(4))
        assert lives.peer.set_irqs(DISABLE, INTX, count=0) == 0
        number += 1
    assert number > 15


def test_a_line_that_the_client_has_masked_stays_so(lives: Lives, eventfds: list[int]) -> None:
    peer = lives.peer
    assert peer.set_irqs(TRIGGER, INTX, fds=eventfds[:1]) == 0
    assert peer.set_irqs(MASK, INTX) == 0
    lives.restart()
    peer.write(0, LINE, (1).to_bytes(4, "little"))
    assert signals(eventfds[0]) == 0
    lives.restart()
    assert signals(eventfds[0]) == 0
    assert peer.set_irqs(UNMASK, INTX) == 0
    assert signals(eventfds[0]) == 1
    lives.restart()
    assert signals(eventfds[0]) == 0, "asserted already"


def test_a_region_costs_the_same_however_many_there_are(lives: Lives, ram: int) -> None:
    """And after a restart all of them are there, but for the one that was unmapped."""

    def map_and_unmap() -> None:
        assert lives.peer.map(1 << 40, PAGE, ram) == 0
        assert lives.peer.unmap(1 << 40, PAGE).error == 0

    lives.peer.map(0, PAGE, ram)
    few = calls_of(map_and_unmap)
    for page in range(1, 600):
        assert lives.peer.map(page << 20, PAGE, ram, page % 16 * PAGE) == 0
    assert calls_of(map_and_unmap) < 1.2 * few
    assert lives.peer.unmap(300 << 20, PAGE).error == 0
    memory = lives.restart().function.host.memory
    assert memory.regions == [(page << 20, PAGE) for page in range(600) if page != 300]
    assert memory.mapping(599 << 20) == (PAGE, 599 % 16 * PAGE, memory.fds[0], True, True)
    assert lives.peer.unmap(0, 0, 2).error == 0
    assert lives.peer.read(0, 0, 4).error == 0
    assert stored(lives) == (0, 0)
    assert lives.restart().function.host.memory.is_empty


def calls_of(action: Callable[[], object]) -> int:
    """How many functions it calls, Python's and C's."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_what_is_unmapped_or_detached_leaves_the_store(lives: Lives, ram: int, eventfds: list[int]) -> None:
    requests_with_fds(lives, ram, eventfds)
    lives.process.settle()
    lives.answers()
    assert stored(lives) == (3, 1)
    assert lives.peer.unmap(0x10000, PAGE).error == 0
    assert lives.peer.unmap(0x20000, PAGE).error == 0
    assert lives.peer.set_irqs(TRIGGER, MSIX, 1, 2) == 0
    lives.peer.read(0, 0, 4)
    assert stored(lives) == (2, 0)
    lives.restart()
    assert lives.process.dropped == []
    assert lives.process.function.host.memory.regions == []


def stored(lives: Lives) -> tuple[int, int]:
    """How many eventfds and RAM files the store has."""
    names = list(lives.manager.files)
    return sum("event-" in name for name in names), sum(name.startswith("ram-") for name in names)


def test_the_end_of_a_client_empties_the_store(lives: Lives, ram: int, eventfds: list[int]) -> None:
    requests_with_fds(lives, ram, eventfds)
    lives.process.settle()
    lives.peer.sock.close()
    lives.process.settle()
    assert sorted(lives.manager.files) == ["28.bar2", "28.client", "28.state"]
    lives.peer = VfioUserPeer(lives.process, "dev")
    lives.restart()
    assert lives.peer.read(0, COUNT, 4).error == 0


def test_a_client_that_reads_no_answers_gets_them_all_from_the_next_process(lives: Lives) -> None:
    expected: list[tuple[int, int]] = []
    for _ in range(3):
        with contextlib.suppress(BlockingIOError):
            while True:
                expected.append(lives.read(LAST, 2048))
                lives.process.settle()
        lives.restart()
    assert len(expected) > 100
    got: list[tuple[int, int]] = []

    def is_complete() -> bool:
        lives.process.settle()
        got.extend(answer[:2] for answer in whole_answers(lives))
        return len(got) == len(expected)

    for _ in range(1000):
        if is_complete():
            break
    assert got == expected


def test_a_request_in_two_parts_whose_answer_has_no_room(lives: Lives) -> None:
    """It is sent once there is room, although the client sends nothing more."""
    payload = REGION_ACCESS.pack(LAST, 0, 2048)
    request = HEADER.pack(7, Command.REGION_READ, HEADER.size + len(payload), 0, 0) + payload
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while lives.process.servers["dev"].accesses > sent - 2:
            for part in (request[:20], request[20:]):
                lives.peer.sock.send(part)
                lives.process.settle()
            sent += 1
            assert sent < 1000
    assert lives.process.servers["dev"].accesses < sent
    handled = lives.process.servers["dev"].accesses
    got = sum(1 for _ in range(3) for _ in whole_answers(lives))
    assert got == sent > handled > 10


def whole_answers(lives: Lives) -> Iterator[tuple[int, int]]:
    """Reads as long as there are answers, each as a whole."""
    sock = lives.peer.sock
    while True:
        try:
            header = sock.recv(HEADER.size)
        except BlockingIOError:
            return
        message, command, size, _, _ = HEADER.unpack(header)
        rest = size - HEADER.size
        while rest:
            lives.process.settle()
            rest -= len(sock.recv(rest))
        yield message, command


def test_before_version_nothing_is_served_by_a_later_process(tmp_path: Path) -> None:
    with no_fd_is_left(), closing(Lives(tmp_path)) as lives:
        lives.peer.sock.close()
        lives.process.settle()
        lives.peer = VfioUserPeer(lives.process, "dev", version=False)
        lives.process.settle()
        lives.restart()
        assert lives.peer.read(0, COUNT, 4).error != 0
        assert lives.peer.call(Command.VERSION, bytes(4) + b"{}\0").error == 0
        lives.restart()
        assert lives.peer.read(0, COUNT, 4).error == 0


def test_an_answer_with_a_file_is_sent(lives: Lives) -> None:
    """Of the BAR that the client may map."""
    message = lives.peer.send(Command.DEVICE_GET_REGION_INFO, REGION_INFO.pack(32, 0, 2, 0, 0, 0))
    lives.process.settle()
    data, fds, _, _ = socket.recv_fds(lives.peer.sock, 4096, 4)
    assert HEADER.unpack_from(data)[:2] == (message, Command.DEVICE_GET_REGION_INFO)
    assert len(fds) == 1
    os.close(fds[0])
    lives.restart()
    assert lives.peer.read(0, COUNT, 4).error == 0
