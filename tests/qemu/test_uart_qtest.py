# SPDX-License-Identifier: GPL-2.0-or-later
"""The UART beside that of a real QEMU: the same accesses and characters, the same answers and interrupts."""

from __future__ import annotations

import fcntl
import random
import socket
import struct
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.serial_reg import (
    UART_FCR,
    UART_FCR_ENABLE_FIFO,
    UART_IER,
    UART_IIR,
    UART_LCR,
    UART_LSR,
    UART_MCR,
    UART_MCR_LOOP,
    UART_MSR,
    UART_RX,
    UART_TX,
)
from common.uart import Uart16550
from tests.support.clock import FakeClock
from tests.support.qemu import PATIENCE
from tests.support.qtest import Qtest
from tests.support.uartbench import random_write

pytestmark = pytest.mark.usefixtures("requires_qemu")

BASE = 0x3F8
IRQ = 4
UART_EFR = 2
"""of other chips, with LCR at 0xBF"""
PIT_IRQ = 0
PIT_HZ = 1193182
PIT_COUNTER_0 = 0x40
PIT_CONTROL = 0x43
PIT_ONE_SHOT = 0x30
"""counter 0, both bytes, mode 0: OUT goes high once, when the count has ended"""


class Pair:
    """The two UARTs and the far ends of their lines."""

    def __init__(self, qtest: Qtest, line: socket.socket) -> None:
        self.qtest = qtest
        self.line = line
        self.clock = FakeClock()
        self.irqs: list[tuple[int, bool]] = []
        self.sent = bytearray()
        self.uart = Uart16550(self._set_irq, self._transmit, self.clock.call_later)

    def read(self, offset: int, size: int = 1, mask: int = 0xFFFFFFFF) -> int:
        """Reads both, checks that they agree in the bits of the mask, and returns these."""
        value = int.from_bytes([self.uart.read(offset + i) for i in range(size)], "little") & mask
        theirs = self.qtest.inp(BASE + offset, size) & mask
        assert value == theirs, f"read of {size} at {offset}: {value:#x}, QEMU has {theirs:#x}"
        return value

    def write(self, offset: int, value: int, size: int = 1) -> None:
        for i in range(size):
            self.uart.write(offset + i, value >> 8 * i)
        self.qtest.out(BASE + offset, size, value)

    def receive(self, data: bytes) -> None:
        """Characters arrive at both; there must be room for them."""
        self.line.sendall(data)
        # While QEMU has not read them they are in our output queue; a command's answer comes after a pass
        # of its main loop.
        for _ in range(10000):
            if not _unsent(self.line):
                break
            self.qtest.command("endianness")
        else:
            raise AssertionError("QEMU's UART has no room")
        self.uart.receive(data)

    def start_pit(self, seconds: float) -> None:
        """QEMU's timer raises its interrupt when so much virtual time has passed."""
        count = round(seconds * PIT_HZ)
        self.qtest.out(PIT_CONTROL, 1, PIT_ONE_SHOT)
        self.qtest.out(PIT_COUNTER_0, 1, count & 0xFF)
        self.qtest.out(PIT_COUNTER_0, 1, count >> 8)

    def check_irqs(self) -> None:
        """Both have raised and lowered their lines in the same order."""
        self.qtest.command("endianness")
        theirs = [irq for irq in self.qtest.irqs if irq[0] == IRQ]
        assert self.irqs == theirs
        self.irqs.clear()
        self.qtest.irqs.clear()

    def check_sent(self) -> None:
        """What QEMU's UART has transmitted by now is what ours has."""
        received = bytearray()
        while len(received) < len(self.sent):
            received += self.line.recv(1 << 16)
        assert received == self.sent
        self.sent.clear()

    def _set_irq(self, level: bool) -> None:
        self.irqs.append((IRQ, level))

    def _transmit(self, byte: int) -> bool:
        self.sent.append(byte)
        return True


def _unsent(line: socket.socket) -> int:
    (count,) = struct.unpack("i", fcntl.ioctl(line, termios.TIOCOUTQ, bytes(4)))
    return int(count)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "line"))
        listener.listen()
        listener.settimeout(PATIENCE)
        args = ("-chardev", f"socket,id=line,path={tmp_path}/line", "-device", "isa-serial,chardev=line")
        with Qtest(tmp_path, args) as qtest:
            line, _ = listener.accept()
            line.settimeout(PATIENCE)
            with line:
                yield Pair(qtest, line)


def test_power_on_values(pair: Pair) -> None:
    values = [pair.read(offset) for offset in range(8)]
    assert values == [0, 0, 0x01, 0, 0x08, 0x60, 0xB0, 0]
    pair.write(UART_LCR, 0x80)
    assert pair.read(0, 2) == 12


@pytest.mark.parametrize("seed", range(4))
def test_random_accesses(pair: Pair, seed: int) -> None:
    """Any access of any size, with characters that arrive in between."""
    rng = random.Random(seed)
    for _ in range(3000):
        _random_step(pair, rng)
        pair.check_irqs()
    pair.check_sent()


