# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted's loop, hub, functions and servers in the test's own thread, with clients on real sockets.

Nothing happens until the test lets it: what clients send and what they signal is queued until settle().
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self, TypeVar

from common import pci
from common.config import Transport
from common.loop import Loop
from common.mpqemu import BAR, CONFIG, HEADER, RET, Command, request_frame
from common.notifier import EventNotifier
from remoted.device import Bar, BarKind, PciFunction
from remoted.host import Host
from remoted.iohub import IoHub
from remoted.memory import GuestMemory
from remoted.server import DeviceServer
from remoted.vfiouser.line import IntxLine
from remoted.vfiouser.vectors import Vectors
from tests.support.fds import send_fds

F = TypeVar("F", bound=PciFunction)

IO_BASE = 0xC000
MEM_BASE = 0xFEB00000
MEM64_BASE = 0x80_0000_0000
MAX_PASSES = 10_000


class Clock:
    """The loop's time, which only the test moves: at once, or by a step at each look at it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Recorder(logging.Handler):
    """A logger of its own, and what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.logger = logging.getLogger("tests.recorder")
        self.logger.propagate = False
        self.logger.setLevel(logging.DEBUG)
        self.logger.handlers = [self]

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.records]


class LineDevice(PciFunction):
    """A BAR of each kind. Bit 0 of the byte at 0 drives INTx; everything else is memory."""

    VENDOR_ID: ClassVar[int] = 0x1B36
    DEVICE_ID: ClassVar[int] = 0x0042
    REVISION: ClassVar[int] = 0x07
    CLASS_CODE: ClassVar[int] = 0x078002
    BARS: ClassVar[Mapping[int, Bar]] = {
        0: Bar(BarKind.IO, 16),
        1: Bar(BarKind.MEM32, 4096),
        2: Bar(BarKind.MEM64, 1 << 16, prefetchable=True),
    }

    def __init__(self, host: Host, properties: Mapping[str, str]) -> None:
        super().__init__(host, properties)
        self.registers: dict[tuple[int, int], int] = {}
        self.resets = 0
        self.closed = 0

    def reset(self) -> None:
        self.resets += 1
        self.registers.clear()

    def close(self) -> None:
        self.closed += 1

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        data = bytes(self.registers.get((bar, offset + n), 0) for n in range(size))
        return int.from_bytes(data, "little")

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        for n, byte in enumerate(value.to_bytes(size, "little")):
            self.registers[bar, offset + n] = byte
        if offset == 0:
            self.set_intx(bool(value & 1))


