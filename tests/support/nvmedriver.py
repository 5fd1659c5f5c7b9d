# SPDX-License-Identifier: GPL-2.0-or-later
"""A driver for the nvme model, written from the specification, on a function and RAM of the test's own."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from common import pci
from common.loop import Loop
from common.mpqemu import SYSMEM
from remoted.devices.nvme.controller import Nvme
from remoted.msi import VectorKind
from tests.support.devices import FunctionBench
from tests.support.steploop import run_until

__all__ = ["PAGE", "RAM_SIZE", "RAM_START", "Completion", "Driver", "QueuePair", "driver"]

PAGE = 4096
RAM_START = 0x1000_0000
RAM_SIZE = 8 << 20
CAP, VS, INTMS, INTMC, CC, CSTS, AQA, ASQ, ACQ = 0x00, 0x08, 0x0C, 0x10, 0x14, 0x1C, 0x24, 0x28, 0x30
DOORBELLS = 0x1000
CC_DEFAULT = 6 << 16 | 4 << 20
READY, FATAL = 1, 2
SUCCESS = 0


class Completion(NamedTuple):
    """A completion queue entry."""

    dword0: int
    head: int
    queue: int
    cid: int
    status: int
    """type and code; without phase, More and Do Not Retry"""
    flags: int
    """More and Do Not Retry"""


class QueuePair:
    """A submission queue and its completion queue, as the driver sees them."""

    def __init__(self, number: int, submissions: int, completions: int, size: int) -> None:
        self.number = number
        self.submissions = submissions
        self.completions = completions
        self.size = size
        self.tail = 0
        self.head = 0
        self.phase = 1
        self.next_cid = 0


class Driver:
    """Drives one controller; completions are awaited by stepping the loop."""

    def __init__(self, loop: Loop, has_messages: bool = False, /, **options: str) -> None:
        self.loop = loop
        self._options = options
        self.messages: list[tuple[VectorKind, int]] = []
        """those that were sent"""
        self._has_messages = has_messages
        self._fd, self.ram = _create_ram(is_sealed=True)
        self._free = RAM_START
        self.page = PAGE
        try:
            self.bench = self.make_bench()
        except BaseException:
            self.ram.close()
            os.close(self._fd)
            raise
        self.function = self.bench.function
        self.attach()
        self.admin = QueuePair(0, 0, 0, 0)

    def make_bench(self) -> FunctionBench[Nvme]:
        port = self if self._has_messages else None
        return FunctionBench(Nvme, self.loop, port, **self._options)

    def signal(self, kind: VectorKind, vector: int) -> bool:
        """A VectorPort's: every vector has an eventfd."""
        self.messages.append((kind, vector))
        return True

    def use_msix(self) -> None:
        """Enables MSI-X."""
        offset = self.function.config_read(pci.PCI_CAPABILITY_LIST, 1)
        while self.function.config_read(offset, 1) != pci.PCI_CAP_ID_MSIX:
            offset = self.function.config_read(offset + 1, 1)
        self.function.config_write(offset + 2, 2, 0x8000)

    def attach(self) -> None:
        """Gives the function its RAM, and bus mastering."""
        command = pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER
        self.bench.function.config_write(pci.PCI_COMMAND, 2, command)
        self.attach_ram()

    def attach_again(self) -> None:
        """The same, after a reset."""
        self.lose_ram()
        self.attach()

    def attach_ram(self) -> None:
        """Gives the function its RAM."""
        rest = [0] * 7
        table = SYSMEM.pack(RAM_START, *rest, RAM_SIZE, *rest, 0, *rest)
        self.bench.function.host.memory.sync(table, [os.dup(self._fd)])

    def use_unsealed_ram(self) -> None:
        """Moves the guest's RAM, with its content, into a file that its owner could truncate."""
        fd, ram = _create_ram(is_sealed=False)
        ram[:] = self.ram[:]
        self.ram.close()
        os.close(self._fd)
        self.lose_ram()
        self._fd, self.ram = fd, ram
        self.attach()

    def lose_ram(self) -> None:
        """As at the end of a session."""
        for fd in self.bench.function.host.memory.clear():
            os.close(fd)

    def close(self) -> None:
        self.lose_ram()
        self.bench.function.shut_down()
        self.ram.close()
        os.close(self._fd)

    def allocate(self, size: int = PAGE) -> int:
        """The address of pages that nobody else gets."""
        address, self._free = self._free, self._free + size + -size % PAGE
        assert self._free <= RAM_START + RAM_SIZE
        return address

    def allocate_queue(self, size: int) -> int:
        """As allocate(), at a multiple of the memory page size that CC has been given."""
        self._free += -self._free % self.page
        return self.allocate(size)

    def load(self, address: int, size: int) -> bytes:
        return self.ram[address - RAM_START : address - RAM_START + size]

    def store(self, address: int, data: bytes) -> None:
        self.ram[address - RAM_START : address - RAM_START + len(data)] = data

    def read(self, register: int, size: int = 4) -> int:
        return self.bench.read(register, size)

    def write(self, register: int, value: int, size: int = 4) -> None:
        self.bench.write(register, size, value)

    def enable(self, size: int = 32, cc: int = CC_DEFAULT) -> None:
        """The initialization of 7.6.1."""
        self.page = PAGE << (cc >> 7 & 0xF)
        self.admin = QueuePair(0, self.allocate_queue(64 * size), self.allocate_queue(16 * size), size)
        self.write(AQA, (size - 1) << 16 | size - 1)
        self.write(ASQ, self.admin.submissions, 8)
        self.write(ACQ, self.admin.completions, 8)
        self.write(CC, cc | 1)
        run_until(self.loop, lambda: self.read(CSTS) & (READY | FATAL))

    def restart(self) -> None:
        """A controller reset, and the admin queues again."""
        self.disable()
        self._free = RAM_START
        self.ram[:] = bytes(RAM_SIZE)
        self.enable()

    def disable(self) -> None:
        self.write(CC, CC_DEFAULT)
        run_until(self.loop, lambda: not self.read(CSTS) & READY)

    def put(self, queue: QueuePair, entry: bytes) -> None:
        """Writes an entry into the submission queue, without ringing."""
        self.store(queue.submissions + 64 * queue.tail, entry)
        queue.tail = (queue.tail + 1) % queue.size

    def ring(self, queue: QueuePair) -> None:
        self.write(DOORBELLS + 8 * queue.number, queue.tail)

    def acknowledge(self, queue: QueuePair) -> None:
        self.write(DOORBELLS + 8 * queue.number + 4, queue.head)

    def submit(
        self,
        queue: QueuePair,
        opcode: int,
        *,
        nsid: int = 0,
        prp1: int = 0,
        prp2: int = 0,
        cdw10: int = 0,
        cdw11: int = 0,
        cdw12: int = 0,
        cdw13: int = 0,
        flags: int = 0,
    ) -> int:
        """Submits a command. Returns its identifier."""
        cid = queue.next_cid
        queue.next_cid = (cid + 1) & 0xFFFF
        dwords = (cdw10, cdw11, cdw12, cdw13, 0, 0)
        self.put(queue, struct.pack("<BBHIQQQQ6I", opcode, flags, cid, nsid, 0, 0, prp1, prp2, *dwords))
        self.ring(queue)
        return cid

    def peek(self, queue: QueuePair) -> Completion | None:
        """Takes the next completion if it is there, without telling the controller."""
        entry = self.load(queue.completions + 16 * queue.head, 16)
        dword0, _, head, number, cid, status = struct.unpack("<IIHHHH", entry)
        if status & 1 != queue.phase:
            return None
        queue.head += 1
        if queue.head == queue.size:
            queue.head, queue.phase = 0, queue.phase ^ 1
        return Completion(dword0, head, number, cid, status >> 1 & 0x7FF, status >> 1 & 0x7800)

    def wait(self, queue: QueuePair) -> Completion:
        """The next completion, acknowledged."""
        found: list[Completion] = []

        def is_there() -> bool:
            completion = self.peek(queue)
            if completion is not None:
                found.append(completion)
            return bool(found)

        run_until(self.loop, is_there)
        self.acknowledge(queue)
        return found[0]

    def run(self, queue: QueuePair, opcode: int, **fields: int) -> Completion:
        """Submits a command and awaits its completion, which has to be the next one."""
        cid = self.submit(queue, opcode, **fields)
        completion = self.wait(queue)
        assert (completion.cid, completion.queue) == (cid, queue.number)
        return completion

    def run_until_idle(self) -> list[int]:
        """Steps the loop some times. Returns the identifiers of admin commands that have ended."""
        ended = []
        for _ in range(10):
            self.loop.step(0)
            completion = self.peek(self.admin)
            if completion is not None:
                ended.append(completion.cid)
        return ended

    def create_pair(self, number: int = 1, size: int = 16, vector: int = 0) -> QueuePair:
        pair = QueuePair(number, self.allocate_queue(64 * size), self.allocate_queue(16 * size), size)
        self.store(pair.completions, bytes(16 * size))
        shape = (size - 1) << 16 | number
        created = self.run(self.admin, 0x05, prp1=pair.completions, cdw10=shape, cdw11=vector << 16 | 3)
        assert created.status == SUCCESS
        created = self.run(self.admin, 0x01, prp1=pair.submissions, cdw10=shape, cdw11=number << 16 | 1)
        assert created.status == SUCCESS
        return pair


def _create_ram(*, is_sealed: bool) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, RAM_SIZE)
    if is_sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd, mmap.mmap(fd, RAM_SIZE)


@contextmanager
def driver(loop: Loop, has_messages: bool = False, /, **options: str) -> Iterator[Driver]:
    """A driver for a controller that is not enabled."""
    made = Driver(loop, has_messages, **options)
    try:
        yield made
    finally:
        made.close()
