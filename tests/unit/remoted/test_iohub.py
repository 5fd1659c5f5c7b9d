# SPDX-License-Identifier: GPL-2.0-or-later
"""The IOHub with real eventfds: when an irqfd is written, and when not."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from common.loop import Loop
from common.notifier import EventNotifier, adopt_pair
from common.pci import PCI_DEVFN_MAX
from remoted.iohub import IoHub, Pirq
from tests.support.fds import count_fds
from tests.support.unsendable import returns_soon

PIRQ = 40
FULL = (1 << 64) - 2


class Bench:
    """A hub, and the VMM's copies of the eventfds of pirq 40."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.hub = IoHub(self.loop)
        self.pirq = self.hub.pirqs[PIRQ]
        self._poll = select.poll()
        self._poll.register(self.loop._epoll, select.POLLIN)

    @property
    def is_at_rest(self) -> bool:
        """Whether the loop would wait."""
        return not self._poll.poll(0)

    def assign(self, pirq: int = PIRQ) -> tuple[int, int]:
        """Gives the hub a new pair; returns copies, the caller's."""
        pair = EventNotifier.create(), EventNotifier.create()
        copies = os.dup(pair[0].fd), os.dup(pair[1].fd)
        self.hub.pirqs[pirq].set_irqfd(*pair)
        return copies


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = count_fds()
    bench = Bench()
    yield bench
    bench.hub.finalize()
    bench.loop.close()
    assert count_fds() == before


@pytest.fixture
def pair(bench: Bench) -> Iterator[tuple[int, int]]:
    pair = bench.assign()
    yield pair
    for fd in pair:
        os.close(fd)


