# SPDX-License-Identifier: GPL-2.0-or-later
"""Which kind of event a line of remoted tells of, for each thing that a client or a device's code can do."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import ClassVar

import pytest

from common.messages import Event
from common.mpqemu import HEADER, SYSMEM, Command
from remoted.device import Bar, BarKind, PciFunction
from tests.support.remotebench import MEM_BASE, RemoteBench


class Faulty(PciFunction):
    """Its code fails when its BAR is read."""

    VENDOR_ID, DEVICE_ID, CLASS_CODE = 0x1234, 1, 0xFF0000
    BARS: ClassVar = {1: Bar(BarKind.MEM32, 4096)}

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        raise ValueError("broken")

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        pass


@pytest.fixture
def add_device(bench: RemoteBench) -> RemoteBench:
    bench.add(Faulty, "faulty", 0x38)
    return bench


def connect(bench: RemoteBench) -> None:
    bench.connect("faulty").close()
    bench.settle()


def connect_twice(bench: RemoteBench) -> None:
    with bench.connect("faulty"), socket.socket(socket.AF_UNIX) as second:
        second.connect(bench.path("faulty"))
        bench.settle()


def send_garbage(bench: RemoteBench) -> None:
    with bench.connect("faulty") as peer:
        peer.send_bytes(HEADER.pack(999, 0))
        bench.settle()


def send_one_irqfd(bench: RemoteBench) -> None:
    with bench.connect("faulty") as peer:
        fd = os.eventfd(0)
        peer.send(Command.SET_IRQFD, fds=[fd])
        bench.settle()
        os.close(fd)


def send_one_irqfd_twice(bench: RemoteBench) -> None:
    with bench.connect("faulty") as peer:
        fd = os.eventfd(0)
        peer.send(Command.SET_IRQFD, fds=[fd, fd])
        bench.settle()
        os.close(fd)


def send_unfit_ram(bench: RemoteBench) -> None:
    with bench.connect("faulty") as peer:
        fd = os.eventfd(0)
        peer.send(Command.SYNC_SYSMEM, SYSMEM.pack(*([0] * 8), *([1 << 20] + [0] * 7), *([0] * 8)), [fd])
        bench.settle()
        os.close(fd)


def reset(bench: RemoteBench) -> None:
    with bench.connect("faulty") as peer:
        peer.call(Command.DEVICE_RESET)


def read_register(bench: RemoteBench) -> None:
    with bench.connect("faulty") as peer:
        peer.enable()
        peer.bar_read(True, MEM_BASE, 4)


@pytest.mark.parametrize(
    ("act", "event"),
    [
        (connect, Event.CLIENT_CONNECTED),
        (connect, Event.CLIENT_GONE),
        (connect_twice, Event.CLIENT_BUSY),
        (send_garbage, Event.CLIENT_BROKE_PROTOCOL),
        (send_one_irqfd, Event.IRQFD_REFUSED),
        (send_one_irqfd_twice, Event.IRQFD_REFUSED),
        (send_unfit_ram, Event.RAM_REFUSED),
        (reset, Event.DEVICE_RESET),
        (read_register, Event.DEVICE_FAILED),
    ],
    ids=lambda value: value.name if isinstance(value, Event) else value.__name__,
)
def test_event(add_device: RemoteBench, act: Callable[[RemoteBench], None], event: Event) -> None:
    usual = {Event.CLIENT_CONNECTED, Event.CLIENT_GONE}
    act(add_device)
    told = [record.event for record in add_device.log.records if hasattr(record, "event")]
    assert told.count(event) == 1
    assert set(told) <= {*usual, event}
