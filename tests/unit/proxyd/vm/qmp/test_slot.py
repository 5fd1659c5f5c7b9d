# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a slot's stay in QEMU, whatever it is in the middle of."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import resource
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from common.config import DeviceConfig
from common.loop import Loop
from common.pci import parse_devfn
from common.peer import PeerCredentials
from proxyd.vm.qmp import handover, slot
from proxyd.vm.qmp.function import Function
from proxyd.vm.qmp.monitor import Monitor
from proxyd.vm.qmp.qemu import PROXY_DRIVER, Inventory
from proxyd.vm.qmp.slot import Slot, Turn
from tests.support.fds import no_fd_is_left
from tests.support.remote import RemoteThread
from tests.support.remotebench import LineDevice

DEVFN = parse_devfn("05.0")
GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}
}
NOTHING = Inventory({}, {}, {})
PLUGGED = Inventory({"dev0": PROXY_DRIVER}, {"dev0": DEVFN}, {DEVFN: "dev0"})
LISTED = {
    "qom-list": [{"name": "dev0", "type": f"child<{PROXY_DRIVER}>"}],
    "query-pci": [{"bus": 0, "devices": [{"slot": 5, "function": 0, "qdev_id": "dev0"}]}],
}
DELETED = {"event": "DEVICE_DELETED", "data": {"device": "dev0"}, "timestamp": {}}
HANGS = 20.0
"""seconds after which what hasn't ended never will"""


class Bench:
    """A slot of one function, with QEMU's end of the monitor in the same asyncio loop."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.loop = Loop()
        config = DeviceConfig("dev0", None, DEVFN, None, None, None, {})
        path = str(directory / "dev0.sock")
        self.function = Function(config, path, self.loop, logging.getLogger("tests.slot"))
        self.slot: Slot
        self.after: Mapping[str, list[dict[str, Any]]] = {}
        """the events that follow the answers to commands"""
        self.results: Mapping[str, Any] = {}
        """what commands result in, if not in nothing"""
        self.servers: Mapping[str, PeerCredentials | None] = {}
        self.errors: Mapping[str, str] = {}
        """what commands are refused with: the class of a QMP error"""
        self.unanswered = ""
        """a command that gets no answer"""
        self._asked: dict[str, asyncio.Event] = {}

    def run(self, inventory: Inventory, meanwhile: Callable[[], Awaitable[None]]) -> None:
        """Runs the slot until ``meanwhile`` is over, then cancels it; it must end."""
        asyncio.run(self._main(inventory, meanwhile))

    async def asked(self, command: str) -> None:
        """Returns as soon as QEMU has the command, and has answered."""
        await self._asked.setdefault(command, asyncio.Event()).wait()

    async def _main(self, inventory: Inventory, meanwhile: Callable[[], Awaitable[None]]) -> None:
        path = self.directory / "qmp"
        server = await asyncio.start_unix_server(self._serve, path)
        self.slot = Slot([self.function])
        self._asked.clear()
        monitor = await Monitor.connect(str(path), self._on_event, lambda _line: None)
        running = asyncio.create_task(self.slot.run(monitor, inventory, self.servers, Turn()))
        try:
            await meanwhile()
            running.cancel()
            done, _ = await asyncio.wait({running}, timeout=HANGS)
            assert done, f"it goes on: {running}"
        finally:
            self.slot.close()
            await monitor.close()
            server.close()
            path.unlink(missing_ok=True)  # from Python 3.13 on the server removes it

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        assert (name, data) == ("DEVICE_DELETED", {"device": "dev0"})
        self.slot.on_deleted(self.function)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\r\n")
        while data := await reader.read(4096):
            message = json.loads(data)
            command = message["execute"]
            if command != self.unanswered:
                outcome: dict[str, Any] = {"return": self.results.get(command, {})}
                if command in self.errors:
                    outcome = {"error": {"class": self.errors[command], "desc": "refused"}}
                answers = [{**outcome, "id": message.get("id")}, *self.after.get(command, [])]
                writer.write(b"".join(json.dumps(answer).encode() + b"\r\n" for answer in answers))
            self._asked.setdefault(command, asyncio.Event()).set()
        writer.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.loop.close()


@pytest.fixture
def remote(bench: Bench) -> Iterator[RemoteThread]:
    remote = RemoteThread(bench.directory)
    remote.add(LineDevice, "dev0", DEVFN)
    remote.start()
    yield remote
    remote.close()


def test_ends_whenever_it_is_cancelled(bench: Bench) -> None:
    """Both what it waits for and the cancellation may come in one and the same pass of asyncio's loop."""
    bench.after = {"device_del": [DELETED]}
    plugged = []

    for passes in range(40):

        async def meanwhile(passes: int = passes) -> None:
            await bench.asked("device_del")
            for _ in range(passes):
                await asyncio.sleep(0)
            plugged.append(bench.function.is_plugged)

        bench.run(PLUGGED, meanwhile)
    assert plugged[0]
    assert not any(plugged[20:])