def written(fd: int) -> int:
    """How often an eventfd was written since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


Fds = tuple[int, int]


def test_irqfd_is_written_when_the_level_rises_and_at_no_other_time(bench: Bench, pair: Fds) -> None:
    irqfd, _ = pair
    bench.loop.step()
    assert written(irqfd) == 0
    bench.pirq.set_irq(True)
    assert written(irqfd) == 1
    bench.loop.step()
    bench.pirq.set_irq(False)
    bench.loop.step()
    assert written(irqfd) == 0
    bench.pirq.set_irq(True)
    assert written(irqfd) == 1


def test_second_source_asserts_nothing_new_and_keeps_the_level(bench: Bench, pair: Fds) -> None:
    irqfd, resamplefd = pair
    bench.pirq.set_irq(True)
    bench.pirq.set_irq(True)
    assert written(irqfd) == 1
    bench.pirq.set_irq(False)
    os.eventfd_write(resamplefd, 1)
    bench.loop.step()
    assert written(irqfd) == 1
    bench.pirq.set_irq(False)
    os.eventfd_write(resamplefd, 1)
    bench.loop.step()
    assert written(irqfd) == 0


def test_lowering_a_line_that_is_low_does_nothing(bench: Bench, pair: Fds) -> None:
    irqfd, _ = pair
    bench.pirq.set_irq(False)
    bench.pirq.set_irq(False)
    bench.pirq.set_irq(True)
    assert written(irqfd) == 1


@pytest.mark.parametrize("count", [1, 4, FULL])
def test_resample_while_high_asserts_once_whatever_its_count(bench: Bench, pair: Fds, count: int) -> None:
    irqfd, resamplefd = pair
    bench.pirq.set_irq(True)
    written(irqfd)
    os.eventfd_write(resamplefd, count)
    for _ in range(3):
        bench.loop.step()
    assert written(irqfd) == 1
    assert written(resamplefd) == 0
    assert bench.pirq.resamples == 1


def test_resample_while_low_is_read_and_asserts_nothing(bench: Bench, pair: Fds) -> None:
    """It comes from another function on the GSI, or from an EOI for a line that nobody asserted."""
    irqfd, resamplefd = pair
    for _ in range(4):
        os.eventfd_write(resamplefd, 1)
        bench.loop.step()
    assert written(resamplefd) == 0
    assert written(irqfd) == 0


def test_resample_that_somebody_else_has_read_asserts_nothing(bench: Bench, pair: Fds) -> None:
    irqfd, _ = pair
    bench.pirq.set_irq(True)
    written(irqfd)
    bench.pirq._on_resample(0)
    assert written(irqfd) == 0
    assert bench.pirq.resamples == 0


def test_new_irqfd_is_written_at_once_while_the_level_is_high(bench: Bench, pair: Fds) -> None:
    bench.pirq.set_irq(True)
    irqfd, resamplefd = bench.assign()
    assert written(irqfd) == 1
    assert written(pair[0]) == 1
    os.eventfd_write(pair[1], 1)
    assert bench.is_at_rest
    os.eventfd_write(resamplefd, 1)
    bench.loop.step()
    assert written(irqfd) == 1
    assert written(pair[0]) == 0
    os.close(irqfd)
    os.close(resamplefd)


def test_level_that_rose_before_any_irqfd_reaches_the_first_one(bench: Bench) -> None:
    bench.pirq.set_irq(True)
    irqfd, resamplefd = bench.assign()
    assert written(irqfd) == 1
    os.close(irqfd)
    os.close(resamplefd)


def test_new_irqfd_is_left_alone_while_the_level_is_low(bench: Bench, pair: Fds) -> None:
    bench.pirq.set_irq(True)
    bench.pirq.set_irq(False)
    irqfd, resamplefd = bench.assign()
    bench.loop.step()
    assert written(irqfd) == 0
    os.close(irqfd)
    os.close(resamplefd)


def test_dropped_eventfds_are_closed_at_once_and_the_level_stays(bench: Bench, pair: Fds) -> None:
    before = count_fds()
    bench.pirq.set_irq(True)
    written(pair[0])
    bench.pirq.drop_irqfd()
    bench.pirq.drop_irqfd()
    assert count_fds() == before - 2
    assert not bench.pirq.has_irqfd
    os.eventfd_write(pair[1], 1)
    assert bench.is_at_rest
    irqfd, resamplefd = bench.assign()
    assert written(irqfd) == 1
    os.close(irqfd)
    os.close(resamplefd)


def test_replaced_eventfds_are_closed(bench: Bench, pair: Fds) -> None:
    before = count_fds()
    for _ in range(20):
        for fd in bench.assign():
            os.close(fd)
    assert count_fds() == before


def test_finalize_closes_every_eventfd(bench: Bench) -> None:
    before = count_fds()
    for pirq in range(PCI_DEVFN_MAX):
        for fd in bench.assign(pirq):
            os.close(fd)
    assert count_fds() == before + 2 * PCI_DEVFN_MAX
    bench.hub.finalize()
    assert count_fds() == before


def test_pirqs_know_nothing_of_each_other(bench: Bench) -> None:
    pairs = [bench.assign(pirq) for pirq in range(PCI_DEVFN_MAX)]
    assert len(pairs) == 256
    bench.hub.pirqs[7].set_irq(True)
    assert [pirq for pirq, (irqfd, _) in enumerate(pairs) if written(irqfd)] == [7]
    for _, resamplefd in pairs:
        os.eventfd_write(resamplefd, 1)
    bench.loop.step()
    assert [pirq for pirq, (irqfd, _) in enumerate(pairs) if written(irqfd)] == [7]
    for pair in pairs:
        for fd in pair:
            os.close(fd)


@pytest.mark.parametrize("devfn", [0, 1, 40, 255])
def test_pirq_of_all_four_pins_is_the_devfn(bench: Bench, devfn: int) -> None:
    assert {bench.hub.map_irq(devfn, pin) for pin in range(4)} == {devfn}


def test_peer_that_fills_the_counter_loses_nothing_and_holds_nobody(bench: Bench, pair: Fds) -> None:
    irqfd, _ = pair
    os.set_blocking(irqfd, True)
    os.eventfd_write(irqfd, FULL)
    assert returns_soon(lambda: bench.pirq.set_irq(True))
    os.set_blocking(irqfd, False)
    assert written(irqfd) > 0
    bench.pirq.set_irq(False)
    bench.pirq.set_irq(True)
    assert written(irqfd) == 1


def test_eoi_from_before_a_rise_is_consumed_by_it(bench: Bench, pair: Fds) -> None:
    """The second assertion could arrive after the guest has served the first."""
    irqfd, resamplefd = pair
    os.eventfd_write(resamplefd, 1)
    bench.pirq.set_irq(True)
    bench.loop.step()
    assert written(irqfd) == 1
    assert (bench.pirq.resamples, bench.pirq.reasserts) == (1, 0)


def test_kick_that_comes_with_a_new_irqfd_is_consumed_by_it(bench: Bench, pair: Fds) -> None:
    bench.pirq.set_irq(True)
    notifiers = EventNotifier.create(), EventNotifier.create()
    irqfd = os.dup(notifiers[0].fd)
    notifiers[1].set()
    bench.pirq.set_irqfd(*notifiers)
    bench.loop.step()
    assert written(irqfd) == 1
    assert (bench.pirq.resamples, bench.pirq.reasserts) == (1, 1)
    os.close(irqfd)


def test_eventfds_are_in_use_by_one_pirq_until_they_are_dropped_or_replaced(bench: Bench) -> None:
    one, two = bench.hub.pirqs[1], bench.hub.pirqs[2]
    fds = os.eventfd(0), os.eventfd(0)
    identities = []
    for _ in range(2):  # the same device may bring its own again
        pair = adopt_pair(os.dup(fds[0]), os.dup(fds[1]), one.is_foreign)
        one.set_irqfd(*pair)
        identities = [str(notifier.identity) for notifier in pair]
    assert [two.is_foreign(identity) for identity in identities] == [True, True]
    for fd in bench.assign(1):
        os.close(fd)
    assert [two.is_foreign(identity) for identity in identities] == [False, False]
    one.set_irqfd(*adopt_pair(fds[0], fds[1], one.is_foreign))
    assert [two.is_foreign(identity) for identity in identities] == [True, True]
    one.drop_irqfd()
    assert [two.is_foreign(identity) for identity in identities] == [False, False]


def test_counters(bench: Bench, pair: Fds) -> None:
    _, resamplefd = pair
    pirq = bench.pirq
    for _ in range(3):
        bench.pirq.set_irq(True)
        os.eventfd_write(resamplefd, 1)
        bench.loop.step()
        bench.pirq.set_irq(False)
        os.eventfd_write(resamplefd, 1)
        bench.loop.step()
    assert (pirq.raised, pirq.resamples, pirq.reasserts, pirq.level) == (3, 6, 3, 0)


class Noting(EventNotifier):
    """An eventfd that notes, at each access, whether the pirq owes an assertion."""

    pirq: Pirq
    seen: list[tuple[str, int]]

    def set(self) -> None:
        self.seen.append(("set", self.pirq.owes_assert[0]))
        super().set()

    def test_and_clear(self) -> bool:
        self.seen.append(("test_and_clear", self.pirq.owes_assert[0]))
        return super().test_and_clear()


def test_an_assertion_is_owed_from_before_the_eoi_is_read_until_it_is_made(bench: Bench) -> None:
    """Wherever between the process is killed, the next one asserts the line."""
    pair = Noting.create(), Noting.create()
    seen: list[tuple[str, int]] = []
    for notifier in pair:
        notifier.pirq, notifier.seen = bench.pirq, seen
    bench.pirq.set_irq(True)
    bench.pirq.set_irqfd(*pair)
    seen.clear()
    os.eventfd_write(pair[1].fd, 1)
    bench.loop.step()
    assert seen == [("test_and_clear", 1), ("set", 1)]
    assert bench.pirq.owes_assert[0] == 0
