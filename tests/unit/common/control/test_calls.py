# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: a Varlink service that clients share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path

import pytest
from asyncvarlink import VarlinkClientProtocol, connect_unix_varlink
from asyncvarlink.serviceinterface import VarlinkServiceInterface

from common.controlsocket import MAX_MESSAGE, ControlServer
from common.errors import UsageError
from common.remoted_interface import NoSuchDevice, Remoted
from common.version import package_version
from tests.support.controlbench import STATUS, Bench, call_of
from tests.support.fds import count_fds
from tests.support.loops import running


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


def test_parameters_may_be_null(bench: Bench) -> None:
    """As in what some clients send for a method that has none."""
    with bench.connect() as peer:
        peer.send(STATUS[:-2] + b', "parameters": null}\0')
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


def test_a_client_may_close_its_sending_side_and_still_read(bench: Bench) -> None:
    with bench.connect() as peer:
        peer.sock.sendall(STATUS * 3)
        peer.sock.shutdown(socket.SHUT_WR)
        for _ in range(3):
            assert "parameters" in peer.reply()
        peer.await_hang_up()


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
