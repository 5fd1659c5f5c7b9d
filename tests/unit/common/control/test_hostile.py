# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket, and clients that are hostile, slow or wrong."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from common.controlsocket import MAX_MESSAGE
from tests.support.controlbench import STATUS, Bench, Peer, call_of
from tests.support.fds import count_fds, send_fds
from tests.support.unsendable import returns_soon, unsendable_socket
from tests.support.wait import wait_until

CROWD = 40
"""more connections than the service keeps"""


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


def test_a_call_nested_as_deep_as_its_length_allows_ends_nothing_but_its_connection(bench: Bench) -> None:
    """How deep JSON may be differs among the versions of Python."""
    with bench.connect() as honest, bench.connect() as hostile:
        hostile.sock.sendall(nested(MAX_MESSAGE // 2 - 50))
        while not hostile.is_hung_up() and not hostile.replies():
            bench.loop.step()
        honest.send(STATUS)
        assert "parameters" in honest.reply()


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
            # A busy machine may need another pass for the next part.
            with contextlib.suppress(BlockingIOError):
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
