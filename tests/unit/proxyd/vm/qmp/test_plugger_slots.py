# SPDX-License-Identifier: GPL-2.0-or-later
"""What proxyd makes of what happens to its functions in a QEMU: its own doing, somebody else's, or a refusal."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from common.config import DeviceConfig, VmConfig
from common.link import Client
from common.loop import Loop
from common.messages import Event
from common.mpqemu import CONFIG, Command
from common.pci import parse_devfn
from common.peer import parse_pid
from proxyd.vm.qmp import handover, health, monitor, plugger, servers, slot
from proxyd.vm.qmp.function import Function
from proxyd.vm.qmp.plugger import QemuPlugger
from tests.support.modelqemu import ModelQemu
from tests.support.remote import RemoteThread
from tests.support.remotebench import LineDevice
from tests.support.wait import until

HANGS = 20.0
"""seconds after which what hasn't happened never will"""

Talk = Callable[["Bench"], Awaitable[None]]


class Bench:
    """proxyd with functions at these addresses, their remote, and a QEMU; all in one process."""

    def __init__(self, directory: Path, *addresses: str) -> None:
        self.directory = directory
        self.loop = Loop()
        self.qemu = ModelQemu()
        self.remote = RemoteThread(directory)
        self.devfns = {f"dev{number}": parse_devfn(text) for number, text in enumerate(addresses)}
        for name, devfn in self.devfns.items():
            self.remote.add(LineDevice, name, devfn)
        self.remote.start()
        self.plugger: QemuPlugger

    @property
    def function(self) -> Function:
        return next(each for each in self.plugger._slots.functions if each.name == "dev0")

    def run(self, talk: Talk) -> None:
        """Runs a proxyd until ``talk`` is over; it must end by itself then."""
        self.loop.close()
        self.loop = Loop()
        asyncio.run(self._main(talk))

    def hold(self, name: str) -> Client:
        """A link as QEMU has it to a device that was plugged before."""
        client = Client.connect(self.remote.path(name), HANGS)
        client.request(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
        return client

    async def until_sound(self) -> None:
        """Waits until all functions are plugged and linked."""
        functions = self.plugger._slots.functions
        await until(lambda: all(function.is_sound for function in functions), "all is plugged and linked")

    async def lose_link(self) -> None:
        """The first function's remote hangs up."""
        handover = self.function.handover
        assert handover is not None
        handover.client.shutdown()
        await until(lambda: self.function.handover is not handover, "the link's end is seen")

    def close(self) -> None:
        self.remote.close()
        self.loop.close()

    async def _main(self, talk: Talk) -> None:
        path = self.directory / "qmp"
        await self.qemu.start(path)
        devices = tuple(
            DeviceConfig(name, None, devfn, None, None, None, {}) for name, devfn in self.devfns.items()
        )
        self.plugger = QemuPlugger(
            "tests.plugger", VmConfig("test", str(self.directory), f"qmp:{path}", devices), self.loop
        )
        running = asyncio.create_task(self.plugger._main())
        try:
            await talk(self)
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            await asyncio.wait({running}, timeout=HANGS)
            self.plugger.close()
            await self.qemu.close()
        running.result()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, "05.0")
    yield bench
    bench.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Bench]:
    """Of two functions in one slot."""
    bench = Bench(tmp_path, "05.0", "05.1")
    yield bench
    bench.close()


def test_what_qemu_refuses_leaves_neither_a_link_nor_an_fd(bench: Bench) -> None:
    bench.qemu.errors["device_add"] = "GenericError", "no"

    async def talk(bench: Bench) -> None:
        await until(lambda: "refuses to plug it" in bench.function.reason, "it is refused")
        assert bench.qemu.commands[-1] == ("closefd", "iohub-dev0")
        assert bench.qemu.fds == set()
        assert bench.function.handover is None
        server = bench.remote.servers["dev0"]
        await until(lambda: server.session is None, "remoted may have another client")

    bench.run(talk)


