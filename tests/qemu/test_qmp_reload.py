# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGHUP to proxyd beside a QEMU: slots are plugged and unplugged, and what stays is not interrupted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.monitorclient import MonitorClient
from tests.support.qmpbench import QmpBench
from tests.support.wait import wait_until

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")

DEVICES = {"edu0": "05.0", "com1": "06.0", "edu1": "07.0"}
MODELS = {"edu0": "edu", "com1": "pci-serial", "edu1": "edu"}


class Reloaded(QmpBench):
    """remoted has all devices; proxyd has those of its file."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            directory, *((MODELS[name], f"id={name}", f"addr={at}") for name, at in DEVICES.items())
        )
        self.file = directory / "vm.toml"

    def write(self, *names: str) -> None:
        blocks = [f'[[device]]\nid = "{name}"\naddr = "{DEVICES[name]}"\n' for name in names]
        self.file.write_text("\n".join([f'vm = "qmp:{self.monitor_path}"\n', *blocks]))

    def reload(self, *names: str) -> None:
        """SIGHUP; returns when the file has been read."""
        count = self.log("proxyd").count("reloaded:")
        self.write(*names)
        self.proxyd.process.send_signal(signal.SIGHUP)
        self.wait_log("proxyd", "reloaded:", count + 1)

    def plugged(self) -> set[str]:
        return {name for name, function in self.status("proxyd").items() if function["connected"]}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Reloaded]:
    bench = Reloaded(tmp_path)
    bench.write("edu0", "com1")
    bench.start_remoted()
    yield bench
    bench.close()


@pytest.fixture
def monitor(bench: Reloaded) -> MonitorClient:
    """The guest runs, and has served interrupts of both functions."""
    monitor = bench.start_guest()
    bench.start_proxyd_from(bench.file)
    assert bench.command("setup").result.number("functions") == 2
    bench.command("run 4")
    return monitor


def served(bench: Reloaded, addr: str) -> int:
    (function,) = [each for each in bench.command("stats").of_kind("function") if each.text("addr") == addr]
    return function.number("served")


def test_a_slot_is_added_while_another_goes_on(bench: Reloaded, monitor: MonitorClient) -> None:
    bench.reload("edu0", "com1", "edu1")
    wait_until(lambda: bench.plugged() == set(DEVICES), "the new one is plugged")
    assert set(monitor.plugged()) == set(DEVICES)
    bench.command("run 4")
    assert served(bench, "05.0") == 8
    assert bench.command("setup").result.number("functions") == 3
    bench.command("run 4")


def test_a_slot_is_removed_with_the_guests_consent(bench: Reloaded, monitor: MonitorClient) -> None:
    bench.reload("edu0")
    bench.wait_log("proxyd", "com1: warning: the guest hasn't ejected it in 5 s")
    assert set(monitor.plugged()) == {"edu0", "com1"}
    bench.command("run 4")
    assert served(bench, "06.0") == 8
    bench.eject(6)
    wait_until(lambda: set(bench.status("proxyd")) == {"edu0"}, "it is no function of ours any more")
    assert set(monitor.plugged()) == {"edu0"}
    assert bench.command("setup").result.number("functions") == 1
    bench.command("run 4")


def test_what_is_taken_back_before_the_guest_consents(bench: Reloaded, monitor: MonitorClient) -> None:
    """It is ejected, as QEMU can't take a request back, and plugged again."""
    bench.reload("edu0")
    wait_until(lambda: bench.asked_to_eject(6), "QEMU asks the guest")
    bench.reload("edu0", "com1")
    bench.eject(6)
    bench.wait_log("proxyd", "com1: plugged at 06.0", 2)
    assert bench.command("setup").result.number("functions") == 2
    bench.command("run 4")


def test_a_change_while_no_qemu_is_there(bench: Reloaded) -> None:
    bench.start_proxyd_from(bench.file)
    bench.reload("edu1")
    monitor = bench.start_guest()
    wait_until(lambda: bench.plugged() == {"edu1"}, "the function of the new file is plugged")
    assert set(monitor.plugged()) == {"edu1"}


def test_an_address_that_qemu_has_something_at(bench: Reloaded, monitor: MonitorClient) -> None:
    """It costs the new function only."""
    bench.file.write_text(bench.file.read_text().replace("06.0", "01.0"))
    bench.proxyd.process.send_signal(signal.SIGHUP)
    bench.wait_log("proxyd", "reloaded:")
    bench.eject(6)
    bench.wait_log("proxyd", "com1: warning: not plugged: 01.0 is taken by")
    assert bench.command("setup").result.number("functions") == 1
    bench.command("run 4")
    assert set(monitor.plugged()) == {"edu0"}
