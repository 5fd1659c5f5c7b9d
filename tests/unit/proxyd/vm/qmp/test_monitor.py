# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's monitor as proxyd uses it, with a peer that says what QEMU never would."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from common.config import Transport
from common.errors import PeerGone, ProtocolError, UsageError
from common.peer import PeerCredentials
from proxyd.vm.qmp import monitor as monitor_module
from proxyd.vm.qmp import qemu
from proxyd.vm.qmp.monitor import CommandError, Monitor, MonitorAbsent
from tests.support.fds import send_fds
from tests.support.monitorpeer import GREETING, Peer, answer, receive, send
from tests.support.unsendable import unsendable_socket


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path / "qmp")
    yield peer
    peer.close()


def test_an_fd_rides_with_its_command(peer: Peer) -> None:
    reading, writing = os.pipe()

    def say(sock: socket.socket) -> None:
        command, fds = receive(sock)
        assert (command["execute"], command["arguments"], len(fds)) == ("getfd", {"fdname": "link"}, 1)
        os.write(fds[0], b"here")
        os.close(fds[0])
        send(sock, {"return": {}, "id": command["id"]})
        command, fds = receive(sock)
        assert (command["execute"], fds) == ("query-kvm", [])
        send(sock, {"return": {}, "id": command["id"]})

    async def talk(monitor: Monitor) -> None:
        await monitor.getfd("link", writing)
        await monitor.execute("query-kvm")

    try:
        peer.run(say, talk)
        assert os.read(reading, 4) == b"here"
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.usefixtures("older_kernel")
def test_the_close_of_fds_that_qemu_sends_holds_up_nobody(peer: Peer) -> None:
    """Of those that come with an answer, and of those that lie unread at the end."""
    returned = threading.Event()

    def say(sock: socket.socket) -> None:
        command, _ = receive(sock)
        with unsendable_socket() as passenger:
            reply = json.dumps({"return": {}, "id": command["id"]}).encode() + b"\r\n"
            send_fds(sock, reply, [passenger.fileno()])
            with contextlib.suppress(BrokenPipeError):  # it may have hung up already
                send_fds(sock, b" ", [passenger.fileno()])
            # In a thread: the client may have closed its copies already, and then this is the last close.
            closing = threading.Thread(target=os.close, args=(passenger.detach(),))
            closing.start()
            assert returned.wait(20.0)
        closing.join()

    async def talk(monitor: Monitor) -> None:
        await monitor.execute("query-status")
        await monitor.close()
        returned.set()

    peer.run(say, talk)
    assert returned.is_set()


def test_events_are_handled_and_not_kept(peer: Peer) -> None:
    def say(sock: socket.socket) -> None:
        send(sock, *({"event": "RESET", "data": {"guest": True}, "timestamp": {}} for _ in range(1000)))
        answer(sock, {})

    async def talk(monitor: Monitor) -> None:
        await monitor.execute("query-status")
        assert monitor._client.events.empty()
        assert monitor._client.events.history == ()

    peer.run(say, talk)
    assert peer.events == [("RESET", {"guest": True})] * 1000


def test_an_error_is_the_commands(peer: Peer) -> None:
    def say(sock: socket.socket) -> None:
        command, _ = receive(sock)
        error = {"class": "DeviceNotFound", "desc": "Device 'x' not found"}
        send(sock, {"error": error, "id": command["id"]})
        answer(sock, 5)

    async def talk(monitor: Monitor) -> None:
        with pytest.raises(CommandError, match=r"^Device 'x' not found$") as caught:
            await monitor.execute("device_del", id="x")
        assert caught.value.error_class == "DeviceNotFound"
        assert await monitor.execute("query-kvm") == 5

    peer.run(say, talk)


def test_an_answer_without_a_result_is_none(peer: Peer) -> None:
    def say(sock: socket.socket) -> None:
        command, _ = receive(sock)
        send(sock, {"id": command["id"]})
        assert sock.recv(1) == b""

    async def talk(monitor: Monitor) -> None:
        with pytest.raises(PeerGone, match="missing"):
            await monitor.execute("query-kvm")

    peer.run(say, talk)


@pytest.mark.parametrize("words", [b"", b"\r\n", b"{}\r\n", b"SSH-2.0-OpenSSH\r\n"])
def test_a_greeting_of_something_else(peer: Peer, words: bytes) -> None:
    def serve() -> None:
        with peer.listener.accept()[0] as sock:
            sock.sendall(words)

    async def talk(_monitor: Monitor) -> None:
        raise AssertionError("connected")

    with pytest.raises(PeerGone, match=str(peer.path)):
        peer.run_raw(serve, talk)


def test_a_reset_instead_of_a_greeting_is_told_in_words(peer: Peer) -> None:
    def serve() -> None:
        sock = peer.listener.accept()[0]
        assert sock.recv(1) == b"\xff"
        sock.close()  # with something unread: the other side gets ECONNRESET

    async def main() -> None:
        await Monitor.connect(str(peer.path), lambda *_: None, lambda _: None)

    def connect(path: str) -> socket.socket:
        sock = plain_connect(path)
        sock.send(b"\xff\xff")
        return sock

    plain_connect = monitor_module._connect
    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor_module, "_connect", connect)
        with pytest.raises(PeerGone, match=rf"^{peer.path}: Connection reset by peer$"):
            asyncio.run(main())
    thread.join()


