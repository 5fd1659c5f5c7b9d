# SPDX-License-Identifier: GPL-2.0-or-later
"""A pair of 8259A interrupt controllers with ELCR, in user space.

The registers are those of Intel's 8259A data sheet (231468) and, for ELCR1 and ELCR2, of the 82371SB PIIX3;
where they leave room, or KVM's controllers (arch/x86/kvm/i8259.c, Linux 6.8 and later) differ from them, this
is KVM: special mask mode is stored but has no effect, ICW3 is ignored (the slave is on IR2), an
initialization keeps what is in service and the requests of level-triggered pins, a poll leaves nothing in
service.
"""

from __future__ import annotations

from collections.abc import Callable

from proxyd.kvm.irqchip import ELCR_MASK

__all__ = ["ELCR1", "ELCR2", "MASTER", "SLAVE", "I8259Pair"]

MASTER, SLAVE = 0x20, 0xA0
"""command port; the data port (ICW2 to 4, OCW1) follows it"""
ELCR1, ELCR2 = 0x4D0, 0x4D1

_CASCADE = 2
_SPURIOUS = 7

_ICW1 = 0x10
_ICW1_IC4 = 0x01
_ICW2_BASE = 0xF8
_ICW4_AEOI = 0x02
_ICW4_SFNM = 0x10

_OCW2_ROTATE = 0x80
_OCW2_SPECIFIC = 0x40
_OCW2_EOI = 0x20
_OCW2_LEVEL = 0x07

_OCW3 = 0x08
_OCW3_POLL = 0x04
_OCW3_READ_REGISTER = 0x02
_OCW3_READ_ISR = 0x01

_POLL_PENDING = 0x80


class _I8259:
    """One chip.

    What depends on both chips is up to the pair. The writes tell whether it must look again: not always when
    it could matter, but exactly when KVM does.
    """

    def __init__(self, first_irq: int, elcr_mask: int, on_ack: Callable[[int], None]) -> None:
        self._first_irq = first_irq
        self._elcr_mask = elcr_mask
        self._on_ack = on_ack
        self.reset()

    def reset(self) -> None:
        """Power-on."""
        self.elcr = 0
        self.irr = 0
        self.isr = 0
        self.imr = 0
        self.base = 0
        self.is_polled = False
        self._levels = 0  # what the pins were at their last change; edges are found against it
        self._highest = 0  # the pin with the highest priority; rotation moves it
        self._reads_isr = False
        self._next_icw = 0  # 2, 3, 4; 0 when the data port is OCW1
        self._has_icw4 = False
        self._aeoi = False
        self._rotates_on_aeoi = False
        self._sfnm = False

    def set_pin(self, pin: int, level: bool) -> None:
        """A pin's level: requests while high if level-triggered, at the rise if edge-triggered."""
        bit = 1 << pin
        if level:
            if self.elcr & bit or not self._levels & bit:
                self.irr |= bit
            self._levels |= bit
        else:
            if self.elcr & bit:
                self.irr &= ~bit
            self._levels &= ~bit

    def pending(self) -> int | None:
        """The unmasked request that beats everything in service."""
        request = self._first(self.irr & ~self.imr)
        if request is None:
            return None
        # In special fully nested mode the slave may interrupt itself: what it has in service doesn't count.
        served = self._first(self.isr & ~(1 << _CASCADE) if self._sfnm and self._first_irq == 0 else self.isr)
        if served is not None and (served - self._highest) & 7 <= (request - self._highest) & 7:
            return None
        return request

    def intack(self, pin: int) -> None:
        """INTA for a pending pin."""
        bit = 1 << pin
        self.isr |= bit
        if not self.elcr & bit:
            self.irr &= ~bit
        if self._aeoi:
            if self._rotates_on_aeoi:
                self._highest = (pin + 1) & 7
            self.eoi(pin)

    def eoi(self, pin: int) -> None:
        """Ends the service of a pin; the acknowledgement is told also when nothing was in service."""
        self.isr &= ~(1 << pin)
        self._on_ack(self._first_irq + pin)

    def read_command(self) -> int:
        """IRR or ISR, as the last OCW3 chose."""
        return self.isr if self._reads_isr else self.irr

    def write_command(self, value: int) -> bool:
        """ICW1, OCW2 or OCW3; True if the pair must look at the requests again."""
        if value & _ICW1:
            self._initialize(value)
            return False
        if value & _OCW3:
            self._write_ocw3(value)
            return False
        return self._write_ocw2(value)

    def write_data(self, value: int) -> bool:
        """OCW1, or the next ICW; True if the pair must look at the requests again."""
        if self._next_icw == 0:
            self.imr = value
            return True
        if self._next_icw == 2:
            self.base = value & _ICW2_BASE
            self._next_icw = 3
        elif self._next_icw == 3:
            self._next_icw = 4 if self._has_icw4 else 0
        else:
            self._sfnm = bool(value & _ICW4_SFNM)
            self._aeoi = bool(value & _ICW4_AEOI)
            self._next_icw = 0
        return False

    def write_elcr(self, value: int) -> None:
        """Pins by bit, 1 for level-triggered. Requests stay as they are."""
        self.elcr = value & self._elcr_mask

    def _initialize(self, icw1: int) -> None:
        dropped = self.irr & ~self.elcr
        self.irr &= self.elcr
        self.imr = 0
        self._levels = 0
        self._highest = 0
        self._reads_isr = False
        self._has_icw4 = bool(icw1 & _ICW1_IC4)
        if not self._has_icw4:
            self._sfnm = self._aeoi = False
        self._next_icw = 2
        for pin in range(8):
            if dropped >> pin & 1:
                self.eoi(pin)

    def _write_ocw2(self, value: int) -> bool:
        pin: int | None = value & _OCW2_LEVEL
        if not value & _OCW2_EOI:
            if not value & _OCW2_SPECIFIC:
                self._rotates_on_aeoi = bool(value & _OCW2_ROTATE)
                return False
            if not value & _OCW2_ROTATE:
                return False
            self._highest = (value + 1) & 7
            return True
        if not value & _OCW2_SPECIFIC:
            pin = self._first(self.isr)
        if pin is None:
            return False
        if value & _OCW2_ROTATE:
            self._highest = (pin + 1) & 7
        self.eoi(pin)
        return True

    def _write_ocw3(self, value: int) -> None:
        if value & _OCW3_POLL:
            self.is_polled = True
        if value & _OCW3_READ_REGISTER:
            self._reads_isr = bool(value & _OCW3_READ_ISR)

    def _first(self, pins: int) -> int | None:
        """The set pin of the highest priority."""
        if not pins:
            return None
        rotated = (pins >> self._highest | pins << 8 - self._highest) & 0xFF
        return (rotated & -rotated).bit_length() - 1 + self._highest & 7


