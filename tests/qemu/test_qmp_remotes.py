# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices that aren't there, aren't fit for QEMU's proxy, or turn bad while QEMU creates it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.monitorclient import MonitorClient
from tests.support.qmpbench import EDU, QmpBench
from tests.support.wait import wait_until

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")

HASTY = "tests.support.hastyproxyd"

MakeBench = Callable[[str], QmpBench]


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[MakeBench]:
    """Makes the bench for one device, of a model of tests.support.oddfunctions."""
    benches: list[QmpBench] = []

    def make(model: str) -> QmpBench:
        benches.append(QmpBench(tmp_path, (f"tests.support.oddfunctions:{model}", "id=odd0", "addr=05.0")))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[QmpBench]:
    bench = QmpBench(tmp_path, EDU)
    yield bench
    bench.close()


def test_waits_for_remoted(bench: QmpBench) -> None:
    bench.start_guest()
    bench.start_proxyd()
    bench.wait_log("proxyd", f"edu0: warning: not plugged yet: {bench.directory}/edu0.sock: No such file")
    bench.start_remoted()
    bench.wait_linked(0)
    bench.run_guest()


def test_takes_back_a_link_that_an_unfinished_plugging_left_in_qemu(bench: QmpBench) -> None:
    bench.start_remoted()
    bench.start_guest()
    with MonitorClient(bench.monitor_path) as monitor, socket.socket(socket.AF_UNIX) as link:
        link.connect(str(bench.directory / "edu0.sock"))
        monitor.getfd("iohub-edu0", link.fileno())
    assert bench.status("remoted")["edu0"]["link"] == "connected"
    bench.start_proxyd()
    bench.run_guest()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("PinB", "interrupt pin 2: QEMU's x-pci-proxy-dev routes every function's as INTA"),
        ("TwoGigabytes", "BAR 0 has the mask 0x80000000: QEMU's x-pci-proxy-dev would abort"),
        ("HalfDecoded", "BAR 0 has the mask 0xffc1: QEMU's x-pci-proxy-dev would abort"),
    ],
)
def test_keeps_from_qemu_what_its_proxy_can_not_stand_for(
    make_bench: MakeBench, model: str, reason: str
) -> None:
    bench = make_bench(model)
    bench.start_remoted()
    monitor = bench.start_guest()
    bench.start_proxyd()
    bench.wait_log("proxyd", f"odd0: warning: not plugged yet: {reason}")
    assert monitor.plugged() == {}


def test_qemu_survives_a_remoted_that_dies_while_it_creates_the_proxy(make_bench: MakeBench) -> None:
    bench = make_bench("Dies")
    bench.start_remoted()
    monitor = bench.start_guest()
    bench.start_proxyd()
    bench.wait_log("proxyd", "has ended: QEMU's proxy can't take a new one")
    bench.eject(5)
    monitor.wait_event("DEVICE_DELETED", device="odd0")
    assert monitor.plugged() == {}


def test_qemu_goes_on_after_a_remoted_that_hangs_while_it_creates_the_proxy(make_bench: MakeBench) -> None:
    bench = make_bench("Hangs")
    bench.start_remoted()
    monitor = bench.start_guest()
    bench.start_proxyd(module=HASTY)
    bench.wait_log(HASTY, "QEMU hasn't answered device_add within 1 s")
    bench.wait_log(HASTY, "found plugged without a link")
    bench.eject(5)
    monitor.wait_event("DEVICE_DELETED", device="odd0")
    assert bench.end_proxyd() == 0
    wait_until(lambda: monitor.plugged() == {}, "QEMU has unplugged it")
