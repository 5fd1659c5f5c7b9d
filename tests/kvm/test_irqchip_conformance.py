# SPDX-License-Identifier: GPL-2.0-or-later
"""irqfds, resamplefds and their sources: the same on KVM's irqchip and on the userspace one."""

import errno
import os

import pytest

from proxyd.irqchip import GsiRefused
from tests.support.irqbench import (
    ELCR1,
    EOI,
    M_CMD,
    M_DATA,
    MASTER_BASE,
    S_CMD,
    S_DATA,
    SLAVE_BASE,
    SPECIFIC_EOI,
    IrqBench,
    Pair,
)

IRQ5 = MASTER_BASE + 5
IRQ10, IRQ11 = SLAVE_BASE + 2, SLAVE_BASE + 3
SPURIOUS_MASTER, SPURIOUS_SLAVE = MASTER_BASE + 7, SLAVE_BASE + 7


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


def test_eoi_of_the_master_alone_acknowledges_nothing_of_the_slave(bench: IrqBench) -> None:
    pair = bench.assign(11)
    bench.fire(11, pair)
    bench.take()
    bench.outb(M_CMD, EOI)
    assert not pair.resampled
    assert bench.irr() & 1 << 11
    bench.outb(S_CMD, EOI)
    assert pair.resampled


def test_non_specific_eoi_with_nothing_in_service_does_nothing(bench: IrqBench) -> None:
    pair = bench.assign(5)
    bench.outb(M_CMD, EOI)
    assert not pair.resampled
    bench.fire(5, pair)
    bench.outb(M_CMD, EOI)
    assert not pair.resampled
    assert bench.take() == [IRQ5]


@pytest.mark.parametrize("masked", [False, True])
def test_specific_eoi_resamples_whatever_the_state(bench: IrqBench, masked: bool) -> None:
    pair = bench.assign(5)
    bench.outb(M_DATA, masked << 5)
    bench.outb(M_CMD, SPECIFIC_EOI | 5)
    assert pair.resampled, "never asserted"
    bench.fire(5, pair)
    bench.outb(M_CMD, SPECIFIC_EOI | 5)
    assert pair.resampled, "requested, not in service"
    assert bench.irr() == 0


@pytest.mark.parametrize(("gsi", "command"), [(5, M_CMD), (11, S_CMD)])
def test_a_poll_acknowledges(bench: IrqBench, gsi: int, command: int) -> None:
    pair = bench.assign(gsi)
    bench.fire(gsi, pair)
    assert bench.poll(command) == gsi & 7
    assert pair.resampled
    assert bench.isr() == 0
    assert bench.irr() & 1 << gsi == 0
    assert bench.poll(command) is None
    assert not pair.resampled


def test_automatic_eoi_resamples_before_the_handler_runs(bench: IrqBench) -> None:
    bench.init_pics(icw4=0x03, level=(11,))
    pair = bench.assign(11)
    bench.fire(11, pair)
    assert bench.take(2) == [IRQ11]
    assert pair.resampled
    assert bench.isr() == 0
    bench.irqchip.set_line(11, True)
    assert bench.take(3) == [IRQ11] * 3, "a level that is held interrupts the handler itself"


def test_a_masked_pin_keeps_its_request(bench: IrqBench) -> None:
    pair = bench.assign(11)
    bench.outb(S_DATA, 1 << 3)
    bench.fire(11, pair)
    assert bench.take() == []
    assert bench.irr() & 1 << 11
    bench.outb(S_DATA, 0)
    assert not pair.resampled, "nothing was acknowledged: the peer can't take its level back"
    assert bench.take() == [IRQ11]


def test_initialization_keeps_levels_and_what_is_in_service(bench: IrqBench) -> None:
    serviced, requested = bench.assign(5), bench.assign(6)
    bench.outb(ELCR1, 1 << 5 | 1 << 6)
    bench.fire(5, serviced)
    assert bench.take() == [IRQ5]
    bench.fire(6, requested)
    for port, value in ((M_CMD, 0x11), (M_DATA, 0x40), (M_DATA, 4), (M_DATA, 1)):
        bench.outb(port, value)
    assert bench.irr() == 1 << 5 | 1 << 6
    assert bench.isr() == 1 << 5
    assert not serviced.resampled
    assert not requested.resampled
    bench.outb(M_DATA, 0)
    assert bench.take() == [], "the one in service was never acknowledged and blocks the rest"
    bench.outb(M_CMD, SPECIFIC_EOI | 5)
    assert bench.take() == [0x40 + 6]


def test_initialization_drops_and_acknowledges_an_edge(bench: IrqBench) -> None:
    pair = bench.assign(3)
    bench.fire(3, pair)
    assert bench.irr() == 1 << 3
    bench.outb(M_CMD, 0x11)
    assert pair.resampled
    for value in (MASTER_BASE, 4, 1, 0):
        bench.outb(M_DATA, value)
    assert bench.take() == []


def test_a_slaves_line_that_drops_before_inta_is_spurious(bench: IrqBench) -> None:
    pair = bench.assign(11)
    bench.fire(11, pair)
    bench.irqchip.deassign(11, pair.irqfd)
    assert bench.take(2) == [SPURIOUS_SLAVE]
    assert bench.isr() == 1 << 2, "the master took it for real and wants its EOI"
    bench.outb(M_CMD, EOI)
    assert bench.isr() == 0
    assert not pair.resampled


def test_a_masters_line_that_drops_before_inta_vanishes(bench: IrqBench) -> None:
    pair = bench.assign(5)
    bench.fire(5, pair)
    bench.irqchip.deassign(5, pair.irqfd)
    assert bench.take() == []


def test_a_request_that_an_initialization_drops_is_spurious(bench: IrqBench) -> None:
    bench.irqchip.set_line(3, True)
    bench.outb(M_CMD, 0x10)  # no ICW4, and INT stays up until the pair looks again
    bench.outb(M_DATA, MASTER_BASE)
    bench.outb(M_DATA, 4)
    assert bench.take(2) == [SPURIOUS_MASTER]
    assert bench.isr() == 0


class TestEdgeTriggered:
    """What goes wrong with INTx on an edge-triggered pin, and why it must not be left so."""

    def test_one_interrupt_for_each_assertion(self, bench: IrqBench) -> None:
        pair = bench.assign(3)
        for _ in range(3):
            bench.fire(3, pair)
            assert bench.take(2) == [MASTER_BASE + 3]
            assert bench.irr() == 0
            bench.eoi(3)
            assert pair.resampled

    def test_a_sharers_assertion_before_eoi_is_lost(self, bench: IrqBench) -> None:
        first, second = bench.assign(3), bench.assign(3)
        bench.fire(3, first)
        bench.take()
        bench.fire(3, second)
        bench.eoi(3)
        assert bench.take() == []

    def test_a_line_held_by_another_source_hides_the_next_assertion(self, bench: IrqBench) -> None:
        pair = bench.assign(3)
        bench.irqchip.set_line(3, True)
        bench.take()
        bench.eoi(3)
        bench.fire(3, pair)
        assert bench.take() == []

    def test_deassign_leaves_the_request(self, bench: IrqBench) -> None:
        pair = bench.assign(3)
        bench.fire(3, pair)
        bench.irqchip.deassign(3, pair.irqfd)
        assert bench.irr() == 1 << 3
        assert bench.take() == [MASTER_BASE + 3]
