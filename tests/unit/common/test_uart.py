# SPDX-License-Identifier: GPL-2.0-or-later
"""The 16550A: registers, FIFOs, a busy line, loopback, modem lines."""

from __future__ import annotations

import pytest

from common import serial_reg as u
from common.uart import Uart16550
from tests.support.uartbench import CHARACTER, NONE, RDA, RLS, TIMEOUT, UartBench, fifos, read_all

LOOP_WIRES = (
    (u.UART_MCR_DTR, u.UART_MSR_DSR, 0x02),
    (u.UART_MCR_RTS, u.UART_MSR_CTS, 0x01),
    (u.UART_MCR_OUT1, u.UART_MSR_RI, 0x04),
    (u.UART_MCR_OUT2, u.UART_MSR_DCD, 0x08),
)
"""each modem output, the input that it is in loopback, and that one's delta bit (PC16550D, 8.6)"""


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


def test_mcr_has_five_bits(uart: Uart16550) -> None:
    uart.write(u.UART_MCR, 0xFF)
    assert uart.read(u.UART_MCR) == 0x1F


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
    uart.write(u.UART_DLL, 0x56)
    assert (uart.read(u.UART_DLL), uart.read(u.UART_DLM)) == (0x56, 0x12)
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

    @pytest.mark.parametrize("fcr", range(0, 0x100, 2))
    def test_without_the_enable_bit_no_other_counts(
        self, uart: Uart16550, bench: UartBench, fcr: int
    ) -> None:
        """PC16550D, 8.4, bit 0: nothing is cleared, nothing interrupts, no trigger level is set."""
        uart.write(u.UART_IER, u.UART_IER_THRI)
        uart.read(u.UART_IIR)
        bench.busy = True
        for byte in b"ab":
            uart.write(u.UART_TX, byte)
        uart.receive(b"x")
        uart.write(u.UART_FCR, fcr)
        assert not uart.irq
        assert uart.read(u.UART_IIR) == u.UART_IIR_NO_INT
        assert read_all(uart) == b"x"
        bench.busy = False
        uart.transmit_ready()
        assert bench.sent == b"ab"
        assert uart.can_receive() == 1

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

    def test_room_above_the_trigger_level(self, uart: Uart16550) -> None:
        """One at a time where the guest has lowered it, and none once the FIFO is full."""
        fifos(uart, 3)
        uart.receive(bytes(14))
        uart.write(u.UART_FCR, u.UART_FCR_ENABLE_FIFO)
        for _ in range(2):
            assert uart.can_receive() == 1
            uart.receive(b"x")
        assert uart.can_receive() == 0

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

    @pytest.mark.parametrize(("output", "line", "delta"), LOOP_WIRES)
    def test_modem_outputs_are_the_inputs(self, uart: Uart16550, output: int, line: int, delta: int) -> None:
        """With their deltas, each of which a read of MSR clears."""
        uart.write(u.UART_MCR, u.UART_MCR_LOOP)
        uart.read(u.UART_MSR)
        uart.write(u.UART_MCR, u.UART_MCR_LOOP | output)
        assert uart.read(u.UART_MSR) == line | (delta & ~u.UART_MSR_TERI)
        assert uart.read(u.UART_MSR) == line
        uart.write(u.UART_MCR, u.UART_MCR_LOOP)
        assert uart.read(u.UART_MSR) == delta, "RI counts when it goes off"
        assert uart.read(u.UART_MSR) == 0

    @pytest.mark.parametrize("pins", range(0, 0x100, 0x10))
    @pytest.mark.parametrize("mcr", range(0x10))
    def test_entering_and_leaving_it_changes_the_inputs(self, uart: Uart16550, pins: int, mcr: int) -> None:
        """Those that differ between pins and outputs have changed."""
        uart.write(u.UART_MCR, mcr)
        uart.set_modem_lines(pins)
        uart.read(u.UART_MSR)
        looped = sum(line for output, line, _ in LOOP_WIRES if mcr & output)
        for before, after, value in ((pins, looped, mcr | u.UART_MCR_LOOP), (looped, pins, mcr)):
            uart.write(u.UART_MCR, value)
            changed = sum(
                delta
                for _, line, delta in LOOP_WIRES
                if (before ^ after) & line and not (line == u.UART_MSR_RI and after & line)
            )
            assert uart.read(u.UART_MSR) == after | changed
            assert uart.read(u.UART_MSR) == after

    def test_the_pins_are_disconnected(self, uart: Uart16550) -> None:
        """They neither interrupt nor show; what they are at its end counts."""
        uart.write(u.UART_MCR, u.UART_MCR_LOOP | 0x0B)
        uart.write(u.UART_IER, u.UART_IER_MSI)
        uart.read(u.UART_MSR)
        for pins in (0, 0xF0, 0x40, 0xB0, 0x30):
            uart.set_modem_lines(pins)
            assert not uart.irq
            assert uart.read(u.UART_MSR) == 0xB0
        uart.write(u.UART_MCR, 0x0B)
        assert uart.irq
        assert uart.read(u.UART_MSR) == 0x38
        assert not uart.irq

    def test_modem_interrupt(self, uart: Uart16550) -> None:
        """From the outputs, under the control of IER; an enabled one that is pending rises."""
        uart.write(u.UART_MCR, u.UART_MCR_LOOP)
        uart.read(u.UART_MSR)
        uart.write(u.UART_MCR, u.UART_MCR_LOOP | u.UART_MCR_RTS)
        assert not uart.irq
        uart.write(u.UART_IER, u.UART_IER_MSI)
        assert uart.irq
        assert uart.read(u.UART_IIR) == u.UART_IIR_MSI
        assert uart.read(u.UART_MSR) == u.UART_MSR_CTS | 0x01
        assert not uart.irq
        uart.write(u.UART_MCR, u.UART_MCR_LOOP)
        assert uart.irq

    def test_reset_ends_it(self, uart: Uart16550) -> None:
        uart.write(u.UART_MCR, u.UART_MCR_LOOP)
        uart.reset()
        assert uart.read(u.UART_MSR) == 0xB0, "without deltas"
        assert uart.can_receive() == 1

    def test_fifo_and_overrun_in_it(self, uart: Uart16550, bench: UartBench) -> None:
        """The receiver's trigger level, timeout and error, and the transmitter's status."""
        fifos(uart, trigger=1)
        uart.write(u.UART_IER, u.UART_IER_RDI | u.UART_IER_RLSI)
        uart.write(u.UART_MCR, u.UART_MCR_LOOP)
        for count in range(1, 5):
            assert not uart.irq
            uart.write(u.UART_TX, count)
            assert uart.read(u.UART_LSR) == u.UART_LSR_THRE | u.UART_LSR_TEMT | u.UART_LSR_DR
        assert uart.read(u.UART_IIR) == RDA
        uart.read(u.UART_RX)
        assert not uart.irq
        bench.clock.advance(5 * CHARACTER)
        assert uart.read(u.UART_IIR) == TIMEOUT
        for count in range(14):
            uart.write(u.UART_TX, count)
        assert uart.read(u.UART_IIR) == RLS
        assert uart.read(u.UART_LSR) & u.UART_LSR_OE
        assert read_all(uart) == bytes([2, 3, 4, *range(13)])

    def test_break_stays_outside(self, uart: Uart16550) -> None:
        """The break control acts on the output pin alone (8.1, bit 6)."""
        uart.write(u.UART_MCR, u.UART_MCR_LOOP)
        uart.write(u.UART_LCR, 0x43)
        uart.write(u.UART_TX, ord("x"))
        assert uart.read(u.UART_LSR) == u.UART_LSR_THRE | u.UART_LSR_TEMT | u.UART_LSR_DR
        assert uart.read(u.UART_RX) == ord("x")

    def test_what_a_busy_line_has_refused_goes_round(self, uart: Uart16550, bench: UartBench) -> None:
        """A driver's test of the loop doesn't wait for the line, which gets nothing of it afterwards."""
        fifos(uart)
        bench.busy = True
        for byte in b"abc":
            uart.write(u.UART_TX, byte)
        uart.write(u.UART_MCR, u.UART_MCR_LOOP)
        assert uart.read(u.UART_LSR) == u.UART_LSR_THRE | u.UART_LSR_TEMT | u.UART_LSR_DR
        assert read_all(uart) == b"abc"
        bench.busy = False
        uart.write(u.UART_MCR, 0)
        uart.transmit_ready()
        assert bench.sent == b""

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
        uart.set_modem_lines(0xBF)
        uart.set_modem_lines(0xB0)
        assert uart.read(u.UART_MSR) == 0xB8


