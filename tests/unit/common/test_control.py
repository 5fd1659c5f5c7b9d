# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: a Varlink service that clients, honest and hostile, share."""

# No `from __future__ import annotations`: asyncvarlink reads the methods' types.
import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Self

import pytest
from asyncvarlink import VarlinkClientProtocol, VarlinkErrorReply, connect_unix_varlink, varlinkmethod
from asyncvarlink.serviceinterface import VarlinkServiceInterface

from common import disposal
from common.control import call
from common.controlsocket import MAX_MESSAGE, ControlServer
from common.errors import PeerGone, ProtocolError, UsageError
from common.loop import Loop
from common.polling import Polling
from common.remoted_interface import NoSuchDevice, Remoted, StatusReply
from common.remoted_interface import Polling as PollingStatus
from common.version import package_version
from remoted.control import RemotedService
from remoted.device import Host
from remoted.devices.irq_line import IrqLine
from remoted.iohub import IoHub
from remoted.memory import GuestMemory
from tests.support.fds import count_fds, no_fd_is_left, send_fds
from tests.support.loops import running
from tests.support.unsendable import returns_soon, unsendable_socket
from tests.support.wait import wait_until

STATUS = b'{"method": "org.iohub.Remoted.Status"}\0'
CROWD = 40
"""more connections than the service keeps"""


class Calls(Remoted):
    """The interface of a VM without devices, which remembers what was called."""

    def __init__(self) -> None:
        self.status = 0
        self.raised: list[str] = []
        self.vm = "vm1"

    @varlinkmethod
    def Status(self) -> StatusReply:
        self.status += 1
        polling = PollingStatus(window_us=0, found=0, missed=0, spent_ms=0)
        return {"vm": self.vm, "pid": os.getpid(), "polling": polling, "amiss": [], "functions": []}

    @varlinkmethod
    def Raise(self, *, device: str) -> None:
        self.raised.append(device)
        RemotedService(self.vm, (), Polling(lambda _timeout: [], time.monotonic, 0.0)).Raise(device=device)


class Bench:
    """A control server on a loop that the test steps, or runs in a thread."""

    def __init__(self, directory: Path) -> None:
        self.loop = Loop()
        self.calls = Calls()
        self.path = str(directory / "remoted.varlink")
        self.server = ControlServer(self.loop, self.path, lambda: self.calls, logging.getLogger("control"))

    def close(self) -> None:
        self.server.close()
        self.loop.close()

    def wait(self) -> None:
        """Steps the loop until something has happened; fails when nothing does."""
        stuck = self.loop.call_later(10, lambda: pytest.fail("nothing happens any more"))
        self.loop.step(None)
        stuck.cancel()

    def connect(self) -> "Peer":
        peer = Peer(self)
        self.loop.step()
        return peer


