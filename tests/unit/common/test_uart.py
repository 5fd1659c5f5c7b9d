# SPDX-License-Identifier: GPL-2.0-or-later
"""The 16550A: registers, FIFOs, a busy line, loopback, modem lines."""

from __future__ import annotations

import pytest

from common import uart as u
from common.uart import Uart16550
from tests.support.uartbench import NONE, UartBench, fifos, read_all


@pytest.fixture
def bench() -> UartBench:
    return UartBench()


@pytest.fixture
def uart(bench: UartBench) -> Uart16550:
    return bench.uart


def test_power_on(uart: Uart16550, bench: UartBench) -> None:
    assert [uart.read(offset) for offset in range(8)] == [0, 0, 0x01, 0, 0x08, 0x60, 0xB0, 0]
    assert not uart.irq
    assert bench.irqs == []


@pytest.mark.parametrize(("offset", "mask"), [(u.UART_IER, 0x0F), (u.UART_LCR, 0xFF), (u.UART_SCR, 0xFF)])
def test_plain_registers(uart: Uart16550, offset: int, mask: int) -> None:
    """All bits that there are can be written, and nothing else changes."""
    before = [uart.read(other) for other in range(1, 8) if other not in (offset, u.UART_IIR)]
    for value in (0xFF, 0x55, 0xAA, 0):
        uart.write(offset, value)
        assert uart.read(offset) == value & mask
    assert [uart.read(other) for other in range(1, 8) if other not in (offset, u.UART_IIR)] == before


def test_lsr_and_msr_are_read_only(uart: Uart16550) -> None:
    for offset, value in ((u.UART_LSR, 0x60), (u.UART_MSR, 0xB0)):
        uart.write(offset, ~value)
        assert uart.read(offset) == value


def test_divisor_latch(uart: Uart16550, bench: UartBench) -> None:
    """DLAB puts the divisor before RBR, THR and IER."""
    uart.write(u.UART_IER, u.UART_IER_RLSI)
    uart.receive(b"x")
    uart.write(u.UART_LCR, u.UART_LCR_DLAB)
    assert (uart.read(u.UART_DLL), uart.read(u.UART_DLM)) == (12, 0)
    uart.write(u.UART_DLL, 0x34)
    uart.write(u.UART_DLM, 0x12)
    assert (uart.read(u.UART_DLL), uart.read(u.UART_DLM)) == (0x34, 0x12)
    uart.write(u.UART_LCR, 0)
    assert uart.read(u.UART_IER) == u.UART_IER_RLSI
    assert uart.read(u.UART_RX) == ord("x")
    assert bench.sent == b""


def test_transmit(uart: Uart16550, bench: UartBench) -> None:
    for byte in b"hello":
        uart.write(u.UART_TX, byte)
        assert uart.read(u.UART_LSR) == u.UART_LSR_THRE | u.UART_LSR_TEMT
    assert bench.sent == b"hello"


