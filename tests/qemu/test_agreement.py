# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted's pci-serial beside that of QEMU's remote process: the same accesses, the same answers.

Time stands still for both, or the character timeout of a UART in loopback would come when it pleases.
"""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from common import pci
from common.disposal import Disposal
from common.link import Client
from common.mpqemu import BAR, CONFIG, ERROR, Command
from common.serial_reg import (
    UART_FCR,
    UART_FCR_CLEAR_RCVR,
    UART_FCR_CLEAR_XMIT,
    UART_IIR,
    UART_IIR_NO_INT,
    UART_LCR,
    UART_LSR,
    UART_LSR_DR,
    UART_LSR_OE,
    UART_LSR_TEMT,
    UART_LSR_THRE,
    UART_MCR,
    UART_MCR_LOOP,
    UART_MSR,
    UART_MSR_DCTS,
    UART_MSR_DDCD,
    UART_MSR_DDSR,
    UART_TX,
)
from remoted.devices.pci_serial import PciSerial
from tests.support.remotebench import Peer, RemoteBench
from tests.support.uartbench import random_write
from tests.support.xremote import StockRemote

pytestmark = pytest.mark.usefixtures("requires_qemu")

IO_SPACE = 1 << 16
PORT = 0xC000
BAR_SIZE = 8
LAST_CONFIG = pci.PCI_CONFIG_SIZE - 4
"""the last offset at which QEMU's remote survives an access, of whatever size"""


class Access(NamedTuple):
    """One request; ``name`` is for the reader of a failure."""

    name: str
    command: Command
    payload: bytes
    size: int


def config_read(offset: int, size: int) -> Access:
    payload = CONFIG.pack(offset, 0, size)
    return Access(f"config read of {size} at {offset:#x}", Command.PCI_CFGREAD, payload, size)


def config_write(offset: int, size: int, value: int) -> Access:
    payload = CONFIG.pack(offset, value, size)
    return Access(f"config write of {value:#x}, {size} at {offset:#x}", Command.PCI_CFGWRITE, payload, size)


def port_read(port: int, size: int) -> Access:
    return Access(f"in of {size} at {port:#x}", Command.BAR_READ, BAR.pack(port, 0, size, False), size)


def port_write(port: int, size: int, value: int) -> Access:
    payload = BAR.pack(port, value, size, False)
    return Access(f"out of {value:#x}, {size} at {port:#x}", Command.BAR_WRITE, payload, size)


def memory_read(addr: int, size: int) -> Access:
    return Access(f"read of {size} at {addr:#x}", Command.BAR_READ, BAR.pack(addr, 0, size, True), size)


RESET = Access("reset", Command.DEVICE_RESET, b"", 8)
PLACE = (config_write(pci.PCI_BASE_ADDRESS_0, 4, PORT), config_write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_IO))


class Difference(NamedTuple):
    """An access that is answered otherwise on purpose."""

    before: tuple[Access, ...]
    access: Access
    stock: int
    ours: int
    reason: str
    ends_stock: bool = False
    """whether QEMU's remote process doesn't survive it"""


