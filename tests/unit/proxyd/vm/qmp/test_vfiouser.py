# SPDX-License-Identifier: GPL-2.0-or-later
"""A slot of a vfio-user device, whose link QEMU makes itself, beside a monitor in the test's own thread."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config import DeviceConfig, Transport
from common.errors import PeerGone, ProtocolError
from common.loop import Loop
from common.messages import Event
from common.peer import PeerCredentials
from proxyd.vm.qmp import ports, slot
from proxyd.vm.qmp.function import Function
from proxyd.vm.qmp.monitor import CommandError
from proxyd.vm.qmp.ports import NoPort, Place
from proxyd.vm.qmp.qemu import VFIO_USER_DRIVER, Inventory
from proxyd.vm.qmp.slot import Slot, Turn
from tests.support.wait import until

DEVFN = 0x28
SELF = PeerCredentials(os.getpid(), os.geteuid(), os.getegid())
HANGS = 20.0


class FakeMonitor:
    """A QEMU with a ``pc`` machine. It takes devices, unless ``refusals`` has an error for the next one."""

    def __init__(self) -> None:
        self.devices: dict[str, dict[str, Any]] = {}
        self.refusals: list[str] = []
        self.shows_msix = False
        self.asked: list[str] = []
        """the ids that it was told to unplug"""

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command == "device_add":
            if self.refusals:
                raise CommandError(self.refusals.pop(0), "GenericError")
            self.devices[arguments["id"]] = arguments
        elif command == "device_del":
            self.asked.append(arguments["id"])
        elif command == "qom-list":
            part = "msix-table[0]" if self.shows_msix else "bus master[0]"
            return [{"name": part, "type": "child<memory-region>"}]
        elif command == "query-pci":
            devices = [{"slot": 5, "function": 0, "qdev_id": name} for name in self.devices]
            return [{"bus": 0, "devices": devices}]
        return {}


class Bench:
    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "dev0.sock")
        self.loop = Loop()
        self.monitor = FakeMonitor()
        self.absences = 0
        """how often nobody waits for QEMU at first"""
        config = DeviceConfig("dev0", None, DEVFN, None, None, None, {}, Transport.VFIO_USER)
        self.function = Function(config, self.path, self.loop, logging.getLogger("tests.vfiouser"))
        self.function.find_server = self._find_server
        self.slot = Slot([self.function])

    async def _find_server(self) -> PeerCredentials:
        if self.absences:
            self.absences -= 1
            raise PeerGone("nobody waits")
        return SELF

    def run(
        self, meanwhile: Callable[[], Awaitable[None]], *, plugged: bool = False, served: bool = True
    ) -> None:
        """Runs the slot until ``meanwhile`` is over; ``plugged`` before, and perhaps served then."""

        async def main() -> None:
            inventory = Inventory({}, {}, {})
            if plugged:
                self.monitor.devices["dev0"] = {}
                inventory = Inventory({"dev0": VFIO_USER_DRIVER}, {"dev0": DEVFN}, {DEVFN: "dev0"})
            monitor: Any = self.monitor
            servers = {"dev0": SELF if served else None}
            running = asyncio.create_task(self.slot.run(monitor, inventory, servers, Turn()))
            try:
                await meanwhile()
                assert not running.done()
            finally:
                running.cancel()
                await asyncio.wait({running})
                self.slot.close()

        asyncio.run(main())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(slot, "_LAST_REPLACEMENT_SECONDS", 0.001)
    monkeypatch.setattr(slot, "_LAST_RETRY_SECONDS", 0.001)
    bench = Bench(tmp_path)
    yield bench
    bench.loop.close()


def test_qemu_is_told_the_socket_whatever_directory_it_is_in(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    bench.function.path = "dev0.sock"

    async def meanwhile() -> None:
        await until(lambda: bench.function.is_sound, "it is plugged and linked")

    bench.run(meanwhile)
    assert bench.monitor.devices["dev0"] == {
        "driver": "vfio-user-pci",
        "id": "dev0",
        "bus": "pci.0",
        "addr": "05.0",
        "multifunction": False,
        "socket": {"type": "unix", "path": bench.path},
    }


def test_a_device_that_is_not_reached_is_tried_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    refusal = f"Failed to connect to '{bench.path}': Connection refused"
    bench.monitor.refusals = [refusal, refusal]
    bench.absences = 2

    async def meanwhile() -> None:
        await until(lambda: bench.function.is_sound, "it is plugged and linked")

    with caplog.at_level(logging.INFO):
        bench.run(meanwhile)
    assert caplog.messages[:2] == ["not plugged yet: nobody waits", f"not plugged yet: QEMU: {refusal}"]
    assert caplog.messages[2].startswith("plugged at 05.0, served by")


def test_another_refusal_is_final(bench: Bench) -> None:
    bench.monitor.refusals = ["Bus 'pci.0' not found"]

    async def meanwhile() -> None:
        await until(bench.slot.settled.is_set, "the slot has settled")
        assert bench.function.reason == "QEMU refuses to plug it: Bus 'pci.0' not found"
        assert bench.function.server is None

    bench.run(meanwhile)
    assert not bench.monitor.devices


@pytest.mark.parametrize("shows_msix", [False, True])
def test_a_lost_link_is_told_with_what_is_at_stake(
    bench: Bench, shows_msix: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The guest is asked to eject it, unless QEMU would abort at that."""
    bench.monitor.shows_msix = shows_msix

    async def meanwhile() -> None:
        await until(lambda: bench.function.is_sound, "it is plugged and linked")
        bench.function.lose_link()
        await until(bench.slot.settled.is_set, "the slot has settled")
        for _ in range(50):
            await asyncio.sleep(0)

    bench.run(meanwhile)
    (told,) = [each for each in caplog.records if vars(each).get("event") is Event.PLUGGED_AT_RISK]
    assert "QEMU aborts if the guest is reset" in told.getMessage()
    assert ("at the unplug as well" in told.getMessage()) is shows_msix
    assert bench.monitor.asked == ([] if shows_msix else ["dev0"])


