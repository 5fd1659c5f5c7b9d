# SPDX-License-Identifier: GPL-2.0-or-later
"""The UART alone, with a clock and a line that a test moves."""

from __future__ import annotations

from common import uart as u
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


def fifos(uart: Uart16550, trigger: int = 0) -> None:
    """Turns the FIFOs on; ``trigger`` 0 to 3."""
    uart.write(u.UART_FCR, trigger << 6 | u.UART_FCR_ENABLE_FIFO)


def read_all(uart: Uart16550) -> bytes:
    """Everything the receiver holds."""
    data = bytearray()
    while uart.read(u.UART_LSR) & u.UART_LSR_DR:
        data.append(uart.read(u.UART_RX))
    return bytes(data)