DIFFERENCES = {
    "byte reads of the last bytes of config space": Difference(
        PLACE,
        config_read(LAST_CONFIG + 1, 1),
        ERROR,
        0,
        "QEMU's remote wants room for four bytes; guests dump config space byte by byte",
        ends_stock=True,
    ),
    "byte writes of the last bytes of config space": Difference(
        PLACE,
        config_write(pci.PCI_CONFIG_SIZE - 1, 1, 1),
        ERROR,
        0,
        "the same",
        ends_stock=True,
    ),
    "config reads of three bytes": Difference(
        PLACE,
        config_read(0, 3),
        0x021B36,
        ERROR,
        "no bus has such an access; other sizes overrun a buffer there",
    ),
    "config reads of none": Difference(PLACE, config_read(0, 0), 0, ERROR, "the same"),
    "port reads that nothing decodes": Difference(
        PLACE,
        port_read(PORT + BAR_SIZE, 1),
        0xFF,
        ERROR,
        "the client asked the wrong one; the guest sees 0xff",
    ),
    "port writes that nothing decodes": Difference(
        PLACE,
        port_write(PORT + BAR_SIZE, 1, 1),
        0,
        ERROR,
        "the client asked the wrong one; the guest sees nothing",
    ),
    "memory reads that nothing decodes": Difference(
        PLACE, memory_read(0xFEB00000, 4), ERROR, ERROR, "a wrong address ends no daemon", ends_stock=True
    ),
    "ports beyond 64 KiB": Difference(
        PLACE, port_read(IO_SPACE, 1), ERROR, ERROR, "a wrong address ends no daemon", ends_stock=True
    ),
    "a BAR beyond 64 KiB": Difference(
        (*PLACE, config_write(pci.PCI_BASE_ADDRESS_0, 4, 0x12340000)),
        port_read(0x12340000 + UART_IIR, 1),
        ERROR,
        UART_IIR_NO_INT,
        "PCI has 32 bits of I/O addresses; how many a host has is the proxy's matter",
        ends_stock=True,
    ),
    "BARs after a reset": Difference(
        (*PLACE, RESET),
        config_read(pci.PCI_BASE_ADDRESS_0, 4),
        PORT | pci.PCI_BASE_ADDRESS_SPACE_IO,
        pci.PCI_BASE_ADDRESS_SPACE_IO,
        "QEMU's remote resets the device alone; the guest's firmware finds config space as it left it",
    ),
    "the command register after a reset": Difference(
        (*PLACE, RESET), config_read(pci.PCI_COMMAND, 2), pci.PCI_COMMAND_IO, 0, "the same"
    ),
    "FIFOs after a reset": Difference(
        (
            *PLACE,
            port_write(PORT + UART_FCR, 1, 1),
            RESET,
            *PLACE,
            port_write(PORT + UART_MCR, 1, UART_MCR_LOOP),
            port_write(PORT + UART_TX, 1, 1),
            port_write(PORT + UART_TX, 1, 2),
        ),
        port_read(PORT + UART_LSR, 1),
        UART_LSR_DR | UART_LSR_THRE | UART_LSR_TEMT,
        UART_LSR_DR | UART_LSR_OE | UART_LSR_THRE | UART_LSR_TEMT,
        "the chip's reset disables them, so that the second character overruns the first",
    ),
    "changes of the modem inputs in loopback": Difference(
        (*PLACE, port_write(PORT + UART_MCR, 1, UART_MCR_LOOP)),
        port_read(PORT + UART_MSR, 1),
        0,
        UART_MSR_DDCD | UART_MSR_DDSR | UART_MSR_DCTS,
        "the chip's inputs change when they are wired to its outputs, and it interrupts",
    ),
    "FIFO resets without the enable bit": Difference(
        (
            *PLACE,
            port_write(PORT + UART_MCR, 1, UART_MCR_LOOP),
            port_write(PORT + UART_TX, 1, 1),
            port_write(PORT + UART_FCR, 1, UART_FCR_CLEAR_RCVR | UART_FCR_CLEAR_XMIT),
        ),
        port_read(PORT + UART_LSR, 1),
        UART_LSR_THRE | UART_LSR_TEMT,
        UART_LSR_DR | UART_LSR_THRE | UART_LSR_TEMT,
        "the chip ignores the other bits without it; a received character is lost otherwise",
    ),
}


class Pair:
    """The two devices."""

    def __init__(self, ours: Peer, remote: StockRemote, stock: Client) -> None:
        self.remote = remote
        self._ours = ours
        self._stock = stock
        self._done: list[str] = []

    def stock(self, access: Access) -> int:
        return self._stock.request(access.command, access.payload)

    def ours(self, access: Access) -> int:
        return self._ours.call(access.command, access.payload)

    def same(self, access: Access) -> int:
        """The answer, which must be the same."""
        self._done.append(access.name)
        stock, ours = self.stock(access), self.ours(access)
        if access.command in (Command.PCI_CFGREAD, Command.BAR_READ):
            # The client takes the bytes that it has asked for.
            mask = (1 << 8 * access.size) - 1
            stock, ours = stock & mask, ours & mask
        elif access.command is Command.BAR_WRITE:
            return 0  # Whether it has reached a register shows when that is read.
        assert f"{ours:#x}" == f"{stock:#x}", "; ".join(self._done[-12:])
        return ours


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    bench = RemoteBench(tmp_path)
    bench.add(PciSerial, "com1", 0x28)
    client, link = socket.socketpair()
    with StockRemote(link, ["-S"]) as remote, bench.connect("com1") as peer:
        stock = Client(client, deadline=20.0, disposal=Disposal())
        yield Pair(peer, remote, stock)
        stock.close()
    bench.close()