class Pair:
    """A client's copies of an irqfd and a resamplefd."""

    def __init__(self) -> None:
        self.irqfd = EventNotifier.create()
        self.resamplefd = EventNotifier.create()

    @property
    def fds(self) -> list[int]:
        return [self.irqfd.fd, self.resamplefd.fd]

    def written(self) -> int:
        """How often the irqfd was written since the last look."""
        try:
            return os.eventfd_read(self.irqfd.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self.irqfd.close()
        self.resamplefd.close()


class Peer:
    """A client of one device, at the level of frames. Context manager: closes its socket."""

    def __init__(self, bench: RemoteBench, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._bench = bench
        self._pairs: list[Pair] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()
        for pair in self._pairs:
            pair.close()

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Queues bytes."""
        send_fds(self.sock, data, fds)

    def send(self, command: Command, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Queues a message."""
        self.send_bytes(request_frame(command, payload), fds)

    def receive(self) -> int | None:
        """The u64 of the RET that has arrived, None if there is none. Raises EOFError at the end."""
        try:
            data = self.sock.recv(HEADER.size + RET.size)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        assert HEADER.unpack_from(data) == (Command.RET, RET.size)
        return int(RET.unpack_from(data, HEADER.size)[0])

    def call(self, command: Command, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """A whole round trip."""
        self.send(command, payload, fds)
        self._bench.settle()
        value = self.receive()
        assert value is not None
        return value

    @property
    def has_ended(self) -> bool:
        """Whether remoted has closed the link; replies that were left unread are dropped."""
        self._bench.settle()
        try:
            while self.sock.recv(1 << 16):
                pass
        except BlockingIOError:
            return False
        except ConnectionResetError:
            pass
        return True

    def config_read(self, addr: int, size: int) -> int:
        return self.call(Command.PCI_CFGREAD, CONFIG.pack(addr, 0, size))

    def config_write(self, addr: int, size: int, value: int) -> int:
        return self.call(Command.PCI_CFGWRITE, CONFIG.pack(addr, value, size))

    def bar_read(self, memory: bool, addr: int, size: int) -> int:
        return self.call(Command.BAR_READ, BAR.pack(addr, 0, size, memory))

    def bar_write(self, memory: bool, addr: int, size: int, value: int) -> int:
        return self.call(Command.BAR_WRITE, BAR.pack(addr, value, size, memory))

    def enable(self) -> None:
        """Gives LineDevice's BARs their addresses and lets it decode them."""
        self.config_write(pci.PCI_BASE_ADDRESS_0, 4, IO_BASE)
        self.config_write(pci.PCI_BASE_ADDRESS_0 + 4, 4, MEM_BASE)
        self.config_write(pci.PCI_BASE_ADDRESS_0 + 8, 4, MEM64_BASE & 0xFFFFFFFF)
        self.config_write(pci.PCI_BASE_ADDRESS_0 + 12, 4, MEM64_BASE >> 32)
        self.config_write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_IO | pci.PCI_COMMAND_MEMORY)

    def queue_line(self, level: bool) -> None:
        """Queues the register write that drives LineDevice's line, without waiting for its reply."""
        self.send(Command.BAR_WRITE, BAR.pack(IO_BASE, int(level), 1, False))

    def drive(self, level: bool) -> None:
        """Drives LineDevice's line by its register."""
        assert self.bar_write(False, IO_BASE, 1, int(level)) == 0

    def disable_intx(self, disabled: bool) -> None:
        """Sets or clears INTX_DISABLE, with the decoders on."""
        command = pci.PCI_COMMAND_IO | pci.PCI_COMMAND_MEMORY
        self.config_write(pci.PCI_COMMAND, 2, command | (pci.PCI_COMMAND_INTX_DISABLE if disabled else 0))

    def set_irqfd(self, *, kicked: bool = False) -> Pair:
        """Sends a new pair, kicked if wanted, and keeps a copy of it, as a VMM does."""
        pair = Pair()
        self._pairs.append(pair)
        if kicked:
            pair.resamplefd.set()
        self.send(Command.SET_IRQFD, fds=pair.fds)
        self._bench.settle()
        return pair

    def forget(self, pair: Pair) -> None:
        """Closes the copy."""
        self._pairs.remove(pair)
        pair.close()


class RemoteBench:
    """The device side with its sockets in a directory."""

    def __init__(self, directory: Path) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.hub = IoHub(self.loop)
        self.servers: dict[str, DeviceServer] = {}
        self.log = Recorder()
        self.idle = 0
        self._directory = directory
        self._poll = select.poll()
        self._poll.register(self.loop._epoll, select.POLLIN)

    def add(self, model: type[F], name: str, devfn: int, transport: Transport = Transport.MPQEMU) -> F:
        """A function that listens on NAME.sock."""
        pirq = self.hub.pirqs[self.hub.map_irq(devfn, model.INTERRUPT_PIN)]
        line, vectors = IntxLine(self.loop, self.hub.owners), None
        if transport is Transport.VFIO_USER:
            vectors = Vectors(line)
        set_irq = pirq.set_irq if vectors is None else line.set_irq
        function = model(Host(name, self.loop, self.log.logger, GuestMemory(), set_irq, None, vectors), {})
        function.full_reset()
        server = DeviceServer(self.loop, function, vectors or pirq, self._on_idle)
        server.listen(self.path(name))
        self.servers[name] = server
        return function

    def path(self, name: str) -> str:
        return str(self._directory / f"{name}.sock")

    def connect(self, name: str, *, settled: bool = True) -> Peer:
        """A new client; unless told otherwise, whether it is served is settled, too."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path(name))
        if settled:
            self.settle()
        return Peer(self, sock)

    @property
    def is_ready(self) -> bool:
        """Whether the loop would not wait."""
        return bool(self._poll.poll(0))

    def settle(self) -> None:
        """Lets the loop run until it would wait."""
        for _ in range(MAX_PASSES):
            if not self.is_ready:
                return
            self.loop.step()
        raise AssertionError("the loop doesn't come to rest")

    def resample(self, pair: Pair) -> None:
        """What KVM does at an EOI."""
        pair.resamplefd.set()
        self.settle()

    def close(self) -> None:
        for server in self.servers.values():
            server.close()
        self.hub.finalize()
        self.loop.close()

    def _on_idle(self) -> None:
        self.idle += 1