class Peer:
    """A client that speaks bytes; the test steps the loop."""

    def __init__(self, bench: Bench) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.connect(bench.path)
        self._bench = bench
        self._received = b""
        self._pending: list[dict[str, object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Sends it all, while the server reads."""
        while data:
            with contextlib.suppress(BlockingIOError):
                data = data[self.sock.send(data) :]
            self._bench.loop.step()

    def replies(self) -> list[dict[str, object]]:
        """The replies that are here."""
        with contextlib.suppress(BlockingIOError):
            while data := self.sock.recv(1 << 16):
                self._received += data
        *whole, self._received = self._received.split(b"\0")
        return [json.loads(reply) for reply in whole]

    def reply(self) -> dict[str, object]:
        """The next reply, for which the loop is stepped."""
        self._pending += self.replies()
        while not self._pending:
            assert not self.is_hung_up(), "the server hung up instead of replying"
            self._bench.wait()
            self._pending += self.replies()
        return self._pending.pop(0)

    def is_hung_up(self) -> bool:
        try:
            return self.sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def await_hang_up(self) -> None:
        while not self.is_hung_up():
            self._bench.wait()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with no_fd_is_left(), closing(Bench(tmp_path)) as bench:
        before = count_fds()
        with bench.connect() as first:  # the first call's answer comes later: see test_controlsocket.py
            first.send(STATUS)
            assert "parameters" in first.reply()

        def has_gone() -> bool:
            bench.loop.step()
            return count_fds() == before

        wait_until(has_gone, "nothing is left of the first client")
        bench.calls.status = 0
        yield bench


def call_of(method: str, **parameters: object) -> bytes:
    return json.dumps({"method": method, "parameters": parameters}).encode() + b"\0"


def test_another_implementation_finds_and_calls_the_interface(bench: Bench) -> None:
    async def use() -> None:
        transport, protocol = await connect_unix_varlink(VarlinkClientProtocol, bench.path)
        service = protocol.make_proxy(VarlinkServiceInterface)
        info = await service.GetInfo()
        assert info["interfaces"] == [Remoted.name, "org.varlink.service"]
        assert (info["product"], info["version"]) == ("control", package_version() or "unknown")
        described = await service.GetInterfaceDescription(interface=Remoted.name)
        assert f"interface {Remoted.name}\n" in described["description"]
        remoted = protocol.make_proxy(Remoted)
        status = await remoted.Status()
        assert (status["vm"], status["pid"], status["functions"]) == ("vm1", os.getpid(), [])
        with pytest.raises(NoSuchDevice) as error:
            await remoted.Raise(device="nope")
        assert error.value.parameters == {"device": "nope"}
        transport.close()

    with running(bench.loop):
        asyncio.run(use())


def test_call_makes_calls(bench: Bench) -> None:
    with running(bench.loop):
        assert call(bench.path, f"{Remoted.name}.Status")["vm"] == "vm1"
        with pytest.raises(VarlinkErrorReply):
            call(bench.path, f"{Remoted.name}.Raise", device="nope")
    assert bench.calls.raised == ["nope"]


def test_call_to_nobody_names_the_path_and_keeps_the_cause(tmp_path: Path) -> None:
    with pytest.raises(PeerGone, match=r"none\.varlink: No such file") as error:
        call(tmp_path / "none.varlink", f"{Remoted.name}.Status")
    assert isinstance(error.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("answer", [b"junk\0", b"5\0", b"[]\0", b"[" * 50_000 + b"\0"])
def test_an_answer_that_is_no_reply_is_an_error(tmp_path: Path, answer: bytes) -> None:
    path = str(tmp_path / "fake")
    loop = Loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def on_connect(_events: int) -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(answer)

        loop.add(listener.fileno(), on_connect)
        with running(loop), pytest.raises(ProtocolError, match="not a reply to"):
            call(path, f"{Remoted.name}.Status")
        loop.close()


def test_a_daemon_that_hangs_up_is_gone(tmp_path: Path) -> None:
    path = str(tmp_path / "fake")
    loop = Loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        loop.add(listener.fileno(), lambda _events: listener.accept()[0].close())
        with running(loop), pytest.raises(PeerGone, match="fake: "):
            call(path, f"{Remoted.name}.Status")
        loop.close()


def test_calls_that_arrive_together_are_all_answered_in_order(bench: Bench) -> None:
    with bench.connect() as peer:
        peer.send(STATUS + call_of("org.iohub.Remoted.Raise", device="a") + STATUS)
        replies = [peer.reply() for _ in range(3)]
    assert ["error" in reply for reply in replies] == [False, True, False]


def test_a_call_may_arrive_byte_by_byte(bench: Bench) -> None:
    with bench.connect() as peer:
        for byte in STATUS:
            assert peer.replies() == []
            peer.send(bytes([byte]))
        assert "parameters" in peer.reply()


def test_a_half_message_holds_up_nobody_else(bench: Bench) -> None:
    with bench.connect() as slow, bench.connect() as quick:
        slow.send(STATUS[:-5])
        quick.send(STATUS)
        assert "parameters" in quick.reply()
        assert slow.replies() == []
        slow.send(STATUS[-5:])
        assert "parameters" in slow.reply()


def test_the_longest_message_is_answered(bench: Bench) -> None:
    with bench.connect() as peer:
        peer.send(STATUS[:-1].ljust(MAX_MESSAGE) + b"\0")
        assert "parameters" in peer.reply()
        peer.send(STATUS[:-1].ljust(MAX_MESSAGE))
        peer.send(b"\0" + STATUS)
        for _ in range(2):
            assert "parameters" in peer.reply()


def nested(levels: int) -> bytes:
    """A call of Raise with so many levels of objects and arrays."""
    device = "[" * (levels - 2) + "]" * (levels - 2)
    return b'{"method": "org.iohub.Remoted.Raise", "parameters": {"device": %s}}\0' % device.encode()


HOSTILE = {
    "no JSON": b"hello\0",
    "empty": b"\0",
    "no UTF-8": b'{"method": "\xff"}\0',
    "byte order mark": b"\xef\xbb\xbf" + STATUS,
    "array": b"[]\0",
    "number": b"17\0",
    "null": b"null\0",
    "no method": b"{}\0",
    "method is a number": b'{"method": 5}\0',
    "method is null": b'{"method": null}\0',
    "parameters are an array": b'{"method": "org.iohub.Remoted.Status", "parameters": []}\0',
    "parameters are a number": b'{"method": "org.iohub.Remoted.Status", "parameters": 7}\0',
    "nested deeply": b'{"method": ' + b"[" * 4_000 + b"\0",
    "nested deeply and whole": b"[" * 2_000 + b"]" * 2_000 + b"\0",
    "no interface": call_of("Status"),
    "no method name": call_of("org.iohub.Remoted.__init__"),
    "one-way is a number": b'{"method": "org.iohub.Remoted.Status", "oneway": 1}\0',
    "an endless number": b'{"method": "org.iohub.Remoted.Status", "more": ' + b"9" * 4_500 + b"}\0",
    "too long": STATUS[:-1].ljust(MAX_MESSAGE + 1),
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_call_costs_its_sender_the_connection(
    bench: Bench, caplog: pytest.LogCaptureFixture, message: bytes
) -> None:
    with bench.connect() as honest, bench.connect() as hostile:
        hostile.sock.setblocking(True)
        hostile.sock.sendall(message)
        hostile.sock.setblocking(False)
        hostile.await_hang_up()
        (record,) = caplog.records
        assert "\n" not in record.getMessage()
        assert str(os.getpid()) in str(getattr(record, "peer", ""))
        honest.send(STATUS)
        assert "parameters" in honest.reply()


WRONG_CALLS = {
    "method": (call_of("org.iohub.Remoted.Destroy"), "org.varlink.service.MethodNotFound"),
    "error as method": (call_of("org.iohub.Remoted.NoSuchDevice"), "org.varlink.service.MethodNotFound"),
    "interface": (call_of("org.iohub.Other.Status"), "org.varlink.service.InterfaceNotFound"),
    "unknown parameter": (call_of("org.iohub.Remoted.Status", x=1), "org.varlink.service.InvalidParameter"),
    "missing parameter": (call_of("org.iohub.Remoted.Raise"), "org.varlink.service.InvalidParameter"),
    "wrong type": (call_of("org.iohub.Remoted.Raise", device=[1]), "org.varlink.service.InvalidParameter"),
    "nested": (nested(500), "org.varlink.service.InvalidParameter"),
    "name": (call_of("org.iohub.Remoted.Raise", name="x"), "org.varlink.service.InvalidParameter"),
    "attribute": (call_of("org.iohub.Remoted.Name"), "org.varlink.service.MethodNotFound"),
}


@pytest.mark.parametrize(("message", "error"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_a_wrong_call_gets_varlinks_error_and_the_connection_stays(
    bench: Bench, message: bytes, error: str
) -> None:
    with bench.connect() as peer:
        peer.send(message)
        assert peer.reply()["error"] == error
        peer.send(STATUS)
        assert "parameters" in peer.reply()


def test_a_one_way_call_has_no_reply_be_it_an_error(bench: Bench) -> None:
    one_way = b'{"method": "org.iohub.Remoted.%s", "oneway": true%s}\0'
    with bench.connect() as peer:
        peer.send(one_way % (b"Status", b""))
        peer.send(one_way % (b"Raise", b', "parameters": {"device": "x"}'))
        peer.send(STATUS)
        assert "parameters" in peer.reply()
        bench.loop.step()
        assert peer.replies() == []
    assert bench.calls.raised == ["x"]
    assert bench.calls.status == 2


def test_a_call_nested_as_deep_as_its_length_allows_ends_nothing_but_its_connection(bench: Bench) -> None:
    """How deep JSON may be differs among the versions of Python."""
    with bench.connect() as honest, bench.connect() as hostile:
        hostile.sock.sendall(nested(MAX_MESSAGE // 2 - 50))
        while not hostile.is_hung_up() and not hostile.replies():
            bench.loop.step()
        honest.send(STATUS)
        assert "parameters" in honest.reply()


def test_one_call_is_answered_in_each_pass_whoever_calls(bench: Bench) -> None:
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(bench.connect()) for _ in range(8)]
        for peer in peers:
            peer.sock.sendall(STATUS * 5)
        passes = 0
        while bench.calls.status < 40:
            before = bench.calls.status
            bench.loop.step()
            assert bench.calls.status <= before + 1
            passes += 1
        assert passes <= 40 + 3 * len(peers), "passes without an answer are few, on a busy machine as well"
        for peer in peers:
            assert [("parameters" in peer.reply()) for _ in range(5)] == [True] * 5


def test_a_client_that_has_gone_is_still_obeyed(bench: Bench) -> None:
    """As `varlinkctl --oneway call` does it."""
    with contextlib.ExitStack() as stack:
        for device in ("a", "b", "c"):
            peer = stack.enter_context(bench.connect())
            peer.sock.sendall(
                b'{"method": "org.iohub.Remoted.Raise", "oneway": true, "parameters": {"device": "%s"}}\0'
                % device.encode()
            )
            peer.sock.close()
        for _ in range(8):
            bench.loop.step()
    assert bench.calls.raised == ["a", "b", "c"]


DISHONEST = {
    "endless": (b"x" * (1 << 16), "a reply of more than"),
    "one byte at a time": (b"x", "no answer within"),
}


@pytest.mark.parametrize(("piece", "line"), DISHONEST.values(), ids=DISHONEST)
def test_a_reply_without_an_end_is_waited_for_no_longer_than_a_call_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: bytes, line: str
) -> None:
    if len(piece) == 1:
        monkeypatch.setattr("common.control._CALL_SECONDS", 0.3)
    loop = Loop()
    with contextlib.ExitStack() as stack, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "fake"))
        listener.listen()

        def on_connect(_events: int) -> None:
            send(stack.enter_context(listener.accept()[0]))

        def send(sock: socket.socket) -> None:
            with contextlib.suppress(OSError):
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.send(piece)
                loop.call_later(0.01 if len(piece) == 1 else 0, lambda: send(sock))

        loop.add(listener.fileno(), on_connect)
        started = time.monotonic()
        with running(loop), pytest.raises((ProtocolError, PeerGone), match=f"fake: {line}"):
            call(tmp_path / "fake", "org.iohub.Remoted.Status")
        assert time.monotonic() - started < 4
        loop.close()


def test_a_client_that_does_not_read_is_not_read_from(bench: Bench) -> None:
    with bench.connect() as deaf, bench.connect() as honest:
        sent = 0
        while True:
            try:
                sent += deaf.sock.send(STATUS * 100)
            except BlockingIOError:
                # Its socket is full: only if the server takes no more it stays so.
                handled = bench.calls.status
                bench.loop.step()
                bench.loop.step()
                if bench.calls.status == handled:
                    break
            bench.loop.step()
        honest.send(STATUS)
        assert "parameters" in honest.reply()
        replies = 0
        calls = sent // len(STATUS)
        assert bench.calls.status - 1 < calls
        while replies < calls:
            replies += len(deaf.replies())
            bench.loop.step()
        assert bench.calls.status == calls + 1


def test_one_reply_at_most_waits_for_a_slow_reader(bench: Bench) -> None:
    calls = 8
    bench.calls.vm = "x" * (1 << 20)  # more than the socket holds
    with bench.connect() as slow:
        slow.send(STATUS * calls)
        slow.sock.shutdown(socket.SHUT_WR)
        received = 0
        while received < calls * len(bench.calls.vm):
            assert bench.calls.status <= received // len(bench.calls.vm) + 2
            with contextlib.suppress(
                BlockingIOError
            ):  # a busy machine may need another pass for the next part
                received += len(slow.sock.recv(1 << 12))
            bench.loop.step()


def test_a_flood_costs_others_one_message_each_time(bench: Bench) -> None:
    with bench.connect() as flood, bench.connect() as honest:
        flood.sock.sendall(STATUS * 1000)
        honest.sock.sendall(STATUS)
        replies: list[dict[str, object]] = []
        while not replies:
            bench.loop.step()
            replies = honest.replies()
            assert bench.calls.status <= 4


def test_idle_connections_make_room_for_new_ones(bench: Bench) -> None:
    with contextlib.ExitStack() as stack, bench.connect() as regular:
        idle: list[Peer] = []
        for _ in range(CROWD):
            idle.append(stack.enter_context(bench.connect()))
            assert not idle[-1].is_hung_up()
            regular.send(STATUS)
            assert "parameters" in regular.reply()
        hung_up = [peer.is_hung_up() for peer in idle]
        assert True in hung_up
        assert hung_up == sorted(hung_up, reverse=True), "the longest idle goes first"


def test_hanging_up_in_the_middle_leaves_nothing(bench: Bench) -> None:
    before = count_fds()
    for rest in (0, 5, len(STATUS)):
        with bench.connect() as peer:
            peer.send(STATUS + STATUS[:rest])
        while count_fds() > before:
            bench.wait()


def test_a_client_may_close_its_sending_side_and_still_read(bench: Bench) -> None:
    with bench.connect() as peer:
        peer.sock.sendall(STATUS * 3)
        peer.sock.shutdown(socket.SHUT_WR)
        for _ in range(3):
            assert "parameters" in peer.reply()
        peer.await_hang_up()


@pytest.fixture
def older_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has no SO_PASSRIGHTS, so that fds come in."""
    monkeypatch.setattr(disposal, "_SO_PASSRIGHTS", 0x7FFF)


@pytest.mark.usefixtures("older_kernel")
def test_fds_that_somebody_sends_do_not_stay(bench: Bench) -> None:
    with bench.connect() as peer:
        before = count_fds()
        socket.send_fds(peer.sock, [STATUS], [peer.sock.fileno()] * 3)
        assert "parameters" in peer.reply()
        wait_until(lambda: count_fds() == before, "all fds are closed")


@pytest.mark.usefixtures("older_kernel")
def test_the_close_of_fds_that_somebody_sends_holds_up_nobody(bench: Bench) -> None:
    """Of those that are read, that come as urgent data, and that lie unread when their sender is hung up on."""
    with contextlib.ExitStack() as stack:
        for flags, data in ((0, STATUS), (socket.MSG_OOB, STATUS[:1]), (0, b"junk\0" + STATUS)):
            peer = stack.enter_context(bench.connect())
            sock = stack.enter_context(unsendable_socket())
            send_fds(peer.sock, data, [sock.fileno()], flags)
            send_fds(peer.sock, STATUS, [sock.fileno()])
            sock.close()
            for _ in range(5):
                assert returns_soon(bench.loop.step)
        other = stack.enter_context(bench.connect())
        other.send(STATUS)
        assert "parameters" in other.reply()


def test_hostile_clients_cannot_fill_the_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(CROWD):
        with bench.connect() as peer:
            peer.sock.sendall(b"junk\0")
            peer.await_hang_up()
    assert 0 < len(caplog.records) < CROWD


def test_close_hangs_up_and_removes_the_socket(tmp_path: Path) -> None:
    before = count_fds()
    bench = Bench(tmp_path)
    with bench.connect() as peer:
        peer.send(STATUS[:7])
        bench.close()
        assert peer.is_hung_up()
    assert not list(tmp_path.iterdir())
    assert count_fds() == before


def test_a_second_daemon_is_refused_the_socket(bench: Bench) -> None:
    complaint = (
        rf"\[{os.getpid()}\] runs in {os.path.dirname(bench.path)} already: "
        r"stop it, or choose another --runtime-dir$"
    )
    with pytest.raises(UsageError, match=complaint):
        ControlServer(bench.loop, bench.path, lambda: bench.calls, logging.getLogger("second"))


def test_the_socket_is_private(bench: Bench) -> None:
    assert os.stat(bench.path).st_mode & 0o077 == 0


def test_irq_line_has_no_bars_and_starts_low() -> None:
    loop = Loop()
    pirq = IoHub(loop).pirqs[40]
    function = IrqLine(Host("l", loop, logging.getLogger("l"), GuestMemory(), pirq.set_irq), {})
    function.full_reset()
    for offset in range(0x10, 0x28, 4):
        function.config_write(offset, 4, 0xFFFFFFFF)
        assert function.config_read(offset, 4) == 0
    assert function.config_read(0x3D, 1) == 1
    function.set_intx(True)
    assert pirq.level == 1
    function.full_reset()
    assert pirq.level == 0
    loop.close()
