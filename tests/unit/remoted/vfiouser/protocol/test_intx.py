# SPDX-License-Identifier: GPL-2.0-or-later
"""INTx over vfio-user: the level is signalled once, and again after each unmask, by message or by eventfd."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from random import Random

import pytest

from common import pci
from tests.support import vfiouserclient as vfu
from tests.support import vfiouserdevice as device
from tests.support.lives import check_lives
from tests.support.vfiouserclient import CONFIG_REGION, INTX, Refused, VfioUserClient
from tests.support.vfiouserprocess import Event, VfioUserServer, events, fds_of, settle

FULL = (1 << 64) - 2


@pytest.fixture
def trigger() -> Iterator[Event]:
    with Event() as event:
        yield event


@pytest.fixture
def unmask() -> Iterator[Event]:
    with Event() as event:
        yield event


@pytest.fixture
def wired(client: VfioUserClient, trigger: Event, unmask: Event) -> VfioUserClient:
    """A client that has wired INTx as QEMU does with KVM."""
    wire(client, trigger, unmask)
    return client


def wire(client: VfioUserClient, trigger: Event, unmask: Event) -> None:
    client.attach(INTX, 0, [trigger.fd])
    client.mask(INTX)
    client.attach_unmask(unmask.fd)
    client.unmask(INTX)


def drive(client: VfioUserClient, level: bool, posted: bool = False) -> None:
    client.write(0, device.RAISE if level else device.LOWER, 0, posted=posted)


def test_rise_is_signalled_once(wired: VfioUserClient, trigger: Event) -> None:
    assert trigger.take() == 0
    for _ in range(3):
        drive(wired, True)
    assert trigger.take() == 1


def test_it_masks_itself_until_it_is_unmasked(wired: VfioUserClient, trigger: Event) -> None:
    drive(wired, True)
    drive(wired, False)
    drive(wired, True)
    assert trigger.take() == 1
    wired.unmask(INTX)
    assert trigger.take() == 1


@pytest.mark.parametrize("by_message", [False, True])
def test_level_that_is_still_high_is_signalled_again(
    wired: VfioUserClient, trigger: Event, unmask: Event, by_message: bool
) -> None:
    drive(wired, True)
    assert trigger.take() == 1
    for _ in range(5):
        if by_message:
            wired.unmask(INTX)
        else:
            unmask.set()
        assert trigger.wait() == 1
    drive(wired, False)
    wired.unmask(INTX)
    unmask.set()
    settle(wired, unmask)
    assert trigger.take() == 0


def test_eventfd_that_was_signalled_often_is_one_eoi(
    wired: VfioUserClient, trigger: Event, unmask: Event
) -> None:
    drive(wired, True)
    trigger.take()
    unmask.set(7)
    assert trigger.wait() == 1
    settle(wired, unmask)
    assert trigger.take() == 0


def test_level_from_before_the_eventfd_is_signalled_when_it_comes(
    client: VfioUserClient, trigger: Event
) -> None:
    drive(client, True)
    client.attach(INTX, 0, [trigger.fd])
    assert trigger.take() == 1


@pytest.mark.parametrize("disable", [False, True])
def test_level_is_kept_while_no_eventfd_is_attached(
    wired: VfioUserClient, trigger: Event, unmask: Event, disable: bool
) -> None:
    if disable:
        wired.disable(INTX)
    else:
        wired.detach(INTX)
    drive(wired, True)
    assert trigger.take() == 0
    wire(wired, trigger, unmask)
    assert trigger.take() >= 1  # at the attach, and perhaps again at the unmask
    drive(wired, False)
    unmask.set()
    settle(wired, unmask)
    assert trigger.take() == 0


def test_mask_holds_the_level_back(wired: VfioUserClient, trigger: Event) -> None:
    wired.mask(INTX)
    drive(wired, True)
    assert trigger.take() == 0
    wired.unmask(INTX)
    assert trigger.take() == 1


def test_what_rose_and_fell_while_masked_is_not_signalled(wired: VfioUserClient, trigger: Event) -> None:
    wired.mask(INTX)
    drive(wired, True)
    drive(wired, False)
    wired.unmask(INTX)
    assert trigger.take() == 0


def test_unmask_without_a_level_is_no_interrupt(wired: VfioUserClient, trigger: Event, unmask: Event) -> None:
    for _ in range(3):
        wired.unmask(INTX)
        unmask.set()
        settle(wired, unmask)
    assert trigger.take() == 0
    drive(wired, True)
    assert trigger.take() == 1


def test_reroute_of_an_asserted_line(wired: VfioUserClient, trigger: Event, unmask: Event) -> None:
    """QEMU goes over to its own handling with the same trigger, and back to KVM with another unmask eventfd."""
    drive(wired, True)
    assert trigger.take() == 1
    wired.mask(INTX)
    wired.unmask(INTX)
    assert trigger.take() == 1
    wired.mask(INTX)
    with Event() as new:
        wired.attach_unmask(new.fd)
        wired.unmask(INTX)
        assert trigger.take() == 1
        unmask.set()  # it was replaced
        settle(wired)
        assert trigger.take() == 0
        new.set()
        assert trigger.wait() == 1


def test_assertion_that_is_pending_in_a_line_that_is_rewired_comes_once(
    wired: VfioUserClient, trigger: Event, unmask: Event
) -> None:
    """KVM finds it in the trigger when its irqfd is assigned, and leaves the eventfd's count as it is."""
    wired.mask(INTX)
    drive(wired, True)
    wired.unmask(INTX)
    wired.mask(INTX)
    with Event() as new:
        wired.attach_unmask(new.fd)
        wired.unmask(INTX)
        wired.unmask(INTX)
        assert trigger.take() == 1
        new.set()
        assert trigger.wait() == 1