def test_what_is_not_where_it_was_to_be_is_refused(bench: Bench) -> None:
    bench.qemu.misplaces = True

    async def talk(bench: Bench) -> None:
        await until(lambda: "refuses to plug it" in bench.function.reason, "it is refused")
        assert "has no function at 05.0" in bench.function.reason
        assert not bench.function.is_plugged

    bench.run(talk)


def test_what_qemu_no_longer_knows_is_unplugged(bench: Bench) -> None:
    """The event may have been lost with an earlier monitor."""

    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        bench.qemu.errors["device_del"] = "DeviceNotFound", "Device 'dev0' not found"
        bench.qemu.devfns.clear()
        await bench.lose_link()
        await bench.until_sound()
        assert bench.qemu.count("device_add") == 2

    bench.run(talk)


def test_other_errors_of_device_del_unplug_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "CONSENT_SECONDS", 0.01)

    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        bench.qemu.errors["device_del"] = "GenericError", "Device dev0 is already in the process of unplug"
        await bench.lose_link()
        await until(lambda: bench.qemu.count("device_del") > 1, "it is asked again")
        assert bench.function.is_plugged
        assert bench.qemu.count("device_add") == 1

    bench.run(talk)


def test_somebody_elses_unplug_is_told_from_our_own_after_a_replacement(bench: Bench) -> None:
    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        await bench.lose_link()
        await bench.until_sound()
        assert bench.function.reconnects == 1
        bench.qemu.eject("dev0")
        await until(lambda: bench.function.is_out, "it is taken for somebody else's")
        assert bench.function.reason.startswith("unplugged, not by this daemon")
        assert bench.qemu.count("device_add") == 2

    bench.run(talk)


def test_what_is_missing_beside_function_0_comes_with_a_new_function_0(pair: Bench) -> None:
    """A guest looks at the others when function 0 arrives; QEMU refuses those that come later."""
    pair.qemu.devfns["dev0"] = pair.devfns["dev0"]
    pair.qemu.consents = False
    client = pair.hold("dev0")

    async def talk(bench: Bench) -> None:
        await until(lambda: bench.qemu.count("device_del"), "it is to be unplugged")
        client.close()
        bench.qemu.eject("dev0")
        await bench.until_sound()
        order = [item for item in bench.qemu.commands if item[0] in ("device_add", "device_del")]
        assert order == [("device_del", "dev0"), ("device_add", "dev1"), ("device_add", "dev0")]

    pair.run(talk)


def test_what_is_missing_beside_other_functions_is_added(pair: Bench) -> None:
    """Such as function 0, by which the guest finds them all."""
    pair.qemu.devfns["dev1"] = pair.devfns["dev1"]
    client = pair.hold("dev1")

    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        assert [item for item in bench.qemu.commands if item[0] == "device_add"] == [("device_add", "dev0")]
        assert bench.qemu.count("device_del") == 0

    pair.run(talk)
    client.close()


def test_a_request_is_noted_in_qemu_until_it_has_come_true(pair: Bench) -> None:
    pair.qemu.consents = False

    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        await bench.lose_link()
        await until(lambda: bench.qemu.count("device_del") == 2, "both are to be unplugged")
        assert bench.qemu.objects == {"iohub-unplug-dev0": "secret", "iohub-unplug-dev1": "secret"}
        bench.qemu.eject("dev0", "dev1")
        await bench.until_sound()
        assert bench.qemu.objects == {}

    pair.run(talk)


def test_a_request_of_the_daemon_before_leads_to_a_new_plug(pair: Bench) -> None:
    async def asks(bench: Bench) -> None:
        await bench.until_sound()
        bench.qemu.consents = False
        await bench.lose_link()
        await until(lambda: bench.qemu.count("device_del") == 2, "both are to be unplugged")

    async def finds(bench: Bench) -> None:
        await bench.until_sound()
        (text,) = bench.function.amiss.texts()
        assert (
            text == "the guest was asked to eject it and has not done so yet; it is plugged again after that"
        )
        for client in clients:
            client.close()
        bench.qemu.eject("dev1", "dev0")
        await until(lambda: bench.qemu.count("device_add") == 4, "both are plugged again")
        await bench.until_sound()
        assert bench.qemu.objects == {}
        assert bench.function.amiss.texts() == []

    pair.run(asks)
    clients = [pair.hold(name) for name in pair.devfns]
    pair.run(finds)


