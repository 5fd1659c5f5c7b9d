# SPDX-License-Identifier: GPL-2.0-or-later
"""A 16550A UART as a plain object: registers and characters in, interrupt line and characters out.

The registers are those of the PC16550D data sheet (National Semiconductor, 1995, section 8). Where it leaves a
choice, this does what QEMU 7.2's hw/char/serial.c does: the FIFO control's clearing of the transmitter, and
switching the FIFOs on or off, raise the THRE interrupt; SCR is 0 and the divisor 12 after a reset.

Like QEMU's and unlike the chip:

- a character leaves at once, unless the line is busy: THRE and TEMT are on otherwise;
- characters have 8 bits, whatever word length LCR holds, and there are no parity errors, framing errors and
  breaks: the line is a stream of bytes;
- OUT2 is on after a reset. It doesn't gate the interrupt line, as on a PCI board;
- a character for a full transmitter FIFO replaces the oldest one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from common.fields import buffer, register, set_to_reset_values
from common.serial_reg import (
    UART_FCR,
    UART_FCR_CLEAR_RCVR,
    UART_FCR_CLEAR_XMIT,
    UART_FCR_ENABLE_FIFO,
    UART_IER,
    UART_IER_MSI,
    UART_IER_RDI,
    UART_IER_RLSI,
    UART_IER_THRI,
    UART_IIR,
    UART_IIR_FIFO_ENABLED,
    UART_IIR_MSI,
    UART_IIR_NO_INT,
    UART_IIR_RDI,
    UART_IIR_RLSI,
    UART_IIR_RX_TIMEOUT,
    UART_IIR_SOURCE,
    UART_IIR_THRI,
    UART_LCR,
    UART_LCR_DLAB,
    UART_LCR_PARITY,
    UART_LCR_STOP,
    UART_LCR_WLEN,
    UART_LSR,
    UART_LSR_DR,
    UART_LSR_OE,
    UART_LSR_TEMT,
    UART_LSR_THRE,
    UART_MCR,
    UART_MSR,
    UART_MSR_ANY_DELTA,
    UART_RX,
    UART_SCR,
    UART_TX,
)
from common.uart_modem import ModemLines

__all__ = ["Timer", "Uart16550"]

FIFO_SIZE = 16
BASE_BAUD = 115200
"""bits a second at divisor 1: 1.8432 MHz / 16"""

_TRIGGER_LEVELS = (1, 4, 8, 14)
_TIMEOUT_CHARACTERS = 4
_RESET_DIVISOR = 12
_RESET_CHARACTER_BITS = 10
_BAUD_OF_DIVISOR_ZERO = 3500


class Timer(Protocol):
    """A call that is due."""

    def cancel(self) -> None:
        """Prevents the call, if it wasn't made yet."""


