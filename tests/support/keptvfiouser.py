# SPDX-License-Identifier: GPL-2.0-or-later
"""One remoted after another below a service manager with an fd store, and one vfio-user client of them all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from common.fdstore import FdStore
from common.fields import buffer, register
from common.journal import RateLimited
from common.vfiouser import DMA_MAP, HEADER, IRQ_SET, REGION_ACCESS, Command, Flag
from remoted.device import Bar, BarKind, Msix, PciFunction
from remoted.host import Host
from remoted.memory import GuestMemory
from remoted.ramfiles import RamFiles
from remoted.server import DeviceServer
from remoted.sharedmemory import bar_memory_name
from remoted.vfiouser.line import IntxLine
from remoted.vfiouser.vectors import Vectors
from tests.support.remotebench import RemoteBench
from tests.support.storemanager import StoreManager
from tests.support.vfiouserbench import TRIGGER, UNMASK_BY, VfioUserPeer, signals

DEVFN = 0x28
PAGE = 4096
INTX, MSIX = 0, 2
COUNT, LINE, RAISE, FETCH, LAST = 0, 4, 8, 12, 16
"""the registers of Kept, in BAR 0"""
CONFIG = 7
"""the region that is config space"""


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
