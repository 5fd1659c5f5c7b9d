# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a GSI can be raised: the protocol of an irqchip, and KVM's in-kernel one."""

from __future__ import annotations

import threading
from typing import Protocol

from common.errors import IohubError
from common.notifier import EventNotifier
from proxyd.kvm.kvm import Vm
from proxyd.kvm.kvm_h import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    kvm_irq_routing_entry,
    kvm_irqchip,
)

__all__ = [
    "ELCR_MASK",
    "NUM_IRQS",
    "GsiRefused",
    "Irqchip",
    "KvmIrqchip",
    "intx_routing",
    "is_level_capable",
]

NUM_IRQS = 16
"""pins of the 8259A pair, the cascade among them"""

ELCR_MASK = (0xF8, 0xDE)
"""writable bits of ELCR1 and ELCR2 (82371SB PIIX3, 4.1.1); the other pins are edge-triggered for good"""

_IOAPIC_BASE_ADDRESS = 0xFEC0_0000
_IOAPIC_REDIR_MASKED = 1 << 16


class GsiRefused(IohubError):
    """A level-triggered interrupt was asked for on a GSI that can't carry one."""


class Irqchip(Protocol):
    """What raises interrupts in a guest. A GSI below 16 is the IRQ of that number on the 8259A pair.

    The level of a GSI is the OR of its sources: set_line() is one, all irqfds on it together are another.
    """

    def assign(self, gsi: int, irqfd: EventNotifier, resamplefd: EventNotifier) -> None:
        """From now on a write to ``irqfd`` asserts ``gsi``, and a write that is pending asserts it at once.

        At EOI the assertion of all irqfds on the GSI ends first, then every resamplefd on it is signalled,
        also when its own irqfd or no irqfd had asserted. The caller keeps the notifiers open until
        deassign(), and signals ``resamplefd`` after assign() so that the peer asserts what was lost before.

        Raises GsiRefused for a GSI without a route or without level triggering, OSError with EBUSY for an
        irqfd that is assigned already, to whichever GSI.
        """

    def deassign(self, gsi: int, irqfd: EventNotifier) -> None:
        """Ends the assignment and drains ``irqfd``; the last one on ``gsi`` takes the assertion with it.

        While others remain, what this one asserted stays until EOI. An irqfd that isn't assigned to that very
        GSI is no error and nothing changes, as with KVM_IRQFD.
        """

    def set_line(self, gsi: int, level: bool) -> None:
        """Drives the line of an emulated device; it isn't lowered by EOI."""

    def set_level_triggered(self, irq: int) -> bool:
        """Sets the pin's ELCR bit, as a PCI interrupt router or the firmware does; True if it was clear.

        Sources that are high are looked at again. Raises GsiRefused for a pin whose bit is fixed.
        """

    def reset(self) -> None:
        """Power-on state: edge-triggered, nothing masked, requested or in service, all lines low.

        The assertion by irqfds isn't part of that state and would come back at the next change of the line,
        so every irqfd must have been deassigned: RuntimeError otherwise.
        """

    def close(self) -> None:
        """Ends all assignments, one by one."""


def is_level_capable(irq: int) -> bool:
    """Whether an IRQ of the 8259A pair can be level-triggered: not 0, 1, 2, 8 and 13."""
    return 0 <= irq < NUM_IRQS and bool(ELCR_MASK[irq >> 3] >> (irq & 7) & 1)


def intx_routing() -> list[kvm_irq_routing_entry]:
    """The routes of the IOAPIC's 24 GSIs, the first 16 of which are the pins of the 8259A pair as well.

    Every table that a VM gets must start with these. A GSI that is moved to another pin while asserted leaves
    the old pin high and without anyone who lowers it at EOI (virt/kvm/irqchip.c, irqfds keep no pin).
    """
    pins = [(irq, KVM_IRQCHIP_PIC_MASTER + (irq >> 3), irq & 7) for irq in range(NUM_IRQS)]
    pins += [(gsi, KVM_IRQCHIP_IOAPIC, gsi) for gsi in range(KVM_IOAPIC_NUM_PINS)]
    entries = []
    for gsi, chip, pin in pins:
        entry = kvm_irq_routing_entry(gsi, KVM_IRQ_ROUTING_IRQCHIP)
        entry.u.irqchip.irqchip = chip
        entry.u.irqchip.pin = pin
        entries.append(entry)
    return entries


