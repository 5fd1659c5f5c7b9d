# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM's events as the kernel sends them, and what else may come along on that socket."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Iterator

import pytest
from pyroute2.netlink import NETLINK_KOBJECT_UEVENT

from proxyd.kvm.kvm import Kvm
from proxyd.vm.qmp.uevents import KvmEvent, KvmEvents, parse
from tests.support.fds import count_fds

CREATE = (
    b"change@/devices/virtual/misc/kvm\0ACTION=change\0DEVPATH=/devices/virtual/misc/kvm\0SUBSYSTEM=misc\0"
    b"CREATED=7\0COUNT=1\0EVENT=create\0PID=4242\0STATS_PATH=/kvm/4242-9\0MAJOR=10\0MINOR=232\0DEVNAME=kvm\0"
    b"SEQNUM=826\0"
)


@pytest.fixture
def events() -> Iterator[KvmEvents]:
    before = count_fds(), threading.active_count()
    with KvmEvents() as events:
        yield events
    assert (count_fds(), threading.active_count()) == before


def own(events: KvmEvents, kind: str) -> KvmEvent:
    """The next event about this process, which must be of this kind."""
    while select.select([events], [], [], 20)[0]:
        for event in events.read():
            if event.pid == os.getpid():
                assert event.kind == kind
                return event
    raise AssertionError(f"no {kind} event")


@pytest.mark.usefixtures("requires_kvm")
def test_a_vm_comes_and_goes(events: KvmEvents) -> None:
    with Kvm() as kvm:
        for _ in range(3):
            with kvm.create_vm():
                own(events, "create")
            own(events, "destroy")


def test_read_does_not_block(events: KvmEvents) -> None:
    for _ in range(1000):
        if not select.select([events], [], [], 0)[0]:
            break
        events.read()
    assert events.read() == []


def test_only_the_kernel_is_believed(events: KvmEvents) -> None:
    """The same message, from a process that may send to the group, is none."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT) as liar:
        try:
            liar.sendto(CREATE, (0, 1))
        except PermissionError:
            pytest.skip("needs CAP_NET_ADMIN to forge an event")
    heard = []
    while select.select([events], [], [], 0)[0]:
        heard += events.read()
    assert KvmEvent("create", 4242) not in heard
    assert parse(CREATE) == KvmEvent("create", 4242)


def test_a_flood_is_survived_and_told(events: KvmEvents) -> None:
    """Once the socket's buffer is full messages are lost; the reader hears of it, and of what comes later."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT) as flood:
        try:
            for _ in range(5000):
                flood.sendto(CREATE, (0, 1))
        except PermissionError:
            pytest.skip("needs CAP_NET_ADMIN to fill the buffer")
    heard = []
    while select.select([events], [], [], 0)[0]:
        heard += events.read()
    assert KvmEvent("lost", 0) in heard


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0",
        b"\xff@\0EVENT=create\0",
        CREATE.replace(b"SUBSYSTEM=misc", b"SUBSYSTEM=block"),
        CREATE.replace(b"DEVPATH=/devices/virtual/misc/kvm", b"DEVPATH=/devices/virtual/misc/tun"),
        CREATE.replace(b"EVENT=create", b"EVENT=explode"),
        CREATE.replace(b"EVENT=create\0", b""),
        CREATE.replace(b"PID=4242\0", b""),
        CREATE.replace(b"PID=4242", b"PID=-1"),
        CREATE.replace(b"PID=4242", b"PID="),
        CREATE.replace(b"PID=4242", b"PID=1234567890"),
        CREATE.replace(b"PID=4242", b"PID=12345678901234567890"),
        CREATE.replace(b"PID=4242", "PID=\u0664\u0662".encode()),
        CREATE.replace(b"PID=4242", b"PID=\xff"),
        CREATE.replace(b"COUNT=1\0", b"header=1\0no equals sign\0"),
        CREATE.replace(b"CREATED=7\0", b"attrs=1\0").replace(b"SUBSYSTEM=misc\0", b""),
        b"libudev\0" + CREATE,
        b"libudev\0",
    ],
)
def test_other_messages_are_not_events(message: bytes) -> None:
    assert parse(message) is None


def test_an_event_that_cannot_be_taken_apart_counts_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyroute2 is being replaced when it is loaded."""
    monkeypatch.setitem(sys.modules, "pyroute2.netlink.uevent", None)
    assert parse(CREATE) == KvmEvent("lost", 0)
