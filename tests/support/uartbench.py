# SPDX-License-Identifier: GPL-2.0-or-later
"""The UART alone, with a clock and a line that a test moves."""

from __future__ import annotations

import random

from common import serial_reg as u
from common.uart import Uart16550
from tests.support.clock import FakeClock

CHARACTER = 10 / 9600
"""seconds, with the divisor and format of power-on"""

RLS, TIMEOUT, RDA, THRE, MS, NONE = 0xC6, 0xCC, 0xC4, 0xC2, 0xC0, 0xC1
"""what IIR reads with FIFOs on"""


class UartBench:
    """A UART with a line that is recorded, and may be busy."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.irqs: list[bool] = []
        self.sent = bytearray()
        self.busy = False
        self.input_ready = 0
        self.uart = Uart16550(self.irqs.append, self._transmit, self.clock.call_later, self._input_ready)

    def _transmit(self, byte: int) -> bool:
        if not self.busy:
            self.sent.append(byte)
        return not self.busy

    def _input_ready(self) -> None:
        self.input_ready += 1


def random_write(rng: random.Random, offset: int, size: int) -> int:
    """A little-endian value to write at the offset, which may be outside of the registers.

    Without what QEMU's UART takes otherwise: loopback, and FCR's other bits without its enable bit. LCR is mostly
    without DLAB, which hides everything else, and FCR mostly with the FIFOs on.
    """
    return int.from_bytes([_random_byte(rng, offset + i) for i in range(size)], "little")


def _random_byte(rng: random.Random, offset: int) -> int:
    value = rng.getrandbits(8)
    if offset == u.UART_LCR and rng.random() < 0.7:
        value &= ~u.UART_LCR_DLAB
    elif offset == u.UART_MCR:
        value &= ~u.UART_MCR_LOOP
    elif offset == u.UART_FCR:
        if rng.random() < 0.7:
            value |= u.UART_FCR_ENABLE_FIFO
        if not value & u.UART_FCR_ENABLE_FIFO:
            value = 0
    return value


def fifos(uart: Uart16550, trigger: int = 0) -> None:
    """Turns the FIFOs on; ``trigger`` 0 to 3."""
    uart.write(u.UART_FCR, trigger << 6 | u.UART_FCR_ENABLE_FIFO)


def read_all(uart: Uart16550) -> bytes:
    """Everything the receiver holds."""
    data = bytearray()
    while uart.read(u.UART_LSR) & u.UART_LSR_DR:
        data.append(uart.read(u.UART_RX))
    return bytes(data)
