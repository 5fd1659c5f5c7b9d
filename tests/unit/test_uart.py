# SPDX-License-Identifier: GPL-2.0-or-later
"""The 16550A: interrupt sources and their priorities, FIFOs, loopback, modem lines, timeouts."""

from __future__ import annotations

import pytest

from common import uart as u
from common.uart import Uart16550
from tests.support.clock import FakeClock

CHARACTER = 10 / 9600
"""seconds, with the divisor and format of power-on"""

RLS, TIMEOUT, RDA, THRE, MS, NONE = 0xC6, 0xCC, 0xC4, 0xC2, 0xC0, 0xC1
"""what IIR reads with FIFOs on"""


class Bench:
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


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def uart(bench: Bench) -> Uart16550:
    return bench.uart


def fifos(uart: Uart16550, trigger: int = 0) -> None:
    """Turns the FIFOs on; ``trigger`` 0 to 3."""
    uart.write(u.UART_FCR, trigger << 6 | u.UART_FCR_ENABLE_FIFO)


def read_all(uart: Uart16550) -> bytes:
    """Everything the receiver holds."""
    data = bytearray()
    while uart.read(u.UART_LSR) & u.UART_LSR_DR:
        data.append(uart.read(u.UART_RX))
    return bytes(data)


def test_power_on(uart: Uart16550, bench: Bench) -> None:
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


def test_divisor_latch(uart: Uart16550, bench: Bench) -> None:
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


def test_transmit(uart: Uart16550, bench: Bench) -> None:
    for byte in b"hello":
        uart.write(u.UART_TX, byte)
        assert uart.read(u.UART_LSR) == u.UART_LSR_THRE | u.UART_LSR_TEMT
    assert bench.sent == b"hello"


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

    def test_thr_write_gives_an_edge(self, uart: Uart16550, bench: Bench) -> None:
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

    def test_priorities(self, uart: Uart16550, bench: Bench) -> None:
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
            (0, 0x03, 40 / 3500),
        ],
    )
    def test_after_four_characters(
        self, uart: Uart16550, bench: Bench, divisor: int, lcr: int, seconds: float
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

    def test_begins_anew_with_each_character_and_each_read(self, uart: Uart16550, bench: Bench) -> None:
        uart.receive(b"ab")
        bench.clock.advance(3 * CHARACTER)
        uart.receive(b"c")
        bench.clock.advance(3 * CHARACTER)
        uart.read(u.UART_RX)
        bench.clock.advance(3 * CHARACTER)
        assert not uart.irq
        bench.clock.advance(2 * CHARACTER)
        assert uart.irq

    def test_a_read_clears_it(self, uart: Uart16550, bench: Bench) -> None:
        uart.receive(b"ab")
        bench.clock.advance(5 * CHARACTER)
        uart.read(u.UART_RX)
        assert uart.read(u.UART_IIR) == NONE
        bench.clock.advance(5 * CHARACTER)
        assert uart.read(u.UART_IIR) == TIMEOUT

    def test_no_timer_while_there_is_nothing_to_report(self, uart: Uart16550, bench: Bench) -> None:
        uart.receive(b"ab")
        assert len(bench.clock.pending) == 1
        read_all(uart)
        assert bench.clock.pending == []

    @pytest.mark.parametrize("fcr", [0x00, 0xC3])
    def test_fifo_reset_stops_it(self, uart: Uart16550, bench: Bench, fcr: int) -> None:
        uart.receive(b"ab")
        bench.clock.advance(5 * CHARACTER)
        uart.write(u.UART_FCR, fcr)
        assert not uart.irq
        uart.write(u.UART_FCR, 0xC1)
        uart.receive(b"ab")
        uart.write(u.UART_FCR, fcr)
        assert bench.clock.pending == []

    def test_masked_by_its_enable_bit(self, uart: Uart16550, bench: Bench) -> None:
        uart.write(u.UART_IER, 0)
        uart.receive(b"ab")
        bench.clock.advance(5 * CHARACTER)
        assert not uart.irq
        uart.write(u.UART_IER, u.UART_IER_RDI)
        assert uart.read(u.UART_IIR) == TIMEOUT


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

    def test_a_clear_bit_clears_only_its_fifo(self, uart: Uart16550, bench: Bench) -> None:
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

    def test_transmitter_reset_leaves_the_shift_register(self, uart: Uart16550, bench: Bench) -> None:
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

    def test_room_without_fifos(self, uart: Uart16550, bench: Bench) -> None:
        assert uart.can_receive() == 1
        uart.receive(b"x")
        assert uart.can_receive() == 0
        bench.input_ready = 0
        uart.read(u.UART_RX)
        assert uart.can_receive() == 1
        assert bench.input_ready

    @pytest.mark.parametrize(("offset", "value"), [(u.UART_FCR, 0x43), (u.UART_MCR, 0)])
    def test_input_is_told_when_room_appears(
        self, uart: Uart16550, bench: Bench, offset: int, value: int
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

    def test_without_fifos(self, uart: Uart16550, bench: Bench) -> None:
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

    def test_thre_interrupt_comes_when_the_fifo_is_empty(self, uart: Uart16550, bench: Bench) -> None:
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

    def test_an_overfull_fifo_loses_the_oldest(self, uart: Uart16550, bench: Bench) -> None:
        fifos(uart)
        bench.busy = True
        for byte in range(20):
            uart.write(u.UART_TX, byte)
        bench.busy = False
        uart.transmit_ready()
        assert bench.sent == bytes([0, *range(4, 20)])

    def test_ready_without_need_sends_nothing(self, uart: Uart16550, bench: Bench) -> None:
        uart.write(u.UART_TX, 1)
        uart.transmit_ready()
        assert bench.sent == b"\1"


class TestLoopback:
    def test_data_comes_back_and_stays_off_the_line(self, uart: Uart16550, bench: Bench) -> None:
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


def test_reset(uart: Uart16550, bench: Bench) -> None:
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
