# SPDX-License-Identifier: GPL-2.0-or-later
"""The 16550A's interrupts: sources, their priorities, and the timeout."""

from __future__ import annotations

import pytest

from common import serial_reg as u
from common.uart import Uart16550
from tests.support.uartbench import CHARACTER, MS, NONE, RDA, RLS, THRE, TIMEOUT, UartBench, fifos, read_all


@pytest.fixture
def bench() -> UartBench:
    return UartBench()


@pytest.fixture
def uart(bench: UartBench) -> Uart16550:
    return bench.uart


class TestInterrupts:
    """Each source: what raises it, what clears it, what enables it."""

    def test_receiver_line_status(self, uart: Uart16550) -> None:
        fifos(uart)
        uart.receive(bytes(17))
        assert not uart.irq
        uart.write(u.UART_IER, u.UART_IER_RLSI)
        assert uart.irq
        assert uart.read(u.UART_IIR) == RLS
        assert uart.irq, "reading IIR must not clear it"
        assert uart.read(u.UART_LSR) & u.UART_LSR_OE
        assert not uart.irq
        assert uart.read(u.UART_IIR) == NONE

    def test_overrun_without_fifo(self, uart: Uart16550) -> None:
        uart.write(u.UART_IER, u.UART_IER_RLSI)
        uart.receive(b"a")
        assert not uart.irq
        uart.receive(b"b")
        assert uart.irq
        assert uart.read(u.UART_LSR) & u.UART_LSR_OE
        assert not uart.irq
        assert uart.read(u.UART_RX) == ord("b"), "the holding register has the last character"

    def test_received_data_without_fifo(self, uart: Uart16550) -> None:
        uart.write(u.UART_IER, u.UART_IER_RDI)
        uart.receive(b"a")
        assert uart.irq
        assert uart.read(u.UART_IIR) == u.UART_IIR_RDI
        assert uart.irq, "reading IIR must not clear it"
        uart.read(u.UART_RX)
        assert not uart.irq

    @pytest.mark.parametrize(("code", "level"), [(0, 1), (1, 4), (2, 8), (3, 14)])
    def test_received_data_at_the_trigger_level(self, uart: Uart16550, code: int, level: int) -> None:
        fifos(uart, code)
        uart.write(u.UART_IER, u.UART_IER_RDI)
        uart.receive(bytes(level - 1))
        assert not uart.irq
        uart.receive(b"x")
        assert uart.irq
        assert uart.read(u.UART_IIR) == RDA
        uart.read(u.UART_RX)
        assert not uart.irq, "one below the trigger level"

    def test_transmitter_empty(self, uart: Uart16550) -> None:
        fifos(uart)
        uart.write(u.UART_IER, u.UART_IER_THRI)
        assert uart.irq
        assert uart.read(u.UART_IIR) == THRE
        assert not uart.irq, "reading IIR clears it"
        assert uart.read(u.UART_IIR) == NONE
        uart.write(u.UART_TX, 1)
        assert uart.irq

    def test_iir_read_clears_only_the_source_it_shows(self, uart: Uart16550) -> None:
        fifos(uart)
        uart.write(u.UART_IER, u.UART_IER_THRI | u.UART_IER_RDI)
        uart.receive(b"x")
        assert uart.read(u.UART_IIR) == RDA
        uart.read(u.UART_RX)
        assert uart.read(u.UART_IIR) == THRE

    def test_enabling_thre_again_raises_it_again(self, uart: Uart16550) -> None:
        uart.write(u.UART_IER, u.UART_IER_THRI)
        uart.read(u.UART_IIR)
        uart.write(u.UART_IER, u.UART_IER_THRI | u.UART_IER_MSI)
        assert not uart.irq, "it was enabled all the time"
        uart.write(u.UART_IER, 0)
        uart.write(u.UART_IER, u.UART_IER_THRI)
        assert uart.irq

    def test_enabling_thre_while_the_transmitter_is_full(self, uart: Uart16550, bench: UartBench) -> None:
        bench.busy = True
        for byte in b"ab":
            uart.write(u.UART_TX, byte)
        uart.write(u.UART_IER, u.UART_IER_THRI)
        assert not uart.irq
        bench.busy = False
        uart.transmit_ready()
        assert uart.irq

    @pytest.mark.parametrize("fcr", [u.UART_FCR_ENABLE_FIFO | u.UART_FCR_CLEAR_XMIT, 0])
    def test_clearing_the_transmitter_raises_thre(self, uart: Uart16550, fcr: int) -> None:
        """As in QEMU, also when it was empty."""
        fifos(uart)
        uart.write(u.UART_IER, u.UART_IER_THRI)
        uart.read(u.UART_IIR)
        assert not uart.irq
        uart.write(u.UART_FCR, fcr)
        assert uart.irq

    def test_thr_write_gives_an_edge(self, uart: Uart16550, bench: UartBench) -> None:
        """On an edge-triggered line a driver that never reads IIR needs a new edge for each character."""
        uart.write(u.UART_IER, u.UART_IER_THRI)
        bench.irqs.clear()
        uart.write(u.UART_TX, 1)
        assert bench.irqs == [False, True]

    def test_modem_status(self, uart: Uart16550) -> None:
        fifos(uart)
        uart.write(u.UART_IER, u.UART_IER_MSI)
        assert not uart.irq
        uart.set_modem_lines(u.UART_MSR_CTS | u.UART_MSR_DSR)
        assert uart.irq
        assert uart.read(u.UART_IIR) == MS
        assert uart.irq, "reading IIR must not clear it"
        assert uart.read(u.UART_MSR) == u.UART_MSR_CTS | u.UART_MSR_DSR | 0x08
        assert not uart.irq

    def test_priorities(self, uart: Uart16550, bench: UartBench) -> None:
        """All five pending: they show in the order of the data sheet's table, and one by one go away."""
        fifos(uart, trigger=1)
        uart.write(u.UART_IER, 0x0F)
        uart.set_modem_lines(0)
        uart.receive(bytes(17))
        bench.clock.advance(5 * CHARACTER)
        assert uart.read(u.UART_IIR) == RLS
        uart.read(u.UART_LSR)
        assert uart.read(u.UART_IIR) == TIMEOUT
        uart.read(u.UART_RX)
        assert uart.read(u.UART_IIR) == RDA
        read_all(uart)
        assert uart.read(u.UART_IIR) == THRE
        assert uart.read(u.UART_IIR) == MS
        assert uart.irq
        uart.read(u.UART_MSR)
        assert uart.read(u.UART_IIR) == NONE
        assert not uart.irq
        assert bench.irqs == [True, False], "INTR stayed high all the time"

    def test_out2_does_not_gate(self, uart: Uart16550) -> None:
        uart.write(u.UART_MCR, 0)
        uart.write(u.UART_IER, u.UART_IER_THRI)
        assert uart.irq