class KvmIrqchip:
    """KVM's PICs and IOAPIC, with irqfds; may be used from any thread of the process that made the VM."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._gsis: dict[EventNotifier, int] = {}
        self._lines: set[int] = set()
        vm.set_gsi_routing(intx_routing())

    def assign(self, gsi: int, irqfd: EventNotifier, resamplefd: EventNotifier) -> None:
        """See Irqchip. KVM itself accepts any GSI, and drops the events of one without a route."""
        if not 0 <= gsi < KVM_IOAPIC_NUM_PINS:
            raise GsiRefused(f"GSI {gsi} has no route")
        if gsi < NUM_IRQS and not is_level_capable(gsi):
            raise GsiRefused(f"IRQ {gsi} can't be level-triggered")
        with self._lock:
            self._vm.assign_irqfd(gsi, irqfd, resamplefd)
            self._gsis[irqfd] = gsi

    def deassign(self, gsi: int, irqfd: EventNotifier) -> None:
        """See Irqchip."""
        with self._lock:
            if self._gsis.get(irqfd) == gsi:
                self._vm.deassign_irqfd(gsi, irqfd)
                del self._gsis[irqfd]

    def set_line(self, gsi: int, level: bool) -> None:
        """See Irqchip."""
        with self._lock:
            self._vm.irq_line(gsi, level)
            if level:
                self._lines.add(gsi)
            else:
                self._lines.discard(gsi)

    def set_level_triggered(self, irq: int) -> bool:
        """See Irqchip.

        KVM has no request for the ELCR alone: the chip's state is read, changed and written back. No vCPU may
        run meanwhile. An irqfd that asserts in between isn't lost, since its source survives and every line
        is looked at again afterwards; an edge in between is, such as a tick of KVM's PIT. Firmware that sets
        the ELCR itself, before it starts the timer, avoids even that: nothing is written if the bit is set.
        """
        if not is_level_capable(irq):
            raise GsiRefused(f"IRQ {irq} can't be level-triggered")
        with self._lock:
            chip = self._vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER + (irq >> 3))
            bit = 1 << (irq & 7)
            if chip.chip.pic.elcr & bit:
                return False
            chip.chip.pic.elcr |= bit
            self._vm.set_irqchip(chip)
            for gsi in sorted({*self._gsis.values(), *self._lines}):
                if gsi >> 3 == irq >> 3:
                    self._vm.irq_line(gsi, gsi in self._lines)
        return True

    def reset(self) -> None:
        """See Irqchip. No vCPU may run meanwhile."""
        with self._lock:
            if self._gsis:
                raise RuntimeError(f"reset with irqfds assigned to GSIs {sorted(self._gsis.values())}")
            while self._lines:
                self._vm.irq_line(self._lines.pop(), False)
            # The slave first: after a chip is written, KVM forwards a request of the slave to the master.
            for chip_id in (KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_PIC_MASTER):
                chip = kvm_irqchip(chip_id)
                chip.chip.pic.elcr_mask = ELCR_MASK[chip_id]
                self._vm.set_irqchip(chip)
            chip = kvm_irqchip(KVM_IRQCHIP_IOAPIC)
            chip.chip.ioapic.base_address = _IOAPIC_BASE_ADDRESS
            chip.chip.ioapic.redirtbl[:] = [_IOAPIC_REDIR_MASKED] * KVM_IOAPIC_NUM_PINS
            self._vm.set_irqchip(chip)

    def close(self) -> None:
        """See Irqchip.

        To be called before the VM is closed: the kernel's own teardown of several irqfds at once has been
        seen to hang (synchronize_srcu() under resampler_lock).
        """
        with self._lock:
            while self._gsis:
                irqfd, gsi = next(iter(self._gsis.items()))
                self._vm.deassign_irqfd(gsi, irqfd)
                del self._gsis[irqfd]
