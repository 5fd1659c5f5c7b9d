# SPDX-License-Identifier: GPL-2.0-or-later
"""edu's DMA engine with real guest RAM; 64 MiB both ways through a remoted of its own."""

from __future__ import annotations

import mmap
import os
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import mpqemu, pci
from common.ctl.children import Child
from common.disposal import Disposal
from common.errors import UsageError
from common.link import Client
from common.loop import Loop
from common.mpqemu import BAR, CONFIG, HEADER, RET, SYSMEM, Command, request_frame
from remoted.devices.edu import Edu
from tests.support.devices import FunctionBench
from tests.support.steploop import run_until

SOURCE, DESTINATION, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
IRQ_STATUS = 0x24
RUN, FROM_DEVICE, RAISE_IRQ = 0x1, 0x2, 0x4
BUFFER = 0x40000
RAM_START = 0x100000
RAM_SIZE = 16 * mmap.PAGESIZE
MASTER = pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER


class Bench:
    """An edu that may master the bus, and its guest's RAM, which ``ram`` shows."""

    def __init__(self, loop: Loop, ram_start: int = RAM_START, **properties: str) -> None:
        self.edu = FunctionBench(Edu, loop, **properties)
        self.edu.function.config_write(pci.PCI_COMMAND, 2, MASTER)
        self._loop = loop
        self._fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, RAM_SIZE)
        self.ram = mmap.mmap(self._fd, RAM_SIZE)
        rest = [0] * 7
        table = SYSMEM.pack(ram_start, *rest, RAM_SIZE, *rest, 0, *rest)
        self.edu.function.host.memory.sync(table, [os.dup(self._fd)])

    def close(self) -> None:
        self.lose_ram()
        self.ram.close()
        os.close(self._fd)

    def lose_ram(self) -> None:
        """As with the end of a session."""
        for fd in self.edu.function.host.memory.clear():
            os.close(fd)

    def start(self, source: int, destination: int, count: int, command: int) -> None:
        self.edu.write(SOURCE, 8, source)
        self.edu.write(DESTINATION, 8, destination)
        self.edu.write(COUNT, 8, count)
        self.edu.write(COMMAND, 8, command | RUN)

    def transfer(self, source: int, destination: int, count: int, command: int) -> None:
        """A driver's way: starts it and waits for its end."""
        self.start(source, destination, count, command)
        run_until(self._loop, lambda: not self.edu.read(COMMAND, 8) & RUN)

    def load(self, data: bytes, offset: int = 0) -> None:
        """Brings bytes into the device's buffer, by DMA from the start of RAM."""
        self.ram[: len(data)] = data
        self.transfer(RAM_START, BUFFER + offset, len(data), 0)

    def buffer(self) -> bytes:
        """The device's buffer, by DMA to the end of RAM, which is left as it was."""
        start = RAM_SIZE - 4096
        before = self.ram[start:]
        self.transfer(BUFFER, RAM_START + start, 4096, FROM_DEVICE)
        data, self.ram[start:] = self.ram[start:], before
        return data


@pytest.fixture
def bench(loop: Loop) -> Iterator[Bench]:
    bench = Bench(loop)
    yield bench
    bench.close()


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("offset", "count"), [(0, 4096), (0, 1), (4095, 1), (1, 4095), (100, 77), (0, 0), (4096, 0)]
)
def test_there_and_back(bench: Bench, offset: int, count: int) -> None:
    """Exactly these bytes are moved, each way."""
    data = random.Random(count).randbytes(count)
    bench.load(data, offset)
    assert bench.buffer() == bytes(offset) + data + bytes(4096 - offset - count)
    expected = bytearray(bench.ram[:])
    expected[333 : 333 + count] = data
    bench.transfer(BUFFER + offset, RAM_START + 333, count, FROM_DEVICE)
    assert bench.ram[:] == expected


def test_it_moves_what_is_there_when_it_runs_not_in_the_register_write(bench: Bench, loop: Loop) -> None:
    bench.start(RAM_START, BUFFER, 5, 0)
    assert bench.edu.read(COMMAND, 8) == RUN
    bench.ram[:5] = b"later"
    run_until(loop, lambda: not bench.edu.read(COMMAND, 8) & RUN)
    assert bench.buffer()[:5] == b"later"


def test_nothing_can_be_written_meanwhile(bench: Bench, loop: Loop) -> None:
    bench.ram[:3] = b"abc"
    bench.start(RAM_START, BUFFER, 3, 0)
    for register in (SOURCE, DESTINATION, COUNT, COMMAND):
        bench.edu.write(register, 8, 0x7)
    run_until(loop, lambda: not bench.edu.read(COMMAND, 8) & RUN)
    assert [bench.edu.read(register, 8) for register in (SOURCE, DESTINATION, COUNT)] == [
        RAM_START,
        BUFFER,
        3,
    ]
    assert bench.buffer()[:3] == b"abc"