def test_what_is_ejected_before_it_is_adopted_is_plugged(bench: Bench) -> None:
    """The inventory has it, and its server had a client when it was asked."""
    bench.qemu.devfns |= bench.devfns
    bench.qemu.ejects_on = "query-status"
    client = bench.hold("dev0")

    async def talk(bench: Bench) -> None:
        await until(lambda: bench.function.reason != "not known: no QEMU is attached", "it is looked at")
        assert not bench.function.is_plugged
        client.close()
        await bench.until_sound()
        assert (bench.qemu.count("device_add"), bench.qemu.count("device_del")) == (1, 0)

    bench.run(talk)


def test_a_qemu_that_takes_no_note_is_served_all_the_same(bench: Bench) -> None:
    bench.qemu.errors["object-add"] = "GenericError", "invalid object type: secret"

    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        await bench.lose_link()
        await bench.until_sound()
        assert bench.qemu.count("object-del") == 0

    bench.run(talk)


def test_what_somebody_else_unplugs_stays_out_though_the_monitor_is_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the event was seen or not: it is the same QEMU."""
    monkeypatch.setattr(plugger, "_RETRY_SECONDS", 0.01)

    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        bench.qemu.hang_up()
        bench.qemu.devfns.clear()
        await until(lambda: bench.function.is_out, "it is noticed")
        bench.qemu.hang_up()
        await until(lambda: bench.qemu.clients == 3, "the monitor is there again")
        await until(lambda: bench.function.reason.startswith("unplugged, not by"), "it is told")
        assert bench.qemu.count("device_add") == 1

    bench.run(talk)


def test_a_new_qemu_gets_what_was_unplugged_in_the_one_before(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugger, "_RETRY_SECONDS", 0.01)
    starts = iter(range(100))
    monkeypatch.setattr(plugger, "process_start", lambda pid: (pid, next(starts)))

    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        bench.qemu.eject("dev0")
        await until(lambda: bench.function.is_out, "it is noticed")
        bench.qemu.hang_up()
        await bench.until_sound()

    bench.run(talk)


def test_events_without_end_are_not_all_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        for name in ("RESET", "SHUTDOWN", "STOP", "RESUME") * 250:
            bench.qemu.send({"event": name, "data": {"reason": "guest-reset"}, "timestamp": {}})
        bench.qemu.send({"event": "STOP", "timestamp": {}})
        await until(lambda: not bench.plugger._health.is_running, "all are handled")

    with caplog.at_level(logging.INFO):
        bench.run(talk)
    assert 0 < sum("machine was" in line or "guest was" in line for line in caplog.messages) <= 10


def test_a_line_tells_of_its_kind_of_event(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        for name in ("RESET", "SHUTDOWN", "STOP", "RESUME"):
            bench.qemu.send({"event": name, "timestamp": {}})
        await bench.lose_link()
        await bench.until_sound()
        bench.qemu.eject("dev0")
        await until(lambda: bench.function.is_out, "it is noticed")

    with caplog.at_level(logging.INFO, "tests.plugger"):
        bench.run(talk)
    told = [(record.event, record) for record in caplog.records if hasattr(record, "event")]
    assert Counter(event for event, _ in told) == Counter(
        [
            Event.QEMU_ATTACHED,
            Event.PLUGGED,
            Event.MACHINE_RESET,
            Event.MACHINE_SHUT_DOWN,
            Event.GUEST_PAUSED,
            Event.GUEST_RESUMED,
            Event.PLUGGED_WITHOUT_LINK,
            Event.UNPLUGGED,
            Event.PLUGGED,
            Event.UNPLUGGED_BY_OTHERS,
            Event.QEMU_DETACHED,
        ]
    )
    assert parse_pid(vars(told[0][1])["peer"]) == os.getpid()
    devices = {
        vars(record).get("device") for event, record in told if event.name.startswith(("PLUG", "UNPLUG"))
    }
    assert devices == {"dev0"}


def test_the_reason_of_a_reset_may_be_anything(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    deep: list[object] = []
    for _ in range(500):
        deep = [deep]
    reasons = [[], {}, 5, None, deep, {"x": deep}]

    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        for reason in reasons:
            bench.qemu.send({"event": "RESET", "data": {"reason": reason}, "timestamp": {}})
        bench.qemu.send({"event": "STOP", "timestamp": {}})
        await until(lambda: not bench.plugger._health.is_running, "all are handled")

    with caplog.at_level(logging.INFO):
        bench.run(talk)
    told = [line for line in caplog.messages if "machine was reset" in line]
    assert told == ["the machine was reset (unknown reason)"] * len(reasons)


def amiss(bench: Bench) -> list[str]:
    return bench.plugger._state.amiss.texts()


def test_a_guest_that_does_not_run_is_amiss(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_ASK_SECONDS", 0.001)

    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        assert amiss(bench) == []
        bench.qemu.state.update(running=False, status="paused")
        await until(lambda: amiss(bench) == ["the guest is paused"], "it is asked")
        bench.qemu.state.update(status="guest-panicked")
        panicked = ["the guest doesn't run: QEMU says guest-panicked"]
        await until(lambda: amiss(bench) == panicked, "it is asked")
        bench.qemu.state.update(running=True, status="running")
        await until(lambda: amiss(bench) == [], "it is asked")

    bench.run(talk)


def test_a_monitor_that_does_not_answer_is_amiss(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_ASK_SECONDS", 0.001)
    monkeypatch.setattr(health, "_SILENCE_SECONDS", 0.05)

    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        bench.qemu.unanswered = "query-status"
        await until(lambda: amiss(bench), "its silence is told")
        (text,) = amiss(bench)
        assert "hasn't answered its monitor for 0 s" in text

    bench.run(talk)


def test_a_monitor_that_is_only_slow_stays_attached(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the link's duplicate, by which its end is noticed."""
    monkeypatch.setattr(health, "_ASK_SECONDS", 0.001)

    async def talk(bench: Bench) -> None:
        await bench.until_sound()
        monkeypatch.setattr(monitor, "_COMMAND_SECONDS", 0.01)
        bench.qemu.unanswered = "query-status"
        await until(lambda: bench.plugger._health._monitor.silent_for > 0.1, "it is silent")  # type: ignore[union-attr]
        assert bench.plugger._state.attached
        assert bench.function.handover is not None

    bench.run(talk)


def test_many_functions_whose_servers_hang_are_adopted_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """remoted's control socket hangs, too; each server is asked while no other has answered."""
    monkeypatch.setattr(handover, "_ROUND_TRIP_SECONDS", HANGS)
    monkeypatch.setattr(servers, "_REMOTED_SECONDS", 0.01)
    bench = Bench(tmp_path, *(f"{number:02x}.{number % 2}" for number in range(3, 31)))
    bench.remote.close()
    bench.qemu.devfns |= bench.devfns
    listeners = []
    for name in ("remoted.varlink", *(f"{name}.sock" for name in bench.devfns)):
        listeners.append(socket.socket(socket.AF_UNIX))
        listeners[-1].bind(str(tmp_path / name))
        listeners[-1].listen()

    async def talk(bench: Bench) -> None:
        await until(
            lambda: len(select.select(listeners, [], [], 0)[0]) == len(listeners), "each of them is asked"
        )
        for listener in listeners:
            listener.close()
        await bench.until_sound()
        assert bench.qemu.count("device_del") == 0

    bench.run(talk)
    bench.loop.close()