def test_ends_with_the_link_that_it_is_looking_at(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_ROUND_TRIP_SECONDS", 3600.0)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(bench.function.path)
        listener.listen()
        listener.setblocking(False)
        links: list[socket.socket] = []

        async def meanwhile() -> None:
            loop = asyncio.get_running_loop()
            link, _ = await loop.sock_accept(listener)
            links.append(link)
            assert await loop.sock_recv(link, 4096)
            loop.call_later(2 * HANGS, link.close)

        bench.run(NOTHING, meanwhile)
        (link,) = links
        with link:
            assert link.recv(4096) == b""


def test_a_device_whose_answers_take_too_long_altogether_loses_its_link(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handover, "_ROUND_TRIP_SECONDS", 3600.0)
    monkeypatch.setattr(slot, "_EXAMINATION_SECONDS", 0.0)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(bench.function.path)
        listener.listen()
        listener.setblocking(False)

        async def meanwhile() -> None:
            loop = asyncio.get_running_loop()
            for _ in range(2):
                link, _ = await loop.sock_accept(listener)
                with link:
                    link.setblocking(False)
                    async with asyncio.timeout(HANGS):
                        while await loop.sock_recv(link, 4096):
                            pass

        bench.run(NOTHING, meanwhile)
    assert caplog.messages == ["not plugged yet: its answers take more than 0 s"], "it is told once"


@pytest.mark.usefixtures("remote")
def test_breaks_the_link_that_qemu_may_wait_for(bench: Bench) -> None:
    bench.unanswered = "device_add"
    links: list[socket.socket] = []

    async def meanwhile() -> None:
        await bench.asked("device_add")
        assert bench.function.handover is not None
        links.append(socket.socket(fileno=os.dup(bench.function.handover.client.fileno())))

    bench.run(NOTHING, meanwhile)
    (link,) = links
    with link:
        assert link.recv(4096, socket.MSG_DONTWAIT) == b""


@pytest.mark.usefixtures("remote")
def test_leaves_the_link_that_qemu_goes_on_with(bench: Bench) -> None:
    bench.results = LISTED
    links: list[socket.socket] = []

    async def meanwhile() -> None:
        await bench.slot.settled.wait()
        assert bench.function.handover is not None
        links.append(socket.socket(fileno=os.dup(bench.function.handover.client.fileno())))

    bench.run(NOTHING, meanwhile)
    assert bench.function.handover is None
    (link,) = links
    with link, pytest.raises(BlockingIOError):
        link.recv(4096, socket.MSG_DONTWAIT)


@pytest.mark.parametrize(
    ("lasts", "consents_in", "pauses"),
    [
        ([0.0] * 10, 0.0, [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.0, 5.0]),
        ([0.0] * 10, 1.5, [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.0, 5.0]),
        ([1.5] * 10, 0.0, []),
        ([0.0, 0.0, 0.0, 1.5, 0.0, 0.0], 0.0, [0.02, 0.04, 0.08, 0.02, 0.04]),
    ],
    ids=["short", "short-slow-guest", "lasting", "short-lasting-short"],
)
def test_what_loses_its_link_at_once_is_replaced_ever_more_rarely(
    bench: Bench,
    remote: RemoteThread,
    monkeypatch: pytest.MonkeyPatch,
    lasts: list[float],
    consents_in: float,
    pauses: list[float],
) -> None:
    """After a link that lasted the pauses begin anew."""
    sleep, paused = asyncio.sleep, []
    passed = 0.0
    remove = Slot._remove

    async def remove_slowly(self: Slot, monitor: Monitor) -> None:
        nonlocal passed
        await remove(self, monitor)
        passed += consents_in

    monkeypatch.setattr(Slot, "_remove", remove_slowly)

    async def pause(seconds: float) -> None:
        paused.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", pause)
    bench.results, bench.after = LISTED, {"device_del": [DELETED]}

    async def meanwhile() -> None:
        nonlocal passed
        loop = asyncio.get_running_loop()
        time = loop.time
        monkeypatch.setattr(loop, "time", lambda: time() + passed)
        for seconds in lasts:
            while not bench.function.is_sound:
                await sleep(0)
            passed += seconds
            assert bench.function.handover is not None
            bench.function.handover.client.shutdown()
            while remote.servers["dev0"].session is not None:
                await sleep(0)
            bench.loop.step()
        while not bench.function.is_sound:
            await sleep(0)

    bench.run(NOTHING, meanwhile)
    assert [seconds for seconds in paused if seconds] == pauses


def test_the_link_of_what_qemu_refuses_is_released(bench: Bench, remote: RemoteThread) -> None:
    """Else the device's only client is a link that nobody uses."""
    bench.errors = {"device_add": "GenericError"}
    ended = []

    async def meanwhile() -> None:
        await bench.asked("device_add")
        async with asyncio.timeout(HANGS):
            while not bench.function.reason.startswith("QEMU refuses") or remote.servers["dev0"].session:
                await asyncio.sleep(0)
        ended.append(bench.function.handover)

    bench.run(NOTHING, meanwhile)
    assert ended == [None]


def test_each_reason_for_being_out_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "CONSENT_SECONDS", 0.01)
    function = bench.function
    reasons = [function.reason]

    async def becomes_another() -> None:
        async with asyncio.timeout(HANGS):
            while function.reason == reasons[-1]:
                await asyncio.sleep(0)
        reasons.append(function.reason)

    async def without_a_remote() -> None:
        await becomes_another()
        await becomes_another()

    async def without_consent() -> None:
        await bench.asked("device_del")
        reasons.append(function.reason)
        await becomes_another()
        bench.slot.on_deleted(function)
        reasons.append(function.reason)

    async def unplugged_by_others() -> None:
        function.is_plugged, function.is_asked = True, False
        bench.slot.on_deleted(function)
        reasons.append(function.reason)

    bench.run(NOTHING, without_a_remote)
    bench.run(PLUGGED, without_consent)
    bench.run(NOTHING, unplugged_by_others)
    reasons.append(function.reason)
    stake = "QEMU's proxy can't take a new one, the guest reads all ones"
    assert reasons == [
        "not known: no QEMU is attached",
        "not plugged yet",
        f"not plugged yet: {function.path}: No such file or directory",
        f"found plugged without a link to {function.path}: {stake}",
        "the guest has not ejected it within 0.01 s; it is replaced as soon as the guest ejects it or is reset",
        "unplugged",
        "unplugged, not by this daemon: it is not plugged again until iohub-proxyd is restarted",
        "not known: no QEMU is attached",
    ]


