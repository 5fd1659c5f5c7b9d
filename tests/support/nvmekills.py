# SPDX-License-Identifier: GPL-2.0-or-later
"""Kills processes of an nvme device at lines of its code, and looks at what their guest has got.

    python -m tests.support.nvmekills IMAGE FIRST STEP

kills one at the first line that a doorbell leads to, one at a line so many further, and so on to the last. The
guest is this program, and each process of the device a child of it, which shares RAM, image and kept state.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
from collections.abc import Callable

from remoted import state
from remoted.devices.nvme import controller, engine, io, prp, queues
from tests.support.killing import at_line
from tests.support.nvmedriver import QueuePair
from tests.support.nvmelives import Machine
from tests.support.steploop import run_until

SOURCES = {str(each.__file__) for each in (controller, engine, io, prp, queues, state)}
WRITE, READ = 0x01, 0x02
BLOCK = 512
COUNT = 3
"""commands at a time: as many as the ring takes"""
USED_AGAIN = b"\xff" * 64


def in_child(work: Callable[[], object]) -> bool:
    """Does the work in a child. Returns whether it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  the parent tells
            print(f"a child failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), f"a child ended with {status}"
    return status != 0


class Test:
    """One guest, its queue, and what it expects."""

    def __init__(self, image: str) -> None:
        self.machine = Machine(f"file:{image}")
        self.machine.enable()
        self.queue: QueuePair = self.machine.create_pair(size=COUNT + 1)
        self.sources = [self.machine.allocate() for _ in range(COUNT)]
        self.target = self.machine.allocate()
        assert self.machine.process is not None
        self.serial = self.machine.process.state.serial
        """of the last request that was answered"""
        self.machine.vanish()
        self.image = os.open(image, os.O_RDONLY | os.O_CLOEXEC)

    def run(self, line: int) -> bool:
        """Lets the process be killed at a line. Returns whether it came so far. Raises AssertionError."""
        first = self.queue.tail
        expected = [self.put(line, i) for i in range(COUNT)]
        was_killed = in_child(lambda: self.first_life(line))
        found = self.collect()
        for i in range(len(found)):  # the guest may use these slots again
            slot = (first + i) % self.queue.size
            self.machine.store(self.queue.submissions + 64 * slot, USED_AGAIN)
        in_child(self.second_life)
        found += self.collect()
        assert sorted(found) == expected, f"line {line}: {found} instead of {expected}"
        for i in (0, 2):
            assert os.pread(self.image, BLOCK, BLOCK * i) == data(line, i), f"line {line}: block {i}"
        self.serial = (self.serial + 2) & 0xFF
        return was_killed

    def put(self, line: int, i: int) -> int:
        """Puts a command into the queue: a read, or a write of a block with a content of its own."""
        cid, self.queue.next_cid = self.queue.next_cid, (self.queue.next_cid + 1) & 0x7FFF
        self.machine.store(self.sources[i], data(line, i))
        opcode, address = (READ, self.target) if i == 1 else (WRITE, self.sources[i])
        entry = (opcode, 0, cid, 1, 0, 0, address, 0, i, 0, 0, 0, 0, 0)
        self.machine.put(self.queue, struct.pack("<BBHIQQQQ6I", *entry))
        return cid

    def first_life(self, line: int) -> None:
        self.machine.revive()
        self.machine.acknowledge(self.queue)
        at_line(line, SOURCES, lambda: os.kill(os.getpid(), signal.SIGKILL))
        self.machine.ring(self.queue)
        self.run_until_idle()

    def second_life(self) -> None:
        self.machine.revive()
        assert self.machine.process is not None
        serial = self.machine.process.state.serial
        if serial == (self.serial + 1) & 0xFF:  # nobody has answered the doorbell
            self.machine.ring(self.queue)
        else:
            assert serial == (self.serial + 2) & 0xFF
        self.run_until_idle()

    def run_until_idle(self) -> None:
        kept = self.machine.function._queues
        queue = kept.submissions[self.queue.number]
        run_until(
            self.machine.loop,
            lambda: not kept.under_way and not kept.unposted and queue.head == queue.tail,
        )
        self.machine.loop.step(0)
        assert all(each.promised == 0 for each in kept.completions.values())

    def collect(self) -> list[int]:
        """The identifiers of the commands whose completions are there."""
        found = []
        while (completion := self.machine.peek(self.queue)) is not None:
            assert completion.status == 0
            found.append(completion.cid)
        return found


def data(line: int, i: int) -> bytes:
    return struct.pack("<II", line, i) * (BLOCK // 8)


def main(image: str, first: int, step: int) -> None:
    test = Test(image)
    line = first
    while test.run(line):
        line += step
    print(f"{line} lines")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
