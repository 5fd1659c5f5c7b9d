# SPDX-License-Identifier: GPL-2.0-or-later
"""INTx on vfio-user: when the trigger is signalled, and when not, with a client on a real socket."""

from __future__ import annotations

import errno
import os

import pytest

from common.config import Transport
from tests.support.remotebench import LineDevice, RemoteBench
from tests.support.vfiouserbench import DISABLE, MASK, TRIGGER, UNMASK, UNMASK_BY, VfioUserPeer, signals

LINE = 0
"""the BAR whose first byte drives the line"""


def drive(peer: VfioUserPeer, level: bool) -> None:
    assert peer.write(LINE, 0, bytes((level,))).error == 0


def eoi(peer: VfioUserPeer, unmask: int) -> None:
    """What KVM does at an EOI."""
    os.eventfd_write(unmask, 1)
    peer.bench.settle()


@pytest.fixture
def kvm(peer: VfioUserPeer, eventfds: list[int]) -> tuple[int, int]:
    """Trigger and unmask eventfd, set up as QEMU with KVM does."""
    trigger, unmask, *_ = eventfds
    assert peer.set_irqs(TRIGGER, fds=[trigger]) == 0
    assert peer.set_irqs(MASK) == 0
    assert peer.set_irqs(UNMASK_BY, fds=[unmask]) == 0
    assert peer.set_irqs(UNMASK) == 0
    return trigger, unmask


def test_a_level_is_signalled_once_until_the_eoi_and_again_while_it_is_high(
    peer: VfioUserPeer, kvm: tuple[int, int]
) -> None:
    trigger, unmask = kvm
    drive(peer, True)
    assert signals(trigger) == 1
    drive(peer, False)
    drive(peer, True)
    assert signals(trigger) == 0, "the guest has not yet served the first one"
    for _ in range(3):
        eoi(peer, unmask)
        assert signals(trigger) == 1
    drive(peer, False)
    eoi(peer, unmask)
    assert signals(trigger) == 0
    drive(peer, True)
    assert signals(trigger) == 1
    line = peer.bench.servers["dev"].line
    assert (line.raised, line.resamples, line.reasserts) == (3, 4, 3)


def test_a_line_with_two_sources_falls_with_the_last(peer: VfioUserPeer, kvm: tuple[int, int]) -> None:
    trigger, unmask = kvm
    line = peer.bench.servers["dev"].line
    line.set_irq(True)
    line.set_irq(True)
    assert (signals(trigger), line.raised) == (1, 1)
    line.set_irq(False)
    eoi(peer, unmask)
    assert signals(trigger) == 1
    line.set_irq(False)
    eoi(peer, unmask)
    assert signals(trigger) == 0


def test_without_kvm_a_message_unmasks(peer: VfioUserPeer, eventfds: list[int]) -> None:
    trigger = eventfds[0]
    assert peer.set_irqs(TRIGGER, fds=[trigger]) == 0
    drive(peer, True)
    assert signals(trigger) == 1
    assert peer.set_irqs(UNMASK) == 0
    assert signals(trigger) == 1
    drive(peer, False)
    assert peer.set_irqs(UNMASK) == 0
    assert signals(trigger) == 0


def test_a_masked_line_is_signalled_when_it_is_unmasked(peer: VfioUserPeer, kvm: tuple[int, int]) -> None:
    trigger, _ = kvm
    assert peer.set_irqs(MASK) == 0
    drive(peer, True)
    assert signals(trigger) == 0
    assert peer.set_irqs(UNMASK) == 0
    assert signals(trigger) == 1


def test_a_line_that_is_disabled_is_not_masked_afterwards(
    peer: VfioUserPeer, kvm: tuple[int, int], eventfds: list[int]
) -> None:
    assert peer.set_irqs(MASK) == 0
    assert peer.set_irqs(DISABLE, count=0) == 0
    assert peer.set_irqs(TRIGGER, fds=[eventfds[2]]) == 0
    drive(peer, True)
    assert signals(eventfds[2]) == 1


def test_nothing_is_disabled_by_masking_no_interrupts(peer: VfioUserPeer, kvm: tuple[int, int]) -> None:
    for flags in (MASK, UNMASK):
        assert peer.set_irqs(flags, count=0) == 0
    drive(peer, True)
    assert signals(kvm[0]) == 1


def test_a_function_without_a_pin_has_no_line(bench: RemoteBench, eventfds: list[int]) -> None:
    class Pinless(LineDevice):
        INTERRUPT_PIN = 0

    bench.add(Pinless, "pinless", 0x38, Transport.VFIO_USER)
    with VfioUserPeer(bench, "pinless") as peer:
        assert peer.set_irqs(TRIGGER, fds=eventfds[:1]) == errno.EINVAL
        assert peer.set_irqs(DISABLE, count=0) == 0, "as QEMU does whatever the pin"