@pytest.mark.parametrize("direction", [0, FROM_DEVICE])
def test_interrupt(bench: Bench, direction: int) -> None:
    source, destination = (BUFFER, RAM_START) if direction else (RAM_START, BUFFER)
    bench.transfer(source, destination, 4096, direction)
    assert not bench.edu.line
    bench.transfer(source, destination, 4096, direction | RAISE_IRQ)
    assert bench.edu.line
    assert bench.edu.read(IRQ_STATUS, 4) == 0x100


@pytest.mark.parametrize(
    ("start", "count"),
    [
        (BUFFER - 1, 2),
        (BUFFER, 4097),
        (BUFFER + 4095, 2),
        (BUFFER + 4097, 0),
        (BUFFER + 4096, 1),
        (0, 16),
        (BUFFER, 1 << 63),
        ((1 << 64) - 1, 2),
        (1 << 63, (1 << 64) - 1),
    ],
)
@pytest.mark.parametrize("direction", [0, FROM_DEVICE])
def test_out_of_the_buffer(
    bench: Bench, caplog: pytest.LogCaptureFixture, start: int, count: int, direction: int
) -> None:
    """It ends, with its interrupt, and has moved nothing."""
    bench.load(bytes(range(256)) * 16)
    ram, buffer = bench.ram[:], bench.buffer()
    source, destination = (start, RAM_START) if direction else (RAM_START, start)
    bench.transfer(source, destination, count, direction | RAISE_IRQ)
    assert bench.edu.line
    assert (bench.ram[:], bench.buffer()) == (ram, buffer)
    assert messages(caplog) == [f"DMA failed: {count} bytes at {start:#x} are not within the device's buffer"]


@pytest.mark.parametrize(
    ("address", "hole"),
    [
        (RAM_START - 1, RAM_START - 1),
        (RAM_START + RAM_SIZE - 99, RAM_START + RAM_SIZE),
        (RAM_START + RAM_SIZE, RAM_START + RAM_SIZE),
        (0, 0),
        ((1 << 28) - 1, (1 << 28) - 1),
    ],
)
@pytest.mark.parametrize("direction", [0, FROM_DEVICE])
def test_an_address_without_ram(
    bench: Bench, caplog: pytest.LogCaptureFixture, address: int, hole: int, direction: int
) -> None:
    bench.load(bytes(range(256)) * 16)
    ram, buffer = bench.ram[:], bench.buffer()
    source, destination = (BUFFER, address) if direction else (address, BUFFER)
    bench.transfer(source, destination, 100, direction | RAISE_IRQ)
    assert bench.edu.line
    assert (bench.ram[:], bench.buffer()) == (ram, buffer)
    assert messages(caplog) == [f"DMA failed: no RAM at {hole:#x}"]
    bench.load(b"after")
    assert bench.buffer().startswith(b"after")


def test_a_driver_cannot_fill_the_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        bench.transfer(0, BUFFER, 1, 0)
    assert len(caplog.records) == 10