class TestFifos:
    def test_order_and_capacity(self, uart: Uart16550) -> None:
        fifos(uart)
        uart.receive(bytes(range(20)))
        assert uart.read(u.UART_LSR) & u.UART_LSR_OE
        assert not uart.read(u.UART_LSR) & u.UART_LSR_OE, "reading LSR clears it"
        assert read_all(uart) == bytes(range(16)), "an overrun loses the new character, not an old one"
        assert uart.read(u.UART_RX) == 0

    def test_iir_shows_that_they_are_on(self, uart: Uart16550) -> None:
        fifos(uart)
        assert uart.read(u.UART_IIR) == NONE
        uart.write(u.UART_FCR, 0)
        assert uart.read(u.UART_IIR) == u.UART_IIR_NO_INT

    @pytest.mark.parametrize("fcr", [u.UART_FCR_ENABLE_FIFO | u.UART_FCR_CLEAR_RCVR, 0])
    def test_receiver_reset(self, uart: Uart16550, fcr: int) -> None:
        fifos(uart)
        uart.receive(b"abc")
        uart.write(u.UART_FCR, fcr)
        assert uart.read(u.UART_LSR) == u.UART_LSR_THRE | u.UART_LSR_TEMT
        uart.receive(b"d")
        assert read_all(uart) == b"d"

    def test_a_clear_bit_clears_only_its_fifo(self, uart: Uart16550, bench: UartBench) -> None:
        fifos(uart)
        uart.receive(b"abc")
        uart.write(u.UART_FCR, u.UART_FCR_ENABLE_FIFO | u.UART_FCR_CLEAR_XMIT)
        assert read_all(uart) == b"abc"
        bench.busy = True
        for byte in b"xyz":
            uart.write(u.UART_TX, byte)
        uart.write(u.UART_FCR, u.UART_FCR_ENABLE_FIFO | u.UART_FCR_CLEAR_RCVR)
        bench.busy = False
        uart.transmit_ready()
        assert bench.sent == b"xyz"

    def test_transmitter_reset_leaves_the_shift_register(self, uart: Uart16550, bench: UartBench) -> None:
        fifos(uart)
        bench.busy = True
        for byte in b"xyz":
            uart.write(u.UART_TX, byte)
        uart.write(u.UART_FCR, u.UART_FCR_ENABLE_FIFO | u.UART_FCR_CLEAR_XMIT)
        assert uart.read(u.UART_LSR) == u.UART_LSR_THRE
        bench.busy = False
        uart.transmit_ready()
        assert bench.sent == b"x"
        assert uart.read(u.UART_LSR) == u.UART_LSR_THRE | u.UART_LSR_TEMT
        uart.write(u.UART_TX, ord("w"))
        assert bench.sent == b"xw"

    @pytest.mark.parametrize(("code", "level"), [(0, 1), (1, 4), (2, 8), (3, 14)])
    def test_room_is_offered_up_to_the_trigger_level(self, uart: Uart16550, code: int, level: int) -> None:
        fifos(uart, code)
        assert uart.can_receive() == level
        uart.receive(bytes(level - 1))
        assert uart.can_receive() == 1
        uart.receive(b"x")
        assert uart.can_receive() == 0
        uart.read(u.UART_RX)
        assert uart.can_receive() == 1

    def test_room_without_fifos(self, uart: Uart16550, bench: UartBench) -> None:
        assert uart.can_receive() == 1
        uart.receive(b"x")
        assert uart.can_receive() == 0
        bench.input_ready = 0
        uart.read(u.UART_RX)
        assert uart.can_receive() == 1
        assert bench.input_ready

    @pytest.mark.parametrize(("offset", "value"), [(u.UART_FCR, 0x43), (u.UART_MCR, 0)])
    def test_input_is_told_when_room_appears(
        self, uart: Uart16550, bench: UartBench, offset: int, value: int
    ) -> None:
        uart.write(u.UART_MCR, u.UART_MCR_LOOP if offset == u.UART_MCR else 0)
        fifos(uart)
        if offset == u.UART_FCR:
            uart.receive(b"x")
        assert uart.can_receive() == 0
        bench.input_ready = 0
        uart.write(offset, value)
        assert uart.can_receive() > 0
        assert bench.input_ready


class TestBusyLine:
    """What the line refuses stays in the chip, and the guest can tell."""

    def test_without_fifos(self, uart: Uart16550, bench: UartBench) -> None:
        bench.busy = True
        uart.write(u.UART_TX, ord("a"))
        assert uart.read(u.UART_LSR) == u.UART_LSR_THRE, "it sits in the shift register"
        uart.write(u.UART_TX, ord("b"))
        assert uart.read(u.UART_LSR) == 0
        uart.transmit_ready()
        assert uart.read(u.UART_LSR) == 0, "still busy"
        bench.busy = False
        uart.transmit_ready()
        assert uart.read(u.UART_LSR) == u.UART_LSR_THRE | u.UART_LSR_TEMT
        assert bench.sent == b"ab"

    def test_thre_interrupt_comes_when_the_fifo_is_empty(self, uart: Uart16550, bench: UartBench) -> None:
        fifos(uart)
        uart.write(u.UART_IER, u.UART_IER_THRI)
        bench.busy = True
        for byte in range(3):
            uart.write(u.UART_TX, byte)
        assert not uart.irq
        bench.busy = False
        uart.transmit_ready()
        assert uart.irq
        assert bench.sent == bytes(range(3))

    def test_an_overfull_fifo_loses_the_oldest(self, uart: Uart16550, bench: UartBench) -> None:
        fifos(uart)
        bench.busy = True
        for byte in range(20):
            uart.write(u.UART_TX, byte)
        bench.busy = False
        uart.transmit_ready()
        assert bench.sent == bytes([0, *range(4, 20)])

    def test_ready_without_need_sends_nothing(self, uart: Uart16550, bench: UartBench) -> None:
        uart.write(u.UART_TX, 1)
        uart.transmit_ready()
        assert bench.sent == b"\1"