class Uart16550:
    """The chip. Every register access is one byte at offset 0 to 7."""

    _rbr: int = register(8)
    _thr: int = register(8)
    _tsr: int = register(8)
    _ier: int = register(8)
    _iir: int = register(8, UART_IIR_NO_INT)
    _lcr: int = register(8)
    _lsr: int = register(8, UART_LSR_THRE | UART_LSR_TEMT)
    _scr: int = register(8)
    _fifo_enabled: int = register(1)
    _divisor: int = register(16, _RESET_DIVISOR)
    _trigger: int = register(8, 1)
    _thre_pending: int = register(1)
    _timeout_pending: int = register(1)
    _tsr_held: int = register(1)
    _rx_fifo: bytearray = buffer(FIFO_SIZE)
    _tx_fifo: bytearray = buffer(FIFO_SIZE)

    def __init__(
        self,
        set_irq: Callable[[bool], None],
        transmit: Callable[[int], bool],
        call_later: Callable[[float, Callable[[], None]], Timer],
        input_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Powers the chip on.

        ``set_irq(level)`` is called whenever INTR changes. ``transmit(byte)`` takes a character, or answers
        False: the character stays in the shift register until transmit_ready(), which transmit must not call
        itself. ``call_later(seconds, callback)`` is the clock of the character timeout. ``input_ready()`` is
        called when can_receive() may have grown.
        """
        self._set_irq = set_irq
        self._transmit = transmit
        self._call_later = call_later
        self._input_ready = input_ready
        self._timeout: Timer | None = None
        self.modem = ModemLines()
        self.irq = False
        """the level of INTR"""
        self._power_on()

    def reset(self) -> None:
        """Master reset: power-on values, FIFOs off and empty, INTR low. The modem inputs are as before."""
        self._power_on()
        self._update_irq()
        self._input_ready()

    def restored(self) -> None:
        """The registers have been set to those of another process's chip: goes on where that was."""
        self._line_changed()
        self.irq = self._iir & UART_IIR_SOURCE != UART_IIR_NO_INT
        if self._fifo_enabled and self._rx_fifo and not self._timeout_pending:
            self._start_timeout()
        self.transmit_ready()
        self._input_ready()

    def _power_on(self) -> None:
        set_to_reset_values(self)
        self.modem.power_on()
        self._character_seconds = _RESET_CHARACTER_BITS * _RESET_DIVISOR / BASE_BAUD
        self._stop_timeout()

    def read(self, offset: int) -> int:
        """The register's value, with the side effects of a read."""
        if offset == UART_RX:
            return self._divisor & 0xFF if self._lcr & UART_LCR_DLAB else self._read_rbr()
        if offset == UART_LSR:
            value = self._lsr
            if value & UART_LSR_OE:
                self._lsr &= ~UART_LSR_OE
                self._update_irq()
            return value
        if offset == UART_IIR:
            value = self._iir
            if value & ~UART_IIR_FIFO_ENABLED == UART_IIR_THRI:
                self._thre_pending = False
                self._update_irq()
            return value
        if offset == UART_IER:
            return self._divisor >> 8 if self._lcr & UART_LCR_DLAB else self._ier
        if offset == UART_MSR:
            return self._read_msr()
        if offset == UART_LCR:
            return self._lcr
        return self.modem.mcr if offset == UART_MCR else self._scr

    def write(self, offset: int, value: int) -> None:
        """Writes the low byte of ``value``. LSR and MSR can't be written."""
        value &= 0xFF
        if offset == UART_TX:
            if self._lcr & UART_LCR_DLAB:
                self._divisor = self._divisor & 0xFF00 | value
                self._line_changed()
            else:
                self._write_thr(value)
        elif offset == UART_IER:
            if self._lcr & UART_LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
                self._line_changed()
            else:
                self._write_ier(value)
        elif offset == UART_FCR:
            self._write_fcr(value)
        elif offset == UART_LCR:
            self._lcr = value
            self._line_changed()
        elif offset == UART_MCR:
            self._write_mcr(value)
        elif offset == UART_SCR:
            self._scr = value

    def can_receive(self) -> int:
        """How many characters the line may deliver now.

        With FIFOs that is what is missing to the trigger level: filling them up at once would override the
        level that the guest has set (serial_can_receive() in QEMU).
        """
        if self.modem.is_loopback:
            return 0
        if not self._fifo_enabled:
            return 0 if self._lsr & UART_LSR_DR else 1
        count = len(self._rx_fifo)
        if count <= self._trigger:
            return self._trigger - count
        return 1 if count < FIFO_SIZE else 0

    def receive(self, data: bytes) -> None:
        """Characters arrive; those for which there is no room are lost and set the overrun error."""
        if self._fifo_enabled:
            for byte in data:
                self._push(byte)
            self._start_timeout()
        else:
            for byte in data:
                if self._lsr & UART_LSR_DR:
                    self._lsr |= UART_LSR_OE
                self._rbr = byte
                self._lsr |= UART_LSR_DR
        self._update_irq()

    def set_modem_lines(self, lines: int) -> None:
        """Sets the modem input pins: those of UART_MSR_CTS, _DSR, _RI and _DCD that are on.

        Each that changes sets its delta bit; RI only when it goes off (trailing edge). After power-on all but
        RI are on. In loopback the pins are disconnected.
        """
        self.modem.set_pins(lines)
        self._update_irq()

    def transmit_ready(self) -> None:
        """The line takes characters again after transmit() had answered False."""
        if self._tsr_held:
            self._shift_out()

    def _read_rbr(self) -> int:
        if self._fifo_enabled:
            value = self._rx_fifo.pop(0) if self._rx_fifo else 0
            if self._rx_fifo:
                self._start_timeout()
            else:
                self._lsr &= ~UART_LSR_DR
                self._stop_timeout()
            self._timeout_pending = False
        else:
            value = self._rbr
            self._lsr &= ~UART_LSR_DR
        self._update_irq()
        self._input_ready()
        return value

    def _read_msr(self) -> int:
        value = self.modem.read_msr()
        self._update_irq()
        return value

    def _write_thr(self, value: int) -> None:
        self._thr = value
        if self._fifo_enabled:
            if len(self._tx_fifo) == FIFO_SIZE:
                self._tx_fifo.pop(0)
            self._tx_fifo.append(value)
        self._thre_pending = False
        self._lsr &= ~(UART_LSR_THRE | UART_LSR_TEMT)
        self._update_irq()
        self._shift_out()

    def _write_ier(self, value: int) -> None:
        value &= 0x0F
        is_switched = (self._ier ^ value) & UART_IER_THRI
        self._ier = value
        if is_switched:
            # Enabling the interrupt raises it anew although a read of IIR had cleared it: drivers need that.
            self._thre_pending = bool(value & UART_IER_THRI and self._lsr & UART_LSR_THRE)
        self._update_irq()

    def _write_mcr(self, value: int) -> None:
        self.modem.write_mcr(value)
        self._update_irq()
        if self.modem.is_loopback:
            # What a busy line has refused is looped back, or a driver's loopback test would wait for the line.
            self.transmit_ready()
        self._input_ready()

    def _write_fcr(self, value: int) -> None:
        enable = bool(value & UART_FCR_ENABLE_FIFO)
        if not enable:
            value = 0  # the other bits count only together with this one
        if enable != self._fifo_enabled:
            value |= UART_FCR_CLEAR_RCVR | UART_FCR_CLEAR_XMIT
        if value & UART_FCR_CLEAR_RCVR:
            self._lsr &= ~UART_LSR_DR
            self._stop_timeout()
            self._timeout_pending = False
            self._rx_fifo.clear()
        if value & UART_FCR_CLEAR_XMIT:
            self._lsr |= UART_LSR_THRE
            self._thre_pending = True
            self._tx_fifo.clear()
        self._fifo_enabled = enable
        if enable:
            self._trigger = _TRIGGER_LEVELS[value >> 6]
        self._update_irq()
        self._input_ready()

    def _line_changed(self) -> None:
        """Divisor or line control was written: a character takes another time."""
        lcr = self._lcr
        word = 5 + (lcr & UART_LCR_WLEN)
        stop_bits = (1.5 if word == 5 else 2) if lcr & UART_LCR_STOP else 1
        bits = 1 + word + bool(lcr & UART_LCR_PARITY) + stop_bits
        baud = BASE_BAUD / self._divisor if self._divisor else _BAUD_OF_DIVISOR_ZERO
        self._character_seconds = bits / baud

    def _shift_out(self) -> None:
        """Sends what the transmitter holds, until the line refuses a character."""
        while True:
            if not self._tsr_held:
                if self._fifo_enabled:
                    self._tsr = self._tx_fifo.pop(0)
                else:
                    self._tsr = self._thr
                if not self._tx_fifo:
                    self._lsr |= UART_LSR_THRE
                    self._thre_pending = True
                    self._update_irq()
            if self.modem.is_loopback:
                self.receive(bytes((self._tsr,)))
            elif not self._transmit(self._tsr):
                self._tsr_held = True
                return
            self._tsr_held = False
            if self._lsr & UART_LSR_THRE:
                break
        self._lsr |= UART_LSR_TEMT

    def _push(self, byte: int) -> None:
        if len(self._rx_fifo) < FIFO_SIZE:
            self._rx_fifo.append(byte)
            self._lsr |= UART_LSR_DR
        else:
            self._lsr |= UART_LSR_OE

    def _start_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
        self._timeout = self._call_later(_TIMEOUT_CHARACTERS * self._character_seconds, self._on_timeout)

    def _stop_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None

    def _on_timeout(self) -> None:
        self._timeout = None
        self._timeout_pending = True
        self._update_irq()

    def _update_irq(self) -> None:
        """Works out the pending interrupt of the highest priority, and INTR."""
        ier = self._ier
        if not ier:
            source = UART_IIR_NO_INT
        elif ier & UART_IER_RLSI and self._lsr & UART_LSR_OE:
            source = UART_IIR_RLSI
        elif ier & UART_IER_RDI and self._timeout_pending:
            source = UART_IIR_RX_TIMEOUT
        elif ier & UART_IER_RDI and self._lsr & UART_LSR_DR and self._at_trigger():
            source = UART_IIR_RDI
        elif ier & UART_IER_THRI and self._thre_pending:
            source = UART_IIR_THRI
        elif ier & UART_IER_MSI and self.modem.msr & UART_MSR_ANY_DELTA:
            source = UART_IIR_MSI
        else:
            source = UART_IIR_NO_INT
        self._iir = source | UART_IIR_FIFO_ENABLED if self._fifo_enabled else source
        level = source != UART_IIR_NO_INT
        if level is not self.irq:
            self.irq = level
            self._set_irq(level)

    def _at_trigger(self) -> bool:
        return not self._fifo_enabled or len(self._rx_fifo) >= self._trigger
