# SPDX-License-Identifier: GPL-2.0-or-later
"""irqfds, resamplefds and their sources: the same on KVM's irqchip and on the userspace one."""

import errno
import os

import pytest

from proxyd.kvm.irqchip import GsiRefused
from tests.support.irqbench import (
    ELCR1,
    EOI,
    M_CMD,
    M_DATA,
    S_CMD,
    S_DATA,
    SLAVE_BASE,
    IrqBench,
    Pair,
)

IRQ10, IRQ11 = SLAVE_BASE + 2, SLAVE_BASE + 3


@pytest.fixture(autouse=True)
def pics(bench: IrqBench) -> None:
    """As firmware leaves them: the PCI interrupts level-triggered, the others not."""
    bench.init_pics(level=(5, 9, 10, 11))


def test_an_event_asserts_until_eoi(bench: IrqBench) -> None:
    pair = bench.assign(11)
    bench.fire(11, pair)
    assert bench.take() == [IRQ11]
    assert bench.isr() == 1 << 11 | 1 << 2
    assert bench.take() == [], "in service: not again before EOI"
    assert bench.irr() & 1 << 11, "a level stays requested while in service"
    assert not pair.resampled
    bench.eoi(11)
    assert pair.resampled
    assert bench.irr() & 1 << 11 == 0
    assert bench.isr() == 0
    assert bench.take() == []


def test_events_coalesce(bench: IrqBench) -> None:
    pair = bench.assign(10)
    for _ in range(5):
        pair.irqfd.set()
    bench.fire(10, pair)
    assert bench.take() == [IRQ10]
    bench.fire(10, pair)
    bench.eoi(10)
    assert bench.take() == []
    assert bench.irr() & 1 << 10 == 0


def test_a_reassertion_after_the_resample_arrives(bench: IrqBench) -> None:
    pair = bench.assign(10)
    for _ in range(20):
        bench.fire(10, pair)
        assert bench.take() == [IRQ10]
        bench.eoi(10)
        assert pair.resampled


def test_all_sharers_are_told(bench: IrqBench) -> None:
    asserting, idle, elsewhere = bench.assign(11), bench.assign(11), bench.assign(10)
    bench.fire(11, asserting)
    bench.take()
    bench.eoi(11)
    assert asserting.resampled
    assert idle.resampled
    assert not elsewhere.resampled


def test_a_sharer_that_asserts_before_eoi_is_served_after_it(bench: IrqBench) -> None:
    first, second = bench.assign(11), bench.assign(11)
    bench.fire(11, first)
    assert bench.take() == [IRQ11]
    bench.fire(11, second)
    bench.eoi(11)
    assert bench.take() == [], "one assertion for both, and it has ended"
    assert first.resampled
    assert second.resampled
    bench.fire(11, second)  # which is still high, and so answers the resample
    assert bench.take() == [IRQ11]


def test_an_interrupt_of_an_emulated_device_resamples_too(bench: IrqBench) -> None:
    pair = bench.assign(11)
    bench.irqchip.set_line(11, True)
    assert bench.take() == [IRQ11]
    bench.irqchip.set_line(11, False)
    bench.eoi(11)
    assert pair.resampled


def test_lowering_a_line_leaves_what_an_irqfd_asserted(bench: IrqBench) -> None:
    pair = bench.assign(11)
    bench.irqchip.set_line(11, True)
    bench.fire(11, pair)
    bench.irqchip.set_line(11, False)
    assert bench.take() == [IRQ11]


def test_eoi_leaves_an_emulated_devices_line_high(bench: IrqBench) -> None:
    pair = bench.assign(11)
    bench.fire(11, pair)
    bench.irqchip.set_line(11, True)
    assert bench.take() == [IRQ11]
    bench.eoi(11)
    assert bench.take() == [IRQ11]
    bench.irqchip.set_line(11, False)
    bench.eoi(11)
    assert bench.take() == []


def test_one_resamplefd_can_serve_several_irqfds(bench: IrqBench) -> None:
    first = bench.assign(10)
    second = bench.assign(11, Pair(bench.pair().irqfd, first.resamplefd))
    for gsi, pair in ((10, first), (11, second)):
        bench.fire(gsi, pair)
        bench.take()
        bench.eoi(gsi)
        assert first.resampled


def test_a_full_resamplefd_stops_nobody(bench: IrqBench) -> None:
    full, other = bench.assign(11), bench.assign(11)
    os.eventfd_write(full.resamplefd.fd, 2**64 - 2)
    bench.fire(11, other)
    bench.take()
    bench.eoi(11)
    assert other.resampled
    assert full.resampled


def test_an_event_that_is_pending_at_assign_asserts_at_once(bench: IrqBench) -> None:
    pair = bench.pair()
    pair.irqfd.set()
    bench.assign(10, pair)
    bench.settle(10, pair)
    assert bench.take() == [IRQ10]
    bench.eoi(10)
    assert pair.resampled
    assert bench.take() == []


def test_an_event_between_two_assignments_asserts_the_second_gsi(bench: IrqBench) -> None:
    pair = bench.assign(10)
    bench.irqchip.deassign(10, pair.irqfd)
    pair.irqfd.set()
    bench.assign(11, pair)
    bench.settle(11, pair)
    assert bench.take(2) == [IRQ11]


