# SPDX-License-Identifier: GPL-2.0-or-later
"""What the userspace irqchip has beyond the suite shared with KVM: its loop, and the order at EOI."""

import tempfile
from collections.abc import Iterator

import pytest

from common.loop import Loop
from common.notifier import EventNotifier
from proxyd.kvm.irqchip import GsiRefused
from proxyd.vm.soft.softirqchip import SoftIrqchip

LEVEL = 1 << 3
IRQ11_EOI = 0x63


@pytest.fixture
def irqchip(loop: Loop) -> Iterator[SoftIrqchip]:
    irqchip = SoftIrqchip(loop)
    irqchip.pic.port_out(0x4D1, 1, LEVEL)
    yield irqchip
    irqchip.close()


@pytest.fixture
def irqfd() -> Iterator[EventNotifier]:
    notifier = EventNotifier.create()
    yield notifier
    notifier.close()


@pytest.fixture
def resamplefd() -> Iterator[EventNotifier]:
    notifier = EventNotifier.create()
    yield notifier
    notifier.close()


def test_the_loop_delivers(
    loop: Loop, irqchip: SoftIrqchip, irqfd: EventNotifier, resamplefd: EventNotifier
) -> None:
    irqchip.assign(11, irqfd, resamplefd)
    irqfd.set()
    assert not irqchip.pic.intr
    loop.step()
    assert irqchip.pic.intr
    irqchip.pic.port_out(0xA0, 1, IRQ11_EOI)
    loop.step()
    assert irqchip.pic.port_in(0xA0, 1) == 0, "one event, one assertion"


def test_an_event_that_is_pending_at_assign_asserts_without_the_loop(
    irqchip: SoftIrqchip, irqfd: EventNotifier, resamplefd: EventNotifier
) -> None:
    irqfd.set()
    irqchip.assign(11, irqfd, resamplefd)
    assert irqchip.pic.intr


def test_what_was_written_before_the_eoi_is_over_with_it(
    irqchip: SoftIrqchip, irqfd: EventNotifier, resamplefd: EventNotifier
) -> None:
    """KVM consumes a write when it is made, not when a loop gets round to it."""
    irqchip.assign(11, irqfd, resamplefd)
    irqfd.set()
    irqchip.poll()
    irqfd.set()
    irqchip.pic.port_out(0xA0, 1, IRQ11_EOI)
    irqchip.poll()
    assert irqchip.pic.port_in(0xA0, 1) == 0


def test_a_deassigned_irqfd_is_out_of_the_loop(
    loop: Loop, irqchip: SoftIrqchip, irqfd: EventNotifier, resamplefd: EventNotifier
) -> None:
    irqchip.assign(11, irqfd, resamplefd)
    irqchip.deassign(11, irqfd)
    irqfd.set()
    loop.step()
    assert not irqchip.pic.intr
    assert irqfd.test_and_clear()


def test_the_line_is_low_before_anyone_is_told(
    irqchip: SoftIrqchip, irqfd: EventNotifier, resamplefd: EventNotifier
) -> None:
    seen = []

    class Witness(EventNotifier):
        def set(self) -> None:
            seen.append(irqchip.pic.port_in(0xA0, 1))
            super().set()

    witness = Witness.create()
    with_witness, other = (irqfd, witness), (EventNotifier.create(), resamplefd)
    for pair in (with_witness, other):
        irqchip.assign(11, *pair)
    irqfd.set()
    irqchip.poll()
    assert irqchip.pic.port_in(0xA0, 1) == LEVEL
    irqchip.pic.port_out(0xA0, 1, IRQ11_EOI)
    assert seen == [0]
    irqchip.close()
    witness.close()
    other[0].close()


def test_what_cannot_be_polled_is_not_assigned(irqchip: SoftIrqchip, resamplefd: EventNotifier) -> None:
    with tempfile.TemporaryFile() as file:
        impostor = EventNotifier(file.fileno())
        with pytest.raises(PermissionError):
            irqchip.assign(11, impostor, resamplefd)
        irqchip.reset()  # which an assignment that was left behind would prevent


@pytest.mark.parametrize("gsi", [16, 23])
def test_there_is_no_ioapic(
    irqchip: SoftIrqchip, irqfd: EventNotifier, resamplefd: EventNotifier, gsi: int
) -> None:
    with pytest.raises(GsiRefused, match=f"GSI {gsi} has no route"):
        irqchip.assign(gsi, irqfd, resamplefd)
