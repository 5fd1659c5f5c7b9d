# SPDX-License-Identifier: GPL-2.0-or-later
"""MCR and MSR of the 16550A: the modem outputs, the modem inputs and their changes (PC16550D, 8.6 and 8.7)."""

from __future__ import annotations

from common.fields import register, set_to_reset_values
from common.serial_reg import (
    UART_MCR_DTR,
    UART_MCR_LOOP,
    UART_MCR_OUT2,
    UART_MCR_RTS,
    UART_MSR_ANY_DELTA,
    UART_MSR_CTS,
    UART_MSR_DCD,
    UART_MSR_DSR,
    UART_MSR_RI,
    UART_MSR_TERI,
)

__all__ = ["ModemLines"]

_MCR_MASK = 0x1F
_OUTPUTS = 0x0C  # OUT1 and OUT2
_INPUTS = 0xF0


class ModemLines:
    """The two registers. In loopback the input pins are disconnected, and the modem outputs are the inputs."""

    _pins: int = register(8, UART_MSR_CTS | UART_MSR_DSR | UART_MSR_DCD)
    mcr: int = register(8)
    """the value of MCR"""
    msr: int = register(8)
    """the value of MSR; a read by the guest is read_msr()"""

    def __init__(self) -> None:
        """All input pins but RI are on."""
        set_to_reset_values(self)
        self.power_on()

    def power_on(self) -> None:
        """Master reset: the pins keep their levels, and the delta bits are cleared."""
        self.mcr = UART_MCR_OUT2
        self.msr = self._pins

    @property
    def is_loopback(self) -> bool:
        """Whether the diagnostic loopback is on."""
        return bool(self.mcr & UART_MCR_LOOP)

    def set_pins(self, pins: int) -> None:
        """Sets the input pins: those of UART_MSR_CTS, _DSR, _RI and _DCD that are on."""
        self._pins = pins & _INPUTS
        self._update()

    def write_mcr(self, value: int) -> None:
        """Sets the outputs, and loopback."""
        self.mcr = value & _MCR_MASK
        self._update()

    def read_msr(self) -> int:
        """The value of MSR. The read clears its delta bits."""
        value = self.msr
        self.msr &= ~UART_MSR_ANY_DELTA
        return value

    def _update(self) -> None:
        """Puts the inputs into MSR. Each that has changed sets its delta bit; RI only when it goes off."""
        mcr = self.mcr
        if mcr & UART_MCR_LOOP:
            # OUT2, OUT1, DTR and RTS are wired to DCD, RI, DSR and CTS.
            inputs = (mcr & _OUTPUTS) << 4 | (mcr & UART_MCR_DTR) << 5 | (mcr & UART_MCR_RTS) << 3
        else:
            inputs = self._pins
        deltas = (self.msr ^ inputs) >> 4
        if inputs & UART_MSR_RI:
            deltas &= ~UART_MSR_TERI
        self.msr = inputs | deltas | self.msr & UART_MSR_ANY_DELTA
