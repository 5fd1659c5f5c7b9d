# SPDX-License-Identifier: GPL-2.0-or-later
"""An irqchip without KVM: the userspace 8259A pair behind irqfds and resamplefds with the semantics of KVM's.

Source: virt/kvm/eventfd.c, arch/x86/kvm/irq.c. There is one difference: an event that is pending at assign() is
consumed, while KVM leaves it in the counter. Only the owner of the irqfd can tell.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from common.loop import Loop
from common.notifier import EventNotifier
from proxyd.kvm.irqchip import NUM_IRQS, GsiRefused, is_level_capable
from proxyd.vm.soft.i8259 import I8259Pair

__all__ = ["SoftIrqchip"]


class _Assignment(NamedTuple):
    gsi: int
    irqfd: EventNotifier
    resamplefd: EventNotifier


class SoftIrqchip:
    """See Irqchip. Belongs to the thread of its loop; ``pic`` is the CPU's and the guest's side."""

    def __init__(self, loop: Loop) -> None:
        self.pic = I8259Pair(self._on_ack)
        self._loop = loop
        self._assignments: dict[int, _Assignment] = {}  # by the irqfd's number
        self._lines = 0  # GSIs that set_line() holds, by bit
        self._asserted = 0  # GSIs that irqfds hold

    def assign(self, gsi: int, irqfd: EventNotifier, resamplefd: EventNotifier) -> None:
        """See Irqchip."""
        if not 0 <= gsi < NUM_IRQS:
            raise GsiRefused(f"GSI {gsi} has no route")
        if not is_level_capable(gsi):
            raise GsiRefused(f"IRQ {gsi} can't be level-triggered")
        if irqfd.fd in self._assignments:
            # KVM checks after it has added the irqfd to the GSI. Taking it out lowers the line if it is alone.
            if not self._on_gsi(gsi):
                self._assert(gsi, False)
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), f"irqfd for GSI {gsi}")
        self._loop.add(irqfd.fd, lambda _events: self._inject(assignment))
        assignment = _Assignment(gsi, irqfd, resamplefd)
        self._assignments[irqfd.fd] = assignment
        self._inject(assignment)

    def deassign(self, gsi: int, irqfd: EventNotifier) -> None:
        """See Irqchip."""
        assignment = self._assignments.get(irqfd.fd)
        if assignment is None or assignment.gsi != gsi:
            return
        self._loop.remove(irqfd.fd)
        self._inject(assignment)
        del self._assignments[irqfd.fd]
        if not self._on_gsi(gsi):
            self._assert(gsi, False)

    def set_line(self, gsi: int, level: bool) -> None:
        """See Irqchip."""
        bit = 1 << gsi
        self._lines = self._lines | bit if level else self._lines & ~bit
        self._update_pin(gsi)

    def set_level_triggered(self, irq: int) -> bool:
        """See Irqchip."""
        if not is_level_capable(irq):
            raise GsiRefused(f"IRQ {irq} can't be level-triggered")
        if not self.pic.set_level_triggered(irq):
            return False
        for gsi in range(irq & 8, (irq & 8) + 8):
            if self._lines >> gsi & 1 or self._on_gsi(gsi):
                self._update_pin(gsi)
        return True

    def reset(self) -> None:
        """See Irqchip."""
        if self._assignments:
            gsis = sorted(assignment.gsi for assignment in self._assignments.values())
            raise RuntimeError(f"reset with irqfds assigned to GSIs {gsis}")
        self._lines = 0
        self.pic.reset()

    def poll(self) -> None:
        """Takes in what was written to irqfds up to now, without waiting for the loop's turn."""
        for assignment in tuple(self._assignments.values()):
            self._inject(assignment)

    def close(self) -> None:
        """See Irqchip."""
        for assignment in tuple(self._assignments.values()):
            self.deassign(assignment.gsi, assignment.irqfd)

    def _inject(self, assignment: _Assignment) -> None:
        if assignment.irqfd.test_and_clear():
            self._assert(assignment.gsi, True)

    def _on_ack(self, irq: int) -> None:
        sharers = self._on_gsi(irq)
        if sharers:
            for assignment in sharers:
                assignment.irqfd.test_and_clear()  # KVM consumes a write when it's made: these came before the EOI
            # Lower before telling: whoever asserts again in answer must find the line low.
            self._assert(irq, False)
            for assignment in sharers:
                assignment.resamplefd.set()

    def _on_gsi(self, gsi: int) -> list[_Assignment]:
        return [assignment for assignment in self._assignments.values() if assignment.gsi == gsi]

    def _assert(self, gsi: int, level: bool) -> None:
        bit = 1 << gsi
        self._asserted = self._asserted | bit if level else self._asserted & ~bit
        self._update_pin(gsi)

    def _update_pin(self, gsi: int) -> None:
        self.pic.set_irq(gsi, bool((self._lines | self._asserted) >> gsi & 1))