def test_reset(uart: Uart16550, bench: UartBench) -> None:
    """Everything goes back to power-on, except for the modem inputs: they are pins."""
    uart.write(u.UART_LCR, u.UART_LCR_DLAB)
    uart.write(u.UART_DLM, 0xFF)
    fifos(uart, trigger=3)
    for offset in (u.UART_LCR, u.UART_MCR, u.UART_SCR):
        uart.write(offset, 0x1F)
    uart.write(u.UART_IER, 0x0F)
    uart.set_modem_lines(0x30)
    bench.busy = True
    uart.write(u.UART_MCR, 0)
    for byte in b"xyz":
        uart.write(u.UART_TX, byte)
    uart.receive(b"abc")
    assert uart.irq
    bench.input_ready = 0
    uart.reset()
    assert bench.input_ready
    assert not uart.irq
    assert bench.irqs[-1] is False
    assert bench.clock.pending == []
    assert [uart.read(offset) for offset in range(8)] == [0, 0, 0x01, 0, 0x08, 0x60, 0x30, 0]
    bench.busy = False
    uart.transmit_ready()
    assert bench.sent == b""
    uart.receive(b"a")
    assert uart.can_receive() == 0, "the FIFOs are off"
    uart.write(u.UART_TX, ord("w"))
    assert uart.read(u.UART_LSR) == u.UART_LSR_THRE | u.UART_LSR_TEMT | u.UART_LSR_DR
    assert bench.sent == b"w"
    fifos(uart, trigger=3)
    uart.receive(b"a")
    assert bench.clock.pending == [pytest.approx(4 * CHARACTER)]
    uart.write(u.UART_LCR, u.UART_LCR_DLAB)
    assert (uart.read(u.UART_DLL), uart.read(u.UART_DLM)) == (12, 0)
