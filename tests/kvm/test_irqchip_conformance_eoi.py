# SPDX-License-Identifier: GPL-2.0-or-later
"""When the 8259A pair acknowledges, and what becomes of an assertion until then: the same on both irqchips."""

import pytest

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
)

IRQ5 = MASTER_BASE + 5
IRQ11 = SLAVE_BASE + 3
SPURIOUS_MASTER, SPURIOUS_SLAVE = MASTER_BASE + 7, SLAVE_BASE + 7


@pytest.fixture(autouse=True)
def pics(bench: IrqBench) -> None:
    """As firmware leaves them: the PCI interrupts level-triggered, the others not."""
    bench.init_pics(level=(5, 9, 10, 11))


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