class TestLoopback:
    def test_data_comes_back_and_stays_off_the_line(self, uart: Uart16550, bench: UartBench) -> None:
        fifos(uart)
        uart.write(u.UART_MCR, u.UART_MCR_LOOP)
        for byte in b"loop":
            uart.write(u.UART_TX, byte)
        assert read_all(uart) == b"loop"
        assert bench.sent == b""

    @pytest.mark.parametrize(
        ("output", "line"),
        [
            (u.UART_MCR_DTR, u.UART_MSR_DSR),
            (u.UART_MCR_RTS, u.UART_MSR_CTS),
            (u.UART_MCR_OUT1, u.UART_MSR_RI),
            (u.UART_MCR_OUT2, u.UART_MSR_DCD),
        ],
    )
    def test_modem_outputs_are_the_inputs(self, uart: Uart16550, output: int, line: int) -> None:
        uart.write(u.UART_MCR, u.UART_MCR_LOOP | output)
        assert uart.read(u.UART_MSR) == line
        uart.write(u.UART_MCR, output)
        assert uart.read(u.UART_MSR) == 0xB0, "the real inputs are back, without deltas"

    def test_interrupts_work(self, uart: Uart16550) -> None:
        uart.write(u.UART_MCR, u.UART_MCR_LOOP)
        uart.write(u.UART_IER, u.UART_IER_RDI)
        uart.write(u.UART_TX, ord("x"))
        assert uart.irq
        assert uart.read(u.UART_RX) == ord("x")
        assert not uart.irq

    def test_the_line_is_off(self, uart: Uart16550) -> None:
        uart.write(u.UART_MCR, u.UART_MCR_LOOP)
        assert uart.can_receive() == 0
        uart.write(u.UART_MCR, 0)
        assert uart.can_receive() == 1


class TestModemLines:
    @pytest.mark.parametrize(
        ("line", "delta"), [(u.UART_MSR_CTS, 0x01), (u.UART_MSR_DSR, 0x02), (u.UART_MSR_DCD, 0x08)]
    )
    def test_a_change_either_way_sets_its_delta(self, uart: Uart16550, line: int, delta: int) -> None:
        uart.set_modem_lines(0xB0 & ~line)
        assert uart.read(u.UART_MSR) == 0xB0 & ~line | delta
        assert uart.read(u.UART_MSR) == 0xB0 & ~line, "reading clears it"
        uart.set_modem_lines(0xB0)
        assert uart.read(u.UART_MSR) == 0xB0 | delta

    def test_ring_counts_when_it_ends(self, uart: Uart16550) -> None:
        uart.set_modem_lines(0xF0)
        assert uart.read(u.UART_MSR) == 0xF0
        uart.set_modem_lines(0xB0)
        assert uart.read(u.UART_MSR) == 0xB0 | u.UART_MSR_TERI

    def test_a_delta_stays_when_the_line_returns(self, uart: Uart16550) -> None:
        uart.set_modem_lines(0x30)
        uart.set_modem_lines(0xB0)
        uart.set_modem_lines(0xB0)
        assert uart.read(u.UART_MSR) == 0xB8


def test_reset(uart: Uart16550, bench: UartBench) -> None:
    """Everything goes back to power-on, except for the modem inputs: they are pins."""
    fifos(uart, trigger=3)
    for offset in (u.UART_LCR, u.UART_MCR, u.UART_SCR):
        uart.write(offset, 0x1F)
    uart.write(u.UART_IER, 0x0F)
    uart.set_modem_lines(0x30)
    bench.busy = True
    uart.write(u.UART_MCR, 0)
    uart.write(u.UART_TX, ord("x"))
    uart.receive(b"abc")
    assert uart.irq
    uart.reset()
    assert not uart.irq
    assert bench.irqs[-1] is False
    assert bench.clock.pending == []
    assert [uart.read(offset) for offset in range(8)] == [0, 0, 0x01, 0, 0x08, 0x60, 0x30, 0]
    bench.busy = False
    uart.transmit_ready()
    assert bench.sent == b""
    uart.receive(b"a")
    assert uart.can_receive() == 0, "the FIFOs are off"
