# SPDX-License-Identifier: GPL-2.0-or-later
"""The registers and priorities of the 8259A pair: the same in KVM and in user space."""

import pytest

from tests.support.irqbench import (
    ELCR1,
    ELCR2,
    EOI,
    M_CMD,
    M_DATA,
    MASTER_BASE,
    POLL,
    READ_IRR,
    READ_ISR,
    S_CMD,
    S_DATA,
    SLAVE_BASE,
    SPECIFIC_EOI,
    IrqBench,
)

ROTATE_ON_EOI = 0xA0
ROTATE_ON_SPECIFIC_EOI = 0xE0
SET_PRIORITY = 0xC0
ROTATE_ON_AEOI, NO_ROTATE_ON_AEOI = 0x80, 0x00
SET_SPECIAL_MASK = 0x68
ICW4_8086, ICW4_AEOI, ICW4_SFNM = 0x01, 0x02, 0x10


@pytest.fixture(autouse=True)
def pics(bench: IrqBench) -> None:
    bench.init_pics()


def pulse(bench: IrqBench, *irqs: int) -> None:
    """An edge on each of these pins; they are edge-triggered unless a test says otherwise."""
    for irq in irqs:
        bench.irqchip.set_line(irq, True)
        bench.irqchip.set_line(irq, False)


def vectors(*irqs: int) -> list[int]:
    return [MASTER_BASE + irq if irq < 8 else SLAVE_BASE + irq - 8 for irq in irqs]


def test_which_pins_can_be_level_triggered(bench: IrqBench) -> None:
    bench.outb(ELCR1, 0xFF)
    bench.outb(ELCR2, 0xFF)
    assert (bench.inb(ELCR1), bench.inb(ELCR2)) == (0xF8, 0xDE)
    bench.outb(ELCR2, 0)
    assert (bench.inb(ELCR1), bench.inb(ELCR2)) == (0xF8, 0)


def test_level_follows_the_line_edge_does_not(bench: IrqBench) -> None:
    bench.outb(ELCR1, 1 << 5)
    pulse(bench, 5, 6)
    assert bench.irr() == 1 << 6
    bench.irqchip.set_line(5, True)
    assert bench.irr() == 1 << 5 | 1 << 6
    bench.irqchip.set_line(5, True)
    assert bench.take(2) == vectors(5)
    bench.outb(M_CMD, EOI)
    assert bench.take(1) == vectors(5), "still high"


def test_elcr_does_not_touch_requests(bench: IrqBench) -> None:
    bench.irqchip.set_line(5, True)
    bench.irqchip.set_line(6, True)
    bench.take()
    bench.outb(ELCR1, 1 << 5 | 1 << 6)
    assert bench.irr() == 1 << 6
    bench.outb(ELCR1, 0)
    assert bench.irr() == 1 << 6


def test_priorities_nest(bench: IrqBench) -> None:
    pulse(bench, 14, 3, 5)
    assert bench.take(4) == vectors(14), "the slave counts as IR2"
    assert bench.isr() == 1 << 14 | 1 << 2
    pulse(bench, 1, 9)
    assert bench.take(4) == vectors(1), "IRQ 9 is on the slave, which is in service at the master"
    bench.outb(M_CMD, EOI)
    assert bench.take(4) == []
    bench.outb(M_CMD, EOI)
    assert bench.take(4) == vectors(9)
    bench.outb(S_CMD, EOI)
    bench.outb(M_CMD, EOI)
    assert bench.isr() == 1 << 14
    assert bench.take(4) == vectors(3)
    bench.outb(M_CMD, EOI)
    assert bench.take(4) == vectors(5)


def test_special_fully_nested_mode_lets_the_slave_interrupt_itself(bench: IrqBench) -> None:
    bench.init_pics(ICW4_8086 | ICW4_SFNM)
    pulse(bench, 14)
    assert bench.take(2) == vectors(14)
    pulse(bench, 9, 15)
    assert bench.take(2) == vectors(9)
    assert bench.isr() == 1 << 14 | 1 << 9 | 1 << 2


def test_special_fully_nested_mode_means_nothing_to_the_slave(bench: IrqBench) -> None:
    bench.init_pics(ICW4_8086 | ICW4_SFNM)
    pulse(bench, 10)
    assert bench.take() == vectors(10)
    pulse(bench, 11)
    assert bench.take() == [], "IR2 of the slave is no cascade, and in service"


def test_masks(bench: IrqBench) -> None:
    bench.outb(M_DATA, 0xAA)
    bench.outb(S_DATA, 0x55)
    assert (bench.inb(M_DATA), bench.inb(S_DATA)) == (0xAA, 0x55)
    pulse(bench, 5, 6, 8, 9)
    assert bench.take(4) == vectors(9)
    bench.eoi(9)
    assert bench.take(4) == vectors(6)
    bench.outb(M_CMD, EOI)
    bench.outb(M_DATA, 0)
    assert bench.take(4) == vectors(5)


def test_rotation_on_non_specific_eoi(bench: IrqBench) -> None:
    pulse(bench, 3, 4)
    order = []
    for _ in range(4):
        order += bench.take()
        bench.outb(M_CMD, ROTATE_ON_EOI)
        pulse(bench, 3)
    assert order == vectors(3, 4, 3, 3), "whoever was served goes last"


