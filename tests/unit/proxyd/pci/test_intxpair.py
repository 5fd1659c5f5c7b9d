# SPDX-License-Identifier: GPL-2.0-or-later
"""The proxy's pair of eventfds on the userspace irqchip: what an assign leaves behind, and for whom."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from common.loop import Loop
from common.notifier import EventNotifier
from proxyd.kvm.irqchip import GsiRefused
from proxyd.pci.intxpair import IntxPair
from proxyd.vm.soft.softirqchip import SoftIrqchip
from tests.support.fds import no_fd_is_left
from tests.support.irqbench import READ_IRR, S_CMD
from tests.support.unsendable import lasting_eventfd, returns_soon


@pytest.fixture
def irqchip(loop: Loop) -> Iterator[SoftIrqchip]:
    irqchip = SoftIrqchip(loop)
    for irq in (10, 11):
        irqchip.set_level_triggered(irq)
    yield irqchip
    irqchip.close()


@pytest.fixture
def pair(irqchip: SoftIrqchip) -> Iterator[IntxPair]:
    with no_fd_is_left():
        pair = IntxPair(irqchip)
        pair.create()
        yield pair
        pair.close()


def test_a_remote_can_hold_up_no_close(pair: IntxPair) -> None:
    with lasting_eventfd() as eventfd:
        irqfd, _ = notifiers(pair)
        os.dup2(eventfd, irqfd.fd, inheritable=False)
        os.close(eventfd)
        assert returns_soon(pair.close)
        with pytest.raises(OSError, match="too many earlier ones take long to close"):
            renew_for_ever(pair)


def renew_for_ever(pair: IntxPair) -> None:
    while True:
        pair.create()
        pair.close()


def requests(irqchip: SoftIrqchip) -> int:
    irqchip.poll()
    irqchip.pic.port_out(S_CMD, 1, READ_IRR)
    return irqchip.pic.port_in(S_CMD, 1) << 8


def notifiers(pair: IntxPair) -> tuple[EventNotifier, EventNotifier]:
    assert pair.irqfd is not None
    assert pair.resamplefd is not None
    return pair.irqfd, pair.resamplefd


def test_an_event_from_before_the_assign_is_dropped_and_the_peer_asked(
    irqchip: SoftIrqchip, pair: IntxPair
) -> None:
    irqfd, resamplefd = notifiers(pair)
    for gsi in (10, 11):
        irqfd.set()
        pair.assign(gsi)
        assert requests(irqchip) == 0, "the peer asserts in answer to the kick, which must be the only time"
        assert resamplefd.test_and_clear()
        pair.assign(None)
        assert not resamplefd.test_and_clear(), "nobody is asked for a line that goes nowhere"


def test_a_line_that_moves_takes_its_assertion_from_the_old_gsi(irqchip: SoftIrqchip, pair: IntxPair) -> None:
    irqfd, _ = notifiers(pair)
    pair.assign(10)
    irqfd.set()
    assert requests(irqchip) == 1 << 10
    pair.assign(11)
    assert requests(irqchip) == 0
    irqfd.set()
    assert requests(irqchip) == 1 << 11
    assert pair.gsi == 11


def test_a_gsi_that_is_refused_leaves_the_pair_unassigned(irqchip: SoftIrqchip, pair: IntxPair) -> None:
    pair.assign(10)
    with pytest.raises(GsiRefused):
        pair.assign(2)
    assert pair.gsi is None
    pair.assign(10)
    assert pair.gsi == 10


def test_without_a_pair_there_is_nothing_to_assign(irqchip: SoftIrqchip, pair: IntxPair) -> None:
    pair.close()
    pair.assign(10)
    assert pair.gsi is None
    irqchip.reset()  # which an assignment would prevent


def test_a_closed_pair_is_out_of_the_irqchip(irqchip: SoftIrqchip, pair: IntxPair) -> None:
    pair.assign(10)
    pair.close()
    assert pair.gsi is None
    irqchip.reset()
    pair.close()