def test_count_that_nobody_reads_hides_no_interrupt(wired: VfioUserClient, trigger: Event) -> None:
    """From the first EOI on, what is still in the trigger has been served: here by an interrupt for nothing."""
    drive(wired, True)
    with Event() as new:
        wired.attach_unmask(new.fd)
        wired.unmask(INTX)
        drive(wired, False)
        new.set()
        settle(wired, new)
        wired.mask(INTX)
        drive(wired, True)
        wired.unmask(INTX)
        assert trigger.take() == 2


def test_reset_of_the_machine_while_asserted(wired: VfioUserClient, trigger: Event, unmask: Event) -> None:
    drive(wired, True)
    assert trigger.take() == 1
    wired.mask(INTX)
    wired.unmask(INTX)
    trigger.take()
    wired.disable(INTX)
    command = wired.read(CONFIG_REGION, pci.PCI_COMMAND, 2)
    wired.write(CONFIG_REGION, pci.PCI_COMMAND, command & ~0x407, 2)
    wired.reset()
    wired.reset()
    with Event() as new_trigger, Event() as new_unmask:
        wire(wired, new_trigger, new_unmask)
        for event in (unmask, new_unmask):
            event.set()
        settle(wired, new_unmask)
        assert (trigger.take(), new_trigger.take()) == (0, 0)
        drive(wired, True)
        assert (trigger.take(), new_trigger.take()) == (0, 1)


def test_reset_alone_lowers_the_line(wired: VfioUserClient, trigger: Event, unmask: Event) -> None:
    drive(wired, True)
    assert trigger.take() == 1
    wired.reset()
    unmask.set()
    wired.unmask(INTX)
    settle(wired, unmask)
    assert trigger.take() == 0