def test_deassign_drains_and_lowers(bench: IrqBench) -> None:
    pair = bench.assign(10)
    pair.irqfd.set()
    bench.irqchip.deassign(10, pair.irqfd)
    assert not pair.irqfd.test_and_clear()
    assert bench.irr() & 1 << 10 == 0
    bench.assign(10, pair)
    bench.settle(10, pair)
    assert bench.irr() & 1 << 10 == 0
    assert not pair.resampled, "deassign signals nobody"


def test_deassign_leaves_the_line_to_the_other_sharers(bench: IrqBench) -> None:
    leaving, staying = bench.assign(10), bench.assign(10)
    leaving.irqfd.set()
    bench.irqchip.deassign(10, leaving.irqfd)
    assert bench.take() == [IRQ10]
    bench.eoi(10)
    assert staying.resampled
    assert not leaving.resampled
    assert bench.take() == []
    bench.fire(10, staying)
    bench.irqchip.deassign(10, staying.irqfd)
    assert bench.irr() & 1 << 10 == 0


def test_deassign_leaves_an_emulated_devices_line(bench: IrqBench) -> None:
    pair = bench.assign(10)
    bench.fire(10, pair)
    bench.irqchip.set_line(10, True)
    bench.irqchip.deassign(10, pair.irqfd)
    assert bench.take() == [IRQ10]


def test_deassign_of_another_gsi_does_nothing(bench: IrqBench) -> None:
    pair = bench.assign(10)
    bench.irqchip.deassign(11, pair.irqfd)
    bench.irqchip.deassign(10, bench.pair().irqfd)
    bench.fire(10, pair)
    assert bench.take() == [IRQ10]
    bench.eoi(10)
    assert pair.resampled


@pytest.mark.parametrize("second_gsi", [10, 11])
def test_an_irqfd_has_one_gsi(bench: IrqBench, second_gsi: int) -> None:
    pair = bench.assign(10)
    with pytest.raises(OSError) as caught:
        bench.assign(second_gsi, pair)
    assert caught.value.errno == errno.EBUSY
    bench.fire(10, pair)
    assert bench.take(2) == [IRQ10]
    bench.irqchip.deassign(10, pair.irqfd)
    bench.assign(11, pair)
    bench.fire(11, pair)
    bench.outb(M_CMD, EOI)
    bench.outb(S_CMD, EOI)
    assert bench.take(2) == [IRQ11]


@pytest.mark.parametrize("gsi", [-1, 0, 1, 2, 8, 13, 24, 60, 0xFFFFFFFF])
def test_a_gsi_that_cannot_carry_a_level_is_refused(bench: IrqBench, gsi: int) -> None:
    pair = bench.pair()
    pair.irqfd.set()
    with pytest.raises(GsiRefused, match=str(gsi)):
        bench.assign(gsi, pair)
    assert bench.irr() == 0
    assert pair.irqfd.test_and_clear(), "the refused assignment has not touched the event"
    with pytest.raises(GsiRefused):
        bench.irqchip.set_level_triggered(gsi)


def test_closing_ends_every_assignment(bench: IrqBench) -> None:
    first, second = bench.assign(10), bench.assign(11)
    bench.fire(10, first)
    bench.irqchip.close()
    assert bench.irr() & 1 << 10 == 0
    second.irqfd.set()
    assert second.irqfd.test_and_clear(), "nobody took the event"


def test_reset_wants_the_irqfds_gone(bench: IrqBench) -> None:
    pair = bench.assign(11)
    with pytest.raises(RuntimeError, match="11"):
        bench.irqchip.reset()
    bench.fire(11, pair)
    assert bench.take() == [IRQ11]


def test_reset_is_power_on(bench: IrqBench) -> None:
    pair = bench.assign(11)
    bench.irqchip.set_line(5, True)
    bench.irqchip.set_line(3, True)
    bench.fire(11, pair)
    bench.take(3)
    bench.irqchip.set_line(14, True)
    bench.outb(M_DATA, 0x12)
    bench.irqchip.deassign(11, pair.irqfd)
    bench.irqchip.reset()
    assert [bench.inb(port) for port in (M_CMD, M_DATA, S_CMD, S_DATA, ELCR1, ELCR1 + 1)] == [0] * 6
    assert bench.isr() == 0
    assert bench.irr() == 0
    assert bench.take() == []
    bench.init_pics(level=(5,))
    for irq in (3, 5, 14):
        bench.irqchip.set_line(irq, False)
    assert bench.irr() == 0, "no line was left high for a later change to bring back"


def test_a_router_makes_a_pin_level_triggered_once(bench: IrqBench) -> None:
    bench.outb(ELCR1, 0)
    assert bench.irqchip.set_level_triggered(5)
    assert bench.inb(ELCR1) == 1 << 5
    assert not bench.irqchip.set_level_triggered(5)
    assert bench.irqchip.set_level_triggered(6)
    assert bench.inb(ELCR1) == 1 << 5 | 1 << 6


@pytest.mark.parametrize("gsi", [5, 10])
def test_a_high_line_is_seen_when_its_pin_becomes_level_triggered(bench: IrqBench, gsi: int) -> None:
    bench.init_pics(level=())
    pair = bench.assign(gsi)
    bench.fire(gsi, pair)
    assert len(bench.take()) == 1
    assert bench.irr() & 1 << gsi == 0, "the edge is spent"
    assert bench.irqchip.set_level_triggered(gsi)
    assert bench.irr() & 1 << gsi
    bench.eoi(gsi)
    assert pair.resampled
    assert bench.irr() & 1 << gsi == 0