def test_rotation_on_specific_eoi(bench: IrqBench) -> None:
    pulse(bench, 3)
    assert bench.take() == vectors(3)
    bench.outb(M_CMD, ROTATE_ON_SPECIFIC_EOI | 5)
    assert bench.isr() == 1 << 3, "another one than that in service"
    bench.outb(M_CMD, SPECIFIC_EOI | 3)
    pulse(bench, 5, 6)
    assert bench.take(2) == vectors(6)


def test_set_priority(bench: IrqBench) -> None:
    bench.outb(M_CMD, SET_PRIORITY | 4)
    pulse(bench, 0, 4, 5)
    assert bench.take(3) == vectors(5)
    bench.outb(M_CMD, EOI)
    assert bench.take(3) == vectors(0)
    bench.outb(M_CMD, EOI)
    assert bench.take(3) == vectors(4)


def test_set_priority_lets_a_waiting_request_through(bench: IrqBench) -> None:
    pulse(bench, 3)
    assert bench.take() == vectors(3)
    pulse(bench, 6)
    assert bench.take() == []
    bench.outb(M_CMD, SET_PRIORITY | 3)
    assert bench.take() == vectors(6)


def test_rotation_on_automatic_eoi(bench: IrqBench) -> None:
    bench.init_pics(ICW4_8086 | ICW4_AEOI)
    bench.outb(M_CMD, ROTATE_ON_AEOI)
    pulse(bench, 3, 4)
    assert bench.take() == vectors(3)
    pulse(bench, 3)
    assert bench.take(3) == vectors(4, 3)
    bench.outb(M_CMD, NO_ROTATE_ON_AEOI)
    pulse(bench, 4, 5)
    assert bench.take(3) == vectors(4, 5)
    pulse(bench, 4, 5)
    assert bench.take(3) == vectors(4, 5), "no further rotation: IRQ 4 is the highest since the last"


def test_special_mask_mode_has_no_effect(bench: IrqBench) -> None:
    pulse(bench, 3)
    assert bench.take() == vectors(3)
    bench.outb(M_CMD, SET_SPECIAL_MASK)
    bench.outb(M_DATA, 1 << 3)
    pulse(bench, 6)
    assert bench.take() == [], "a real 8259A would let IRQ 6 through"
    bench.outb(M_CMD, EOI)
    assert bench.take() == vectors(6), "and would not have ended a masked one"


def test_irr_or_isr_stays_selected(bench: IrqBench) -> None:
    pulse(bench, 3, 4)
    bench.take()
    for ocw3, expected in ((READ_IRR, 1 << 4), (READ_ISR, 1 << 3)):
        bench.outb(M_CMD, ocw3)
        assert bench.inb(M_CMD) == expected
        bench.outb(M_CMD, 0x08)
        assert bench.inb(M_CMD) == expected, "an OCW3 without RR selects nothing"
    bench.outb(M_CMD, 0x11)
    assert bench.inb(M_CMD) == 0, "initialization selects IRR"


def test_initialization_without_icw4_ends_after_icw3(bench: IrqBench) -> None:
    bench.init_pics(ICW4_8086 | ICW4_AEOI)
    bench.outb(M_DATA, 0xFF)
    bench.outb(M_CMD, 0x10)
    for value in (0x47, 0x04, 0x80):
        bench.outb(M_DATA, value)
    assert bench.inb(M_DATA) == 0x80, "the third one is OCW1"
    pulse(bench, 3)
    assert bench.take() == [0x43], "the low bits of ICW2 are the pin's"
    assert bench.isr() == 1 << 3, "and automatic EOI is off"


def test_a_poll_of_the_master_sees_the_cascade_and_of_the_slave_takes_it_back(bench: IrqBench) -> None:
    pulse(bench, 11)
    assert bench.poll(M_CMD) == 2
    bench.init_pics()
    pulse(bench, 12)
    assert bench.irr() == 1 << 12 | 1 << 2
    assert bench.poll(S_CMD) == 4
    assert bench.irr() == 0
    assert bench.take() == []


def test_a_poll_answers_one_read_of_either_port(bench: IrqBench) -> None:
    bench.outb(M_DATA, 0x81)
    pulse(bench, 3)
    bench.outb(M_CMD, POLL)
    assert bench.inb(M_DATA) & 0x7F == 3
    assert bench.inb(M_DATA) == 0x81
    bench.outb(M_CMD, POLL)
    assert bench.inb(M_CMD) == 0x07, "no request"


def test_a_poll_without_request_takes_back_a_stale_int(bench: IrqBench) -> None:
    pulse(bench, 3)
    bench.outb(M_CMD, 0x10)  # drops the request of the edge, but INT stays up until the pair looks again
    bench.outb(M_DATA, MASTER_BASE)
    bench.outb(M_DATA, 4)
    assert bench.poll(M_CMD) is None
    assert bench.take() == []


def test_the_cascade_pin_has_no_slave_to_ask(bench: IrqBench) -> None:
    bench.irqchip.set_line(2, True)
    assert bench.take(2) == [SLAVE_BASE + 7]


def test_the_ports_are_eight_bits_wide(bench: IrqBench) -> None:
    bench.outb(M_DATA, 0x55)
    bench.outb(S_DATA, 0x55)
    bench.outw(M_CMD, 0xFF11)
    bench.outw(S_CMD, 0xFF11)
    bench.outw(ELCR1, 0xFFFF)
    assert [bench.inb(port) for port in (M_DATA, S_DATA, ELCR1, ELCR2)] == [0x55, 0x55, 0, 0]
    bench.irqchip.set_line(3, True)
    assert bench.inw(M_CMD) == 0
    bench.outb(ELCR1, 0x08)
    assert bench.inw(ELCR1) == 0