def test_without_bus_mastering_nothing_moves(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.ram[:3] = b"abc"
    bench.edu.function.config_write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
    bench.transfer(RAM_START, BUFFER, 3, RAISE_IRQ)
    assert bench.edu.line
    bench.edu.function.config_write(pci.PCI_COMMAND, 2, MASTER)
    assert bench.buffer() == bytes(4096)
    assert messages(caplog) == ["DMA failed: the guest has not set bus mastering in the command register"]


def test_addresses_are_cut_to_28_bits(bench: Bench) -> None:
    bench.ram[:3] = b"abc"
    bench.transfer(0xFFFFFFFFF0000000 | RAM_START, BUFFER, 3, 0)
    assert bench.buffer()[:3] == b"abc"


@pytest.mark.parametrize(
    ("mask", "address", "reached"),
    [
        ("0xffffffffffffffff", 0x7F_0000_0000, True),
        ("0x7fffffffff", 0x7F_0000_0000, True),
        ("18446744073709551615", 0x7F_0000_0000, True),
        ("0x7effffffff", 0x7F_0000_0000, False),
        ("0", 0x7F_0000_0000, False),
    ],
)
def test_dma_mask(loop: Loop, mask: str, address: int, reached: bool) -> None:
    bench = Bench(loop, ram_start=0x7F_0000_0000, dma_mask=mask)
    bench.ram[:3] = b"abc"
    bench.transfer(address, BUFFER, 3, 0)
    bench.ram[:3] = b"xyz"
    bench.transfer(BUFFER, address, 3, FROM_DEVICE)
    assert bench.ram[:3] == (b"abc" if reached else b"xyz")
    bench.close()


@pytest.mark.parametrize(
    "mask", ["", "x", "-1", "0x", "0b1", "012", "1_000", "0x10000000000000000", "18446744073709551616", "1 "]
)
def test_bad_dma_mask(loop: Loop, mask: str) -> None:
    with pytest.raises(
        UsageError, match=r"^dma_mask=.*: must be (a whole number|at least 0$|at most 0xf{16}$)"
    ):
        FunctionBench(Edu, loop, dma_mask=mask)


def test_reset_clears_the_buffer_and_stops_the_transfer(
    bench: Bench, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    bench.load(b"secret")
    bench.start(0, BUFFER, 1, RAISE_IRQ)
    bench.edu.function.full_reset()
    done: list[bool] = []
    loop.call_later(0, lambda: done.append(True))
    run_until(loop, lambda: done)
    assert (bench.edu.line, messages(caplog)) == (False, [])
    bench.edu.place_bars()
    bench.edu.function.config_write(pci.PCI_COMMAND, 2, MASTER)
    assert bench.buffer() == bytes(4096)


def test_ram_that_goes_with_its_client(bench: Bench, loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    bench.start(RAM_START, BUFFER, 4096, RAISE_IRQ)
    bench.lose_ram()
    run_until(loop, lambda: bench.edu.line)
    assert messages(caplog) == [f"DMA failed: no RAM at {RAM_START:#x}"]


class Driver:
    """Drives an edu over its socket; five requests are sent at once, and answered in order."""

    BAR = 0xFEB00000

    def __init__(self, path: str, ram_fd: int, ram_size: int) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(path)
        client = Client(self._sock.dup(), deadline=20.0, disposal=Disposal())
        rest = [0] * 7
        client.send(Command.SYNC_SYSMEM, SYSMEM.pack(0, *rest, ram_size, *rest, 0, *rest), [ram_fd])
        client.request(Command.PCI_CFGWRITE, CONFIG.pack(pci.PCI_BASE_ADDRESS_0, self.BAR, 4))
        client.request(Command.PCI_CFGWRITE, CONFIG.pack(pci.PCI_COMMAND, MASTER, 2))
        client.close_own_copy()
        # MSG_WAITALL needs a blocking socket, which settimeout() doesn't leave.
        self._sock.setblocking(True)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 20, 0))
        self._poll = self._frame(Command.BAR_READ, COMMAND, 0)
        self._count = self._frame(Command.BAR_WRITE, COUNT, 4096)

    def close(self) -> None:
        self._sock.close()

    def transfer(self, source: int, destination: int, command: int) -> None:
        """Moves 4096 bytes."""
        write = Command.BAR_WRITE
        frames = [
            self._frame(write, SOURCE, source),
            self._frame(write, DESTINATION, destination),
            self._count,
        ]
        self._sock.sendall(b"".join((*frames, self._frame(write, COMMAND, command | RUN), self._poll)))
        state = self._replies(5)
        while state & RUN:
            self._sock.sendall(self._poll)
            state = self._replies(1)

    def _replies(self, count: int) -> int:
        """The value of the last of so many replies."""
        size = HEADER.size + RET.size
        data = self._sock.recv(count * size, socket.MSG_WAITALL)
        assert len(data) == count * size
        values = [RET.unpack_from(data, n * size + HEADER.size)[0] for n in range(count)]
        assert mpqemu.ERROR not in values
        return int(values[-1])

    def _frame(self, command: Command, register: int, value: int) -> bytes:
        return request_frame(command, BAR.pack(self.BAR + register, value, 8, True))


def test_64_mib_both_ways(tmp_path: Path) -> None:
    """Every page of one half of RAM goes through the device to the other half, in another order."""
    half = 64 << 20
    pages = half // 4096
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * half)
    options = ["--name=dma", f"--runtime-dir={tmp_path}", "--device=edu,id=edu0"]
    with mmap.mmap(fd, 2 * half) as ram:
        ram[:half] = random.Random(7).randbytes(half)
        remoted = Child("remoted", options, tmp_path)
        try:
            driver = Driver(str(tmp_path / "edu0.sock"), fd, 2 * half)
            for page in range(pages):
                driver.transfer(page * 4096, BUFFER, 0)
                driver.transfer(BUFFER, half + (page ^ 0x2AA5) * 4096, FROM_DEVICE)
            driver.close()
            assert remoted.end() == 0
        finally:
            remoted.kill()
            os.close(fd)
        for page in range(pages):
            there = half + (page ^ 0x2AA5) * 4096
            assert ram[page * 4096 : (page + 1) * 4096] == ram[there : there + 4096]
    assert "warning" not in remoted.log.read_text()