def test_an_acknowledge_behind_the_eoi_in_the_socket_counts(peer: VfioUserPeer, kvm: tuple[int, int]) -> None:
    trigger, unmask = kvm
    drive(peer, True)
    assert signals(trigger) == 1
    os.eventfd_write(unmask, 1)
    for offset in range(4, 8):
        peer.post(LINE, offset, b"\1")
    peer.post(LINE, 0, b"\0")
    peer.bench.settle()
    assert signals(trigger) == 0
    drive(peer, True)
    assert signals(trigger) == 1


def test_an_eoi_of_another_function_does_not_assert_the_line_twice(
    peer: VfioUserPeer, kvm: tuple[int, int]
) -> None:
    """It shares the GSI, and its EOI comes before the rise; both are noticed in one pass of the loop."""
    trigger, unmask = kvm
    os.eventfd_write(unmask, 1)
    peer.bench.servers["dev"].function.drive_intx(True)
    peer.bench.settle()
    assert signals(trigger) == 1


@pytest.mark.parametrize("detach", [DISABLE, TRIGGER])
def test_a_level_without_a_trigger_stays_pending(
    peer: VfioUserPeer, kvm: tuple[int, int], eventfds: list[int], detach: int
) -> None:
    trigger, again = kvm[0], eventfds[2]
    assert peer.set_irqs(detach, count=0 if detach == DISABLE else 1) == 0
    drive(peer, True)
    assert signals(trigger) == 0
    assert peer.set_irqs(TRIGGER, fds=[again]) == 0
    assert signals(again) == 1


def test_a_level_outlives_the_client(bench: RemoteBench, eventfds: list[int]) -> None:
    for number in range(2):
        with VfioUserPeer(bench, "dev") as peer:
            assert peer.set_irqs(TRIGGER, fds=[eventfds[number]]) == 0
            assert signals(eventfds[number]) == number, "the second client finds the line high"
            drive(peer, True)
    assert bench.servers["dev"].line.level


def test_a_new_trigger_gets_what_the_old_one_has_not_delivered(
    peer: VfioUserPeer, kvm: tuple[int, int], eventfds: list[int]
) -> None:
    drive(peer, True)
    assert peer.set_irqs(TRIGGER, fds=[eventfds[2]]) == 0
    assert signals(eventfds[2]) == 1


def test_an_eoi_on_an_unmask_eventfd_that_is_being_replaced_counts(
    peer: VfioUserPeer, kvm: tuple[int, int], eventfds: list[int]
) -> None:
    trigger, unmask = kvm
    drive(peer, True)
    assert signals(trigger) == 1
    os.eventfd_write(unmask, 1)
    assert peer.set_irqs(UNMASK_BY, fds=[eventfds[2]]) == 0, "it is handled before the EOI"
    assert signals(trigger) == 1
    drive(peer, False)
    eoi(peer, unmask)
    drive(peer, True)
    assert signals(trigger) == 0
    eoi(peer, eventfds[2])
    assert signals(trigger) == 1


def test_reset_lowers_the_line_and_keeps_the_eventfds(peer: VfioUserPeer, kvm: tuple[int, int]) -> None:
    trigger, _ = kvm
    drive(peer, True)
    assert signals(trigger) == 1
    for _ in range(2):
        assert peer.call(13).error == 0
    drive(peer, True)
    assert signals(trigger) == 1


@pytest.mark.parametrize("swapped", [False, True])
def test_one_eventfd_can_not_both_assert_and_unmask(
    peer: VfioUserPeer, eventfds: list[int], swapped: bool
) -> None:
    first, second = (UNMASK_BY, TRIGGER) if swapped else (TRIGGER, UNMASK_BY)
    assert peer.set_irqs(first, fds=[eventfds[0]]) == 0
    assert peer.set_irqs(second, fds=[eventfds[0]]) == errno.EINVAL
    assert peer.bench.servers["dev"].rejected == 1


def test_an_eventfd_of_another_device_is_refused(
    bench: RemoteBench, peer: VfioUserPeer, kvm: tuple[int, int]
) -> None:
    with VfioUserPeer(bench, "vectors") as other:
        for fd in kvm:
            assert other.set_irqs(TRIGGER, fds=[fd]) == errno.EINVAL
        assert peer.set_irqs(DISABLE, count=0) == 0
        assert other.set_irqs(TRIGGER, fds=[kvm[0]]) == 0


def test_a_full_trigger_that_blocks_holds_up_nobody(peer: VfioUserPeer, kvm: tuple[int, int]) -> None:
    trigger, unmask = kvm
    for fd in kvm:
        os.set_blocking(fd, True)
    os.eventfd_write(trigger, (1 << 64) - 2)
    drive(peer, True)
    eoi(peer, unmask)
    assert signals(trigger) == (1 << 64) - 1


def test_the_client_can_test_its_trigger(peer: VfioUserPeer, kvm: tuple[int, int]) -> None:
    trigger, _ = kvm
    assert peer.set_irqs(DISABLE) == 0
    assert signals(trigger) == 1