def test_a_silent_monitor_is_told_and_waited_for(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "_GREETING_SECONDS", 0.01)
    told = threading.Event()

    def serve() -> None:
        with peer.listener.accept()[0] as sock:
            assert told.wait(20.0)
            send(sock, GREETING)
            answer(sock, {})
            assert sock.recv(1) == b""

    async def main() -> None:
        def on_silence(who: PeerCredentials) -> None:
            peer.silences.append(who)
            if len(peer.silences) == 2:
                told.set()

        monitor = await Monitor.connect(str(peer.path), lambda *_: None, on_silence)
        await monitor.close()

    thread = threading.Thread(target=serve)
    thread.start()
    asyncio.run(main())
    thread.join()
    assert {who.pid for who in peer.silences} == {os.getpid()}


def test_waiting_for_a_greeting_can_be_cancelled(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        connecting = asyncio.create_task(Monitor.connect(str(peer.path), lambda *_: None, lambda _: None))
        sock, _ = await asyncio.to_thread(peer.listener.accept)
        with sock:
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
            assert sock.recv(1) == b""

    asyncio.run(main())
    gc.collect()
    assert caplog.records == []


def test_a_command_without_an_answer_ends(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "_COMMAND_SECONDS", 0.05)

    def say(sock: socket.socket) -> None:
        receive(sock)
        assert sock.recv(1) == b""

    async def talk(monitor: Monitor) -> None:
        with pytest.raises(PeerGone, match="QEMU hasn't answered query-kvm within"):
            await monitor.execute("query-kvm")

    peer.run(say, talk)


def test_closing_does_not_wait_for_a_peer_that_reads_no_more(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "_COMMAND_SECONDS", 0.05)
    closed = threading.Event()
    seen: list[bool] = []

    async def talk(monitor: Monitor) -> None:
        with pytest.raises(PeerGone, match="QEMU hasn't answered query-kvm within"):
            await monitor.execute("query-kvm", padding="x" * (4 << 20))
        await monitor.close()
        closed.set()

    peer.run(lambda _sock: seen.append(closed.wait(20.0)), talk)
    assert seen == [True]


def test_nobody_at_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "qmp"

    async def connect() -> None:
        await Monitor.connect(str(path), lambda *_: None, lambda _: None)

    with pytest.raises(MonitorAbsent, match="No such file"):
        asyncio.run(connect())
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(MonitorAbsent, match="Connection refused"):
        asyncio.run(connect())


def test_no_place_for_a_socket(tmp_path: Path) -> None:
    async def connect(path: str) -> None:
        await Monitor.connect(path, lambda *_: None, lambda _: None)

    (tmp_path / "file").touch()
    for path in (str(tmp_path / "file" / "qmp"), "x" * 200):
        with pytest.raises(UsageError, match=r"^--vm qmp:"):
            asyncio.run(connect(path))
    for path in (str(tmp_path / "file"), str(tmp_path)):
        with pytest.raises(UsageError, match=rf"^--vm qmp:{path}: exists and is not a socket$"):
            asyncio.run(connect(path))


def test_too_many_clients(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")

    async def connect() -> None:
        await Monitor.connect(path, lambda *_: None, lambda _: None)

    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(path)
        listener.listen(0)
        other.connect(path)
        with pytest.raises(PeerGone, match="takes no connection: others wait for it already"):
            asyncio.run(connect())


class Answers:
    """A monitor that gives an answer to each command."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self._answers = answers

    async def execute(self, command: str, **arguments: object) -> Any:
        result = self._answers[command]
        if isinstance(result, Exception):
            raise result
        return result


FIT: dict[str, Any] = {
    "query-kvm": {"enabled": True, "present": True},
    "qom-list": [
        {"name": "ioapic", "type": "child<kvm-ioapic>"},
        {"name": "ram0", "type": "child<memory-backend-memfd>"},
    ],
    "qom-get": "/machine/unattached/device[19]",
    "device-list-properties": [],
    "query-memdev": [{"id": "ram0", "share": True, "size": 64 << 20}],
    "query-pci": [
        {
            "bus": 0,
            "devices": [
                {"slot": 5, "function": 0, "qdev_id": "", "class_info": {"desc": "SATA controller"}},
                {"slot": 6, "function": 0, "qdev_id": "net0", "class_info": {}},
            ],
        }
    ],
    "query-status": {"running": True, "status": "running"},
}


def ask(answers: Mapping[str, Any]) -> None:
    async def main() -> None:
        monitor: Any = Answers(answers)
        await qemu.check(monitor, set(Transport))
        await qemu.take_inventory(monitor)
        await qemu.run_state(monitor.execute)

    asyncio.run(main())


def test_a_qemu_without_the_proxy_is_refused() -> None:
    ask(FIT)
    missing = CommandError("Device 'x-pci-proxy-dev' not found", "DeviceNotFound")
    with pytest.raises(UsageError, match="use a QEMU that was configured with --enable-multiprocess"):
        ask(FIT | {"device-list-properties": missing})


ODD: list[Any] = [None, True, -5, math.inf, math.nan, "", "x", [], {}, [5], {"x": 5}, [[]], [{}]]


def variants(value: Any) -> Iterator[Any]:
    """The value with one part of it replaced by something odd, or left out."""
    yield from ODD
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {other: value[other] for other in value if other != key}
            for variant in variants(inner):
                yield value | {key: variant}
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            for variant in variants(inner):
                yield [*value[:number], variant, *value[number + 1 :]]


@pytest.mark.parametrize("command", FIT)
def test_no_answer_does_more_than_end_the_session(command: str) -> None:
    for variant in variants(FIT[command]):
        with contextlib.suppress(UsageError, ProtocolError):
            ask(FIT | {command: variant})