@pytest.mark.parametrize(
    ("divisor", "lcr"), [(None, None), (1, 0x03), (12, 0x00), (24, 0x1F), (7, 0x0B), (0, 0x02)]
)
def test_character_timeout(pair: Pair, divisor: int | None, lcr: int | None) -> None:
    """QEMU's comes when ours does, to within two hundredths."""
    if lcr is not None and divisor is not None:
        pair.write(UART_LCR, 0x80)
        pair.write(0, divisor, 2)
        pair.write(UART_LCR, lcr)
    pair.write(UART_IER, 0x01)
    for factor, order in ((0.98, [PIT_IRQ, IRQ]), (1.02, [IRQ, PIT_IRQ])):
        pair.write(UART_FCR, 0x83)
        pair.receive(b"abc")
        (timeout,) = pair.clock.pending
        pair.qtest.irqs.clear()
        pair.start_pit(factor * timeout)
        pair.qtest.run_until_irqs({IRQ, PIT_IRQ})
        assert [pin for pin, level in pair.qtest.irqs if level and pin in order] == order
        pair.clock.advance(timeout)
        assert pair.read(UART_IIR) == 0xCC
        pair.read(UART_RX)
        assert pair.read(UART_IIR) == 0xC1


@pytest.mark.parametrize("seed", range(4))
def test_loopback(pair: Pair, seed: int) -> None:
    """Characters go round, more than the FIFO holds; modem outputs come back as inputs. QEMU ignores changes."""
    rng = random.Random(seed)
    pair.write(UART_MCR, UART_MCR_LOOP)
    pair.uart.read(UART_MSR)
    pair.write(UART_IER, 0x07)
    for _ in range(500):
        match rng.randrange(5):
            case 0:
                pair.write(UART_FCR, rng.choice((0, 0x01, 0x41, 0x81, 0xC1, 0xC3, 0xC5)))
            case 1:
                pair.write(UART_MCR, UART_MCR_LOOP | rng.randrange(16))
                pair.uart.read(UART_MSR)
            case 2:
                for byte in rng.randbytes(rng.randint(1, 20)):
                    pair.write(UART_TX, byte)
            case 3:
                for _ in range(rng.randint(1, 20)):
                    pair.read(UART_RX)
            case 4:
                pair.write(UART_IER, rng.randrange(8))
        pair.check_irqs()
        for register in range(1, 8):
            pair.read(register)
        pair.check_irqs()
    assert pair.sent == b""


def test_linux_finds_a_16550a(pair: Pair) -> None:
    """The accesses of autoconfig() and serial8250_do_startup() in Linux's drivers/tty/serial/8250/8250_port.c."""
    ier = pair.read(UART_IER)
    pair.write(UART_IER, 0)
    assert pair.read(UART_IER, mask=0x0F) == 0
    pair.write(UART_IER, 0x0F)
    assert pair.read(UART_IER, mask=0x0F) == 0x0F
    pair.write(UART_IER, ier)
    mcr, lcr = pair.read(UART_MCR), pair.read(UART_LCR)
    pair.write(UART_MCR, UART_MCR_LOOP | 0x0A)
    assert pair.read(UART_MSR, mask=0xF0) == 0x90, "the loopback test: DCD and CTS alone"
    pair.write(UART_MCR, mcr)
    pair.write(UART_LCR, 0xBF)
    pair.write(UART_EFR, 0)
    pair.write(UART_LCR, 0)
    pair.write(UART_FCR, UART_FCR_ENABLE_FIFO)
    assert pair.read(UART_IIR) >> 6 == 3, "a 16550A, whose FIFOs work"
    for value in (0x80, 0xBF):
        pair.write(UART_LCR, value)
        assert pair.read(UART_EFR) != 0, "none of the chips with an EFR"
    pair.write(UART_LCR, 0)
    for line_control in (0, 0x80):
        pair.write(UART_LCR, line_control)
        pair.write(UART_FCR, UART_FCR_ENABLE_FIFO)
        before = pair.read(UART_IIR) >> 5
        pair.write(UART_FCR, UART_FCR_ENABLE_FIFO | 0x20)
        assert (before, pair.read(UART_IIR) >> 5) == (6, 6), "no FIFO of 64 bytes"
        pair.write(UART_FCR, UART_FCR_ENABLE_FIFO)
    pair.write(UART_LCR, 0)
    ier = pair.read(UART_IER)
    for value in (ier & ~0x40, ier | 0x40):
        pair.write(UART_IER, value)
        assert not pair.read(UART_IER) & 0x40, "no XScale"
    pair.write(UART_LCR, lcr)

    for value in (0x01, 0x07, 0x00):
        pair.write(UART_FCR, value)
    for _ in range(2):
        assert pair.read(UART_LSR) == 0x60
        pair.read(UART_RX)
        pair.read(UART_IIR)
        pair.read(UART_MSR, mask=0xF0)
        pair.write(UART_LCR, 0x03)
        pair.write(UART_MCR, 0x08)
        for _ in range(2):
            pair.write(UART_IER, 0x02)
            assert pair.read(UART_IIR) == 0x02, "THRE interrupts each time that it is enabled"
            pair.write(UART_IER, 0)
    pair.check_irqs()
    pair.write(UART_IER, 0x0D)
    pair.write(UART_FCR, 0x81)
    pair.receive(b"login")
    assert pair.read(UART_IIR) == 0xC1
    pair.receive(b"123")
    assert pair.read(UART_IIR) == 0xC4
    pair.check_irqs()


def _random_step(pair: Pair, rng: random.Random) -> None:
    choice = rng.random()
    if choice < 0.08:
        room = pair.uart.can_receive()
        if room:
            pair.receive(rng.randbytes(rng.randint(1, room)))
        return
    size = rng.choice((1, 1, 1, 1, 2, 4))
    offset = rng.randint(0, 8 - size)
    if choice < 0.55:
        pair.read(offset, size)
    else:
        pair.write(offset, random_write(rng, offset, size), size)