def test_what_is_found_plugged_without_a_server_is_at_risk(bench: Bench) -> None:
    async def meanwhile() -> None:
        await until(lambda: bench.monitor.asked, "QEMU is asked to unplug it")
        assert bench.function.reason.startswith(
            f"found plugged without a link to {bench.path}: the guest reads"
        )
        assert not bench.function.is_sound

    bench.run(meanwhile, plugged=True, served=False)


class Q35:
    """A monitor of a machine with these ports, and what is on their buses."""

    def __init__(self, **buses: str | None) -> None:
        self._buses = buses

    async def execute(self, command: str, **arguments: str) -> Any:
        path = arguments["path"]
        if command == "qom-list" and path == "/machine/peripheral":
            return [{"name": name, "type": "child<pcie-root-port>"} for name in self._buses] + [
                {"name": "type", "type": "string"},
                {"name": "disk", "type": "child<nvme>"},
            ]
        name = path.split("/")[3]
        if command == "qom-get" and arguments["property"] == "parent_bus":
            return f"/machine/peripheral/{name}-port/{name}-port"
        if command == "qom-get" and arguments["property"] == "addr":
            return 1
        if command == "qom-get":
            return "/machine/unattached/device[2]" if self._buses[name] != "no hot-plug" else ""
        return [{"name": "child[0]", "type": "link<nvme>"}] if self._buses[name] == "taken" else []


def choose(monitor: Any, sibling: str | None = None) -> Place:
    return asyncio.run(ports.choose_place(monitor, DEVFN + 1, sibling, is_flat=False))


def test_the_first_free_port_is_chosen() -> None:
    assert choose(Q35(a="taken", b="no hot-plug", d=None, c=None)) == Place("c", 1)
    with pytest.raises(NoPort, match="start QEMU with -device pcie-root-port,id=rp1,chassis=1"):
        choose(Q35(a="taken", b="no hot-plug"))


def test_functions_of_one_slot_share_their_port() -> None:
    assert choose(Q35(a=None), "one") == Place("one-port", 1)


@pytest.mark.parametrize("odd", [None, "x", [5], {"x": 5}, [{}], [{"name": "a", "type": 7}]])
def test_an_odd_answer_ends_the_session(odd: Any) -> None:
    class Odd:
        async def execute(self, _command: str, **_arguments: str) -> Any:
            return odd

    for sibling in (None, "one"):
        with pytest.raises((ProtocolError, NoPort)):
            choose(Odd(), sibling)
