# SPDX-License-Identifier: GPL-2.0-or-later
"""One bench for every irqchip: the guest's side by port I/O, the VMM's side by the Irqchip protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from common.loop import Loop
from common.notifier import EventNotifier
from proxyd.kvm.irqchip import Irqchip, KvmIrqchip
from proxyd.vm.soft.softirqchip import SoftIrqchip
from tests.support.kvmguest import Handler, KvmMachine

M_CMD, M_DATA, S_CMD, S_DATA, ELCR1, ELCR2 = 0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1
EOI = 0x20
SPECIFIC_EOI = 0x60
READ_IRR, READ_ISR = 0x0A, 0x0B
POLL = 0x0C

MASTER_BASE, SLAVE_BASE = 0x20, 0x28


class Pair(NamedTuple):
    """The eventfds of one function."""

    irqfd: EventNotifier
    resamplefd: EventNotifier

    @classmethod
    def create(cls) -> Pair:
        return cls(EventNotifier.create(), EventNotifier.create())

    def close(self) -> None:
        self.irqfd.close()
        self.resamplefd.close()

    @property
    def resampled(self) -> bool:
        """Whether the resamplefd was signalled since the last look."""
        return self.resamplefd.test_and_clear()


class IrqBench(ABC):
    """An irqchip and the guest's end of it."""

    def __init__(self, irqchip: Irqchip) -> None:
        self.irqchip = irqchip
        self._pairs: list[Pair] = []

    @abstractmethod
    def inb(self, port: int) -> int:
        """One byte read by the guest."""

    @abstractmethod
    def outb(self, port: int, value: int) -> None:
        """One byte written by the guest."""

    @abstractmethod
    def inw(self, port: int) -> int:
        """Two bytes read by the guest at once."""

    @abstractmethod
    def outw(self, port: int, value: int) -> None:
        """Two bytes written by the guest at once."""

    @abstractmethod
    def take(self, limit: int = 1) -> list[int]:
        """The guest takes up to so many interrupts, without EOI; their vectors."""

    @abstractmethod
    def settle(self, gsi: int, pair: Pair) -> None:
        """Returns when all that was written to the pair's irqfd, assigned to ``gsi``, has been injected."""

    def close(self) -> None:
        self.irqchip.close()
        for pair in self._pairs:
            pair.close()

    def pair(self) -> Pair:
        """A new pair of eventfds, closed with the bench."""
        pair = Pair.create()
        self._pairs.append(pair)
        return pair

    def assign(self, gsi: int, pair: Pair | None = None) -> Pair:
        """Assigns the pair, or a new one."""
        if pair is None:
            pair = self.pair()
        self.irqchip.assign(gsi, pair.irqfd, pair.resamplefd)
        return pair

    def fire(self, gsi: int, pair: Pair) -> None:
        """A device asserts; it has arrived at the chip on return."""
        pair.irqfd.set()
        self.settle(gsi, pair)

    def init_pics(self, icw4: int = 0x01, *, level: tuple[int, ...] = ()) -> None:
        """What firmware does: bases 0x20 and 0x28, cascade on IR2, nothing masked; ELCR as given by IRQ."""
        for command, base, icw3 in ((M_CMD, MASTER_BASE, 0x04), (S_CMD, SLAVE_BASE, 0x02)):
            self.outb(command, 0x11)
            for value in (base, icw3, icw4, 0x00):
                self.outb(command + 1, value)
        bits = sum(1 << irq for irq in level)
        self.outb(ELCR1, bits & 0xFF)
        self.outb(ELCR2, bits >> 8)

    def irr(self) -> int:
        """The requests of all 16 pins, by IRQ; leaves IRR selected."""
        return self._both(READ_IRR)

    def isr(self) -> int:
        """What is in service, by IRQ; leaves ISR selected."""
        return self._both(READ_ISR)

    def eoi(self, irq: int) -> None:
        """What a driver's handler ends with: non-specific EOI, to the slave first if it is the slave's."""
        if irq >= 8:
            self.outb(S_CMD, EOI)
        self.outb(M_CMD, EOI)

    def poll(self, command: int) -> int | None:
        """Poll mode on one chip: the pin, None without a request. Linux before 6.8 doesn't set bit 7, so a
        request on pin 7 can't be told from none there: don't use it."""
        self.outb(command, POLL)
        pin = self.inb(command) & 0x07
        return None if pin == 7 else pin

    def _both(self, ocw3: int) -> int:
        self.outb(M_CMD, ocw3)
        self.outb(S_CMD, ocw3)
        return self.inb(M_CMD) | self.inb(S_CMD) << 8


class KvmBench(IrqBench):
    """KVM's chips and a guest on KVM."""

    def __init__(self, handler: Handler | None = None) -> None:
        self.machine = KvmMachine(handler)
        self._holder = Pair.create()
        super().__init__(KvmIrqchip(self.machine.vm))

    def close(self) -> None:
        super().close()
        self._holder.close()
        self.machine.close()

    def inb(self, port: int) -> int:
        return self.machine.guest.inb(port)

    def outb(self, port: int, value: int) -> None:
        self.machine.guest.outb(port, value)

    def inw(self, port: int) -> int:
        return self.machine.guest.inw(port)

    def outw(self, port: int, value: int) -> None:
        self.machine.guest.outw(port, value)

    def take(self, limit: int = 1) -> list[int]:
        return self.machine.guest.take(limit)

    def settle(self, gsi: int, pair: Pair) -> None:
        """KVM injects from a work queue, which only DEASSIGN waits for. While a second irqfd holds the GSI, a
        DEASSIGN doesn't lower the line, so deassigning and assigning again is that wait and nothing else."""
        vm = self.machine.vm
        vm.assign_irqfd(gsi, *self._holder)
        vm.deassign_irqfd(gsi, pair.irqfd)
        vm.assign_irqfd(gsi, *pair)
        vm.deassign_irqfd(gsi, self._holder.irqfd)


class SoftBench(IrqBench):
    """The userspace chips; the guest's side calls them directly."""

    def __init__(self) -> None:
        self._loop = Loop()
        self._soft = SoftIrqchip(self._loop)
        super().__init__(self._soft)

    def close(self) -> None:
        super().close()
        self._loop.close()

    def inb(self, port: int) -> int:
        return self._soft.pic.port_in(port, 1)

    def outb(self, port: int, value: int) -> None:
        self._soft.pic.port_out(port, 1, value)

    def inw(self, port: int) -> int:
        return self._soft.pic.port_in(port, 2)

    def outw(self, port: int, value: int) -> None:
        self._soft.pic.port_out(port, 2, value)

    def take(self, limit: int = 1) -> list[int]:
        vectors: list[int] = []
        while len(vectors) < limit and self._soft.pic.intr:
            vectors.append(self._soft.pic.acknowledge())
        return vectors

    def settle(self, gsi: int, pair: Pair) -> None:
        self._soft.poll()