class TestTimeout:
    """Characters below the trigger level are reported after four character times."""

    @pytest.fixture(autouse=True)
    def _enable(self, uart: Uart16550) -> None:
        fifos(uart, trigger=3)
        uart.write(u.UART_IER, u.UART_IER_RDI)

    @pytest.mark.parametrize(
        ("divisor", "lcr", "seconds"),
        [
            (12, 0x03, 40 / 9600),
            (1, 0x03, 40 / 115200),
            (96, 0x00, 28 / 1200),
            (96, 0x1F, 48 / 1200),
            (96, 0x04, 30 / 1200),
            (0, 0x03, 40 / 3500),
        ],
    )
    def test_after_four_characters(
        self, uart: Uart16550, bench: UartBench, divisor: int, lcr: int, seconds: float
    ) -> None:
        uart.write(u.UART_LCR, u.UART_LCR_DLAB)
        uart.write(u.UART_DLL, divisor)
        uart.write(u.UART_LCR, lcr)
        uart.receive(b"ab")
        bench.clock.advance(0.999 * seconds)
        assert not uart.irq
        bench.clock.advance(0.002 * seconds)
        assert uart.irq
        assert uart.read(u.UART_IIR) == TIMEOUT

    @pytest.mark.parametrize(("register", "divisor"), [(u.UART_DLL, 24), (u.UART_DLM, 256 + 12)])
    def test_a_divisor_counts_from_when_it_is_written(
        self, uart: Uart16550, bench: UartBench, register: int, divisor: int
    ) -> None:
        """Not only from the end of DLAB; 8 bits, as LCR says then."""
        uart.write(u.UART_LCR, u.UART_LCR_DLAB | 0x03)
        uart.write(register, 24 if register == u.UART_DLL else 1)
        uart.receive(b"ab")
        assert bench.clock.pending == [pytest.approx(40 * divisor / 115200)]

    def test_begins_anew_with_each_character_and_each_read(self, uart: Uart16550, bench: UartBench) -> None:
        uart.receive(b"ab")
        bench.clock.advance(3 * CHARACTER)
        uart.receive(b"c")
        bench.clock.advance(3 * CHARACTER)
        uart.read(u.UART_RX)
        bench.clock.advance(3 * CHARACTER)
        assert not uart.irq
        bench.clock.advance(2 * CHARACTER)
        assert uart.irq

    def test_a_read_clears_it(self, uart: Uart16550, bench: UartBench) -> None:
        uart.receive(b"ab")
        bench.clock.advance(5 * CHARACTER)
        uart.read(u.UART_RX)
        assert uart.read(u.UART_IIR) == NONE
        bench.clock.advance(5 * CHARACTER)
        assert uart.read(u.UART_IIR) == TIMEOUT

    def test_no_timer_while_there_is_nothing_to_report(self, uart: Uart16550, bench: UartBench) -> None:
        uart.receive(b"ab")
        assert len(bench.clock.pending) == 1
        read_all(uart)
        assert bench.clock.pending == []

    @pytest.mark.parametrize("fcr", [0x00, 0xC3])
    def test_fifo_reset_stops_it(self, uart: Uart16550, bench: UartBench, fcr: int) -> None:
        uart.receive(b"ab")
        bench.clock.advance(5 * CHARACTER)
        uart.write(u.UART_FCR, fcr)
        assert not uart.irq
        uart.write(u.UART_FCR, 0xC1)
        uart.receive(b"ab")
        uart.write(u.UART_FCR, fcr)
        assert bench.clock.pending == []

    def test_masked_by_its_enable_bit(self, uart: Uart16550, bench: UartBench) -> None:
        uart.write(u.UART_IER, 0)
        uart.receive(b"ab")
        bench.clock.advance(5 * CHARACTER)
        assert not uart.irq
        uart.write(u.UART_IER, u.UART_IER_RDI)
        assert uart.read(u.UART_IIR) == TIMEOUT