def test_power_on_values(pair: Pair) -> None:
    for offset in range(0, pci.PCI_CONFIG_SIZE, 4):
        pair.same(config_read(offset, 4))
    for access in PLACE:
        pair.same(access)
    for register in range(BAR_SIZE):
        pair.same(port_read(PORT + register, 1))


def test_every_config_bit_alone(pair: Pair) -> None:
    for offset, bit in itertools.product(range(LAST_CONFIG + 1), range(8)):
        before = pair.same(config_read(offset, 1))
        for value in (before ^ 1 << bit, before):
            pair.same(config_write(offset, 1, value))
            pair.same(config_read(offset & ~3, 4))


@pytest.mark.parametrize("seed", range(4))
def test_random_accesses(pair: Pair, seed: int) -> None:
    """5,000 a seed, to all of config space, to the registers wherever their BAR is, and around them."""
    rng = random.Random(seed)
    for access in PLACE:
        pair.same(access)
    for _ in range(5000):
        pair.same(_random_access(rng, _base(pair)))
    for access in (*PLACE, port_write(PORT + UART_LCR, 1, 0)):
        pair.same(access)
    for register in range(BAR_SIZE):
        pair.same(port_read(PORT + register, 1))
    for offset in range(0, pci.PCI_CONFIG_SIZE, 4):
        pair.same(config_read(offset, 4))


@pytest.mark.parametrize("case", DIFFERENCES)
def test_intended_difference(pair: Pair, case: str) -> None:
    """The answers of both are still as the table says."""
    difference = DIFFERENCES[case]
    for access in difference.before:
        pair.stock(access)
        pair.ours(access)
    assert pair.ours(difference.access) == difference.ours, difference.reason
    assert pair.stock(difference.access) == difference.stock
    assert pair.ours(config_read(0, 4)) == 0x00021B36
    if difference.ends_stock:
        pair.remote.process.wait(20.0)
    else:
        assert pair.stock(config_read(0, 4)) == 0x00021B36


def _base(pair: Pair) -> int:
    return pair.ours(config_read(pci.PCI_BASE_ADDRESS_0, 4)) & pci.PCI_BASE_ADDRESS_IO_MASK


def _random_access(rng: random.Random, base: int) -> Access:
    choice = rng.random()
    size = rng.choice((1, 1, 1, 2, 4))
    if choice < 0.10:
        return config_read(rng.randint(0, LAST_CONFIG), size)
    if choice < 0.20:
        return config_write(rng.randint(0, LAST_CONFIG), size, rng.getrandbits(32))
    if choice < 0.30:
        return _random_placing(rng)
    if base + 4 * BAR_SIZE > IO_SPACE or rng.random() < 0.02:
        port = rng.randrange(IO_SPACE - size)
    elif rng.random() < 0.05:
        port = max(0, base + rng.randint(-4, BAR_SIZE + 4))
    else:
        port = base + rng.randint(0, BAR_SIZE - size)
    if choice < 0.65:
        return port_read(port, size)
    return port_write(port, size, random_write(rng, port - base, size))


def _random_placing(rng: random.Random) -> Access:
    """Makes it likely that the registers can be reached."""
    choice = rng.random()
    if choice < 0.5:
        command = rng.getrandbits(16) | pci.PCI_COMMAND_IO
        return config_write(pci.PCI_COMMAND, rng.choice((1, 2)), command)
    if choice < 0.9:
        return config_write(pci.PCI_BASE_ADDRESS_0, 4, rng.randrange(IO_SPACE))
    return config_write(pci.PCI_BASE_ADDRESS_0, 4, rng.choice((0, 0xFFFFFFFF, rng.getrandbits(32))))