def test_intx_disable_holds_the_level_back(wired: VfioUserClient, trigger: Event, unmask: Event) -> None:
    """As does PCI 3.0, 6.2.2; the status bit shows the level all the same (6.2.3)."""
    wired.write(CONFIG_REGION, pci.PCI_COMMAND, pci.PCI_COMMAND_INTX_DISABLE, 2)
    drive(wired, True)
    unmask.set()
    wired.unmask(INTX)
    settle(wired, unmask)
    assert trigger.take() == 0
    assert wired.read(CONFIG_REGION, pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT
    wired.write(CONFIG_REGION, pci.PCI_COMMAND, 0, 2)
    assert trigger.take() == 1
    drive(wired, False)
    assert not wired.read(CONFIG_REGION, pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT


@pytest.mark.parametrize("writes", [1, 2, 5, 40])
def test_acknowledgement_that_is_posted_before_an_eoi_counts(
    wired: VfioUserClient, trigger: Event, unmask: Event, writes: int
) -> None:
    """Both reach the server at once: the stream goes first, however many writes are before the acknowledgement."""
    other = vfu.ACCESS.pack(device.SCRATCH, 0, 4) + bytes(4)
    acknowledge = vfu.ACCESS.pack(device.LOWER, 0, 4) + bytes(4)
    burst = [vfu.frame(vfu.REGION_WRITE, other, flags=vfu.NO_REPLY)] * (writes - 1)
    burst.append(vfu.frame(vfu.REGION_WRITE, acknowledge, flags=vfu.NO_REPLY))
    data = b"".join(burst)
    for _ in range(50):
        drive(wired, True)
        assert trigger.take() == 1
        wired.send_frame(data)
        unmask.set()
        settle(wired, unmask)
        assert trigger.take() == 0


def test_2000_raises_are_2000_services(wired: VfioUserClient, trigger: Event, unmask: Event) -> None:
    """The client is guest and KVM: each acknowledgement is posted, each EOI an eventfd, none is spurious."""
    for _ in range(2000):
        drive(wired, True, posted=True)
        assert trigger.wait() == 1
        drive(wired, False, posted=True)
        unmask.set()
    settle(wired, unmask)
    assert trigger.take() == 0


def test_line_of_the_next_client(server: VfioUserServer) -> None:
    """The level outlives a client, its eventfds don't."""
    with Event() as trigger, Event() as unmask:
        with server.negotiated("probe") as client:
            wire(client, trigger, unmask)
            drive(client, True)
            assert trigger.take() == 1
        with server.connect("probe") as client, Event() as new_trigger, Event() as new_unmask:
            client.version()
            unmask.set()
            settle(client)
            assert trigger.take() == 0
            wire(client, new_trigger, new_unmask)
            assert new_trigger.take() >= 1
            drive(client, False)


# Eventfds that are none, or not the client's to give


def semaphore() -> int:
    return os.eventfd(0, os.EFD_SEMAPHORE)


OTHER_FDS: dict[str, Callable[[], int]] = {
    "a semaphore": semaphore,
    "a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "/dev/null": lambda: os.open(os.devnull, os.O_RDWR),
    "a socket": lambda: socket.socket(socket.AF_UNIX).detach(),
    "memory": lambda: os.memfd_create("ram"),
    "a path only": lambda: os.open("/etc/passwd", os.O_PATH),
}


@pytest.mark.parametrize("action", [vfu.TRIGGER, vfu.UNMASK])
@pytest.mark.parametrize("make", OTHER_FDS.values(), ids=OTHER_FDS)
def test_what_is_no_eventfd_is_refused(
    wired: VfioUserClient, trigger: Event, make: Callable[[], int], action: int
) -> None:
    fd = make()
    try:
        with pytest.raises(Refused) as refused:
            wired.set_irqs(vfu.DATA_EVENTFD | action, INTX, fds=[fd])
    finally:
        os.close(fd)
    assert refused.value.errno in (errno.EINVAL, errno.EBADF)
    drive(wired, True)
    assert trigger.take() == 1


def test_trigger_and_unmask_must_differ(wired: VfioUserClient, trigger: Event, unmask: Event) -> None:
    """What the server signals would be an EOI: the line would be signalled for ever."""
    with pytest.raises(Refused):
        wired.attach_unmask(trigger.fd)
    with pytest.raises(Refused):
        wired.attach(INTX, 0, [unmask.fd])
    drive(wired, True)
    assert trigger.take() == 1


def test_eventfd_of_another_device_is_refused(
    server: VfioUserServer, wired: VfioUserClient, trigger: Event, unmask: Event
) -> None:
    with server.negotiated("other") as other:
        with pytest.raises(Refused):
            other.attach(INTX, 0, [unmask.fd])
        with pytest.raises(Refused):
            other.attach_unmask(trigger.fd)
        drive(wired, True)
        assert trigger.take() == 1


def test_full_and_blocking_eventfds_hold_nobody_up(
    wired: VfioUserClient, trigger: Event, unmask: Event
) -> None:
    for event in (trigger, unmask):
        os.eventfd_write(event.fd, FULL)
        fcntl.fcntl(event.fd, fcntl.F_SETFL, fcntl.fcntl(event.fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    drive(wired, True)
    wired.unmask(INTX)
    drive(wired, False)
    settle(wired)
    assert wired.read(CONFIG_REGION, 0) == device.IDENTITY


# Random lives beside a model of the specification


class Line:
    """What an INTx line does, as the specification has it."""

    def __init__(self) -> None:
        self.level = self.disabled = self.masked = self.served = self.is_attached = self.has_unmask = False
        self.due = 0

    def fire(self) -> None:
        if self.level and self.is_attached and not (self.disabled or self.masked or self.served):
            self.due += 1
            self.served = True

    def step(self, step: str) -> None:
        if step in ("raise", "lower"):
            self.level = step == "raise"
        elif step in ("disable", "enable"):
            self.disabled = step == "disable"
        elif step == "mask":
            self.masked = True
        elif step == "unmask" or (step == "eoi" and self.has_unmask):
            self.masked = self.served = False
        elif step == "attach":
            self.is_attached = True
            self.served = False
        elif step == "detach":
            self.is_attached = False
        elif step == "attach unmask":
            self.has_unmask = True
        elif step in ("irqs off", "reset"):
            self.is_attached = self.has_unmask = self.masked = self.served = False
        if step == "reset":
            self.level = self.disabled = False
        self.fire()


STEPS = (
    *("raise", "raise", "raise", "lower", "lower", "unmask", "unmask", "eoi", "eoi", "eoi", "mask"),
    *(
        "attach",
        "attach",
        "detach",
        "irqs off",
        "attach unmask",
        "attach unmask",
        "disable",
        "enable",
        "reset",
    ),
)


def act(client: VfioUserClient, step: str, trigger: Event, unmask: Event) -> None:
    acts: dict[str, Callable[[], None]] = {
        "raise": lambda: drive(client, True),
        "lower": lambda: drive(client, False, posted=True),
        "disable": lambda: client.write(CONFIG_REGION, pci.PCI_COMMAND, pci.PCI_COMMAND_INTX_DISABLE, 2),
        "enable": lambda: client.write(CONFIG_REGION, pci.PCI_COMMAND, 0, 2),
        "mask": lambda: client.mask(INTX),
        "unmask": lambda: client.unmask(INTX),
        "eoi": unmask.set,
        "attach": lambda: client.attach(INTX, 0, fds_of([trigger])),
        "detach": lambda: client.detach(INTX),
        "irqs off": lambda: client.disable(INTX),
        "attach unmask": lambda: client.attach_unmask(unmask.fd),
        "reset": lambda: reset(client),
    }
    acts[step]()


def reset(client: VfioUserClient) -> None:
    """As QEMU does."""
    client.disable(INTX)
    client.reset()


def test_lives(server: VfioUserServer) -> None:
    def live(steps: Sequence[str]) -> None:
        with server.negotiated("probe") as client, events(2) as (trigger, unmask):
            line = Line()
            for number, step in enumerate(steps):
                act(client, step, trigger, unmask)
                if not line.has_unmask:
                    unmask.take()  # nobody else reads it, and the server is to have it as new
                settle(client, unmask)
                line.step(step)
                assert trigger.take() == line.due, f"step {number}, {step}"
                line.due = 0

    check_lives(60, lambda random: random.choices(STEPS, k=60), live, str)


def test_posted_lives(server: VfioUserServer) -> None:
    """Without waiting in between: in whatever order it was handled, the level in the end is signalled."""

    def live(steps: Sequence[str]) -> None:
        with server.negotiated("probe") as client, events(2) as (trigger, unmask):
            wire(client, trigger, unmask)
            level = False
            for step in steps:
                if step == "eoi":
                    unmask.set()
                else:
                    level = step == "raise"
                    drive(client, level, posted=True)
            settle(client, unmask)
            trigger.take()
            unmask.set()
            settle(client, unmask)
            assert trigger.take() == level

    def draw(random: Random) -> Sequence[str]:
        return random.choices(("raise", "lower", "eoi"), k=40)

    check_lives(100, draw, live, str)