class I8259Pair:
    """Master and slave: 16 pins, six ports, one INTR."""

    def __init__(self, on_ack: Callable[[int], None]) -> None:
        """``on_ack(irq)`` is told of every EOI, of whatever kind; it may call set_irq()."""
        self._master = _I8259(0, ELCR_MASK[0], on_ack)
        self._slave = _I8259(8, ELCR_MASK[1], on_ack)
        self._chips = (self._master, self._slave)
        self._intr = False
        self.acknowledged = 0
        """how many interrupts the CPU has taken"""

    @property
    def intr(self) -> bool:
        """The line to the CPU. It may drop again before acknowledge(), or lie after an initialization."""
        return self._intr

    def set_irq(self, irq: int, level: bool) -> None:
        """The level of one of 16 pins."""
        self._chips[irq >> 3].set_pin(irq & 7, level)
        self._update()

    def acknowledge(self) -> int:
        """INTA: the vector. When the request is gone it is that of pin 7, which isn't in service then."""
        self.acknowledged += 1
        pin = self._master.pending()
        chip = self._master
        if pin is not None:
            self._master.intack(pin)
            if pin == _CASCADE:
                chip = self._slave
                pin = self._slave.pending()
                if pin is not None:
                    self._slave.intack(pin)
        self._update()
        return chip.base + (_SPURIOUS if pin is None else pin)

    def port_in(self, port: int, size: int) -> int:
        """Reads one of 0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1; ``size`` is in bytes, wider reads give 0."""
        if size != 1:
            return 0
        if port in (ELCR1, ELCR2):
            return self._chips[port - ELCR1].elcr
        chip = self._chips[port >> 7]
        if chip.is_polled:
            chip.is_polled = False
            return self._poll(chip)
        return chip.imr if port & 1 else chip.read_command()

    def port_out(self, port: int, size: int, value: int) -> None:
        """Writes one of these ports; wider writes are lost."""
        if size != 1:
            return
        if port in (ELCR1, ELCR2):
            self._chips[port - ELCR1].write_elcr(value)
            return
        chip = self._chips[port >> 7]
        if chip.write_data(value) if port & 1 else chip.write_command(value):
            self._update()

    def set_level_triggered(self, irq: int) -> bool:
        """Sets the pin's ELCR bit; True if it was clear."""
        chip = self._chips[irq >> 3]
        bit = 1 << (irq & 7)
        if chip.elcr & bit:
            return False
        chip.write_elcr(chip.elcr | bit)
        self._update()
        return True

    def reset(self) -> None:
        """Power-on, with all pins low."""
        for chip in self._chips:
            chip.reset()
        self._intr = False

    def _poll(self, chip: _I8259) -> int:
        pin = chip.pending()
        if pin is None:
            self._update()
            return _SPURIOUS
        if chip is self._slave:
            self._master.isr &= ~(1 << _CASCADE)
            self._master.irr &= ~(1 << _CASCADE)
        chip.irr &= ~(1 << pin)
        chip.eoi(pin)
        if chip is self._slave or pin != _CASCADE:
            self._update()
        return _POLL_PENDING | pin

    def _update(self) -> None:
        if self._slave.pending() is not None:
            # A pulse: the master's request for the cascade is never left to the level of the slave's INT.
            self._master.set_pin(_CASCADE, True)
            self._master.set_pin(_CASCADE, False)
        self._intr = self._master.pending() is not None