def test_adopts_a_remote_that_can_not_be_watched(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SO_PEERCRED knows a process of another PID namespace as 0; no fd or epoll watch may be left for one."""

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    nobody = PeerCredentials(0, 0, 0)
    bench.function.adopt(nobody)
    assert (bench.function.is_sound, bench.function.remote) == (True, nobody)
    bench.function.release()

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        bench.function.adopt(PeerCredentials(os.getpid(), 0, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert bench.function.is_sound
    bench.function.release()

    with monkeypatch.context() as patch, no_fd_is_left():
        patch.setattr(bench.function._loop, "add", full)
        bench.function.adopt(PeerCredentials(os.getpid(), 0, 0))
    assert bench.function.is_sound
    assert [line.partition(" can't be watched ")[2] for line in caplog.messages] == [
        "(Invalid argument): should it end, start this daemon again",
        "(Too many open files): should it end, start this daemon again",
        "(No space left on device): should it end, start this daemon again",
    ]


def test_a_remote_that_ends_before_it_is_adopted_has_left_no_link(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    bench.function.adopt(PeerCredentials(process.pid, 0, 0))
    assert bench.function.is_plugged
    assert not bench.function.is_sound
    assert bench.function.reason.startswith(f"the link to pid {process.pid} has ended")
    assert caplog.messages == [
        f"the link to pid {process.pid} has ended: QEMU's proxy can't take a new one, the guest reads all ones"
    ]


def test_what_qemu_has_plugged_elsewhere_is_not_taken_for_plugged(bench: Bench, remote: RemoteThread) -> None:
    assert remote.servers
    bench.results = {
        **LISTED,
        "query-pci": [{"bus": 0, "devices": [{"slot": 6, "function": 0, "qdev_id": "dev0"}]}],
    }
    reasons = []

    async def meanwhile() -> None:
        await bench.asked("query-pci")
        async with asyncio.timeout(HANGS):
            while not bench.function.reason.startswith("QEMU refuses"):
                await asyncio.sleep(0)
        reasons.append(bench.function.reason)

    bench.run(NOTHING, meanwhile)
    assert reasons == [
        "QEMU refuses to plug it: QEMU took device_add, but has no function at 05.0",
    ]


@pytest.mark.parametrize(("error", "is_left"), [("DeviceNotFound", False), ("GenericError", True)])
def test_only_what_qemu_does_not_know_counts_as_unplugged(bench: Bench, error: str, is_left: bool) -> None:
    """Any other error may mean that the guest has been asked before: the device is still there."""
    bench.errors = {"device_del": error}
    plugged = []

    async def meanwhile() -> None:
        await bench.asked("device_del")
        for _ in range(40):
            await asyncio.sleep(0)
        plugged.append(bench.function.is_plugged)

    bench.run(PLUGGED, meanwhile)
    assert plugged == [is_left]


def test_a_guest_that_does_not_eject_is_asked_ever_more_rarely(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "CONSENT_SECONDS", 0.01)
    monkeypatch.setattr(slot, "_LAST_CONSENT_SECONDS", 0.04)
    unplug, waits = Slot.unplug, list[float]()
    many = asyncio.Event()

    async def noted(self: Slot, monitor: Monitor, seconds: float) -> list[Function]:
        waits.append(seconds)
        if len(waits) == 5:
            many.set()
        return await unplug(self, monitor, seconds)

    async def meanwhile() -> None:
        await many.wait()

    monkeypatch.setattr(Slot, "unplug", noted)
    bench.run(PLUGGED, meanwhile)
    assert waits[:5] == [0.01, 0.02, 0.04, 0.04, 0.04]
