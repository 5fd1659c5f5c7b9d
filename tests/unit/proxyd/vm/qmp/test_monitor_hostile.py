# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever a monitor says, and whenever it says it, costs its connection at most."""

from __future__ import annotations

import contextlib
import gc
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.errors import PeerGone
from proxyd.vm.qmp.monitor import CommandError, Monitor
from tests.support.fds import no_fd_is_left
from tests.support.monitorpeer import GREETING, Peer, answer, receive, send

WORDS = {
    "nothing": b"",
    "an empty line": b"\r\n",
    "text": b"SSH-2.0-OpenSSH\r\n",
    "half a message": b'{"QMP": {"ver',
    "a list": b"[]\r\n",
    "a string": b'"x"\r\n',
    "a number": b"5\r\n",
    "an empty object": b"{}\r\n",
    "not UTF-8": b"\xff\xfe\r\n",
    "UTF-16": '{"QMP": {}}\r\n'.encode("utf-16"),
    "zeros": bytes(1000) + b"\n",
    "too deep for a parser": b"[" * 100_000 + b"\r\n",
    "too long a line": b" " * (2 << 20),
    "too long a number": b'{"return": ' + b"9" * 5000 + b"}\r\n",
    "too large a number": b'{"return": 1e999999, "id": 1e999999}\r\n',
    "an error without content": b'{"error": {}}\r\n',
    "an error of nothing": b'{"error": null, "id": null}\r\n',
    "an event of another kind": b'{"event": 5, "data": []}\r\n{"event": {"x": []}}\r\n{"error"\r\n',
    "an id that is no key": b'{"return": {}, "id": []}\r\n{"return": {}, "id": {}}\r\n',
    "a greeting of nothing": b'{"QMP": null}\r\n',
    "a greeting without version": b'{"QMP": {"capabilities": []}}\r\n',
    "capabilities that are a string": b'{"QMP": {"version": {}, "capabilities": "oob"}}\r\n',
    "keys given twice": b'{"return": {}, "return": [], "error": 5, "id": 1, "id": []}\r\n',
}
"""what is said, and then the connection is closed"""


def hasty(words: bytes) -> Callable[[socket.socket], None]:
    def say(sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            sock.sendall(words)

    return say


def say_first(sock: socket.socket, words: bytes) -> None:
    hasty(words)(sock)


def say_instead_of_capabilities(sock: socket.socket, words: bytes) -> None:
    send(sock, GREETING)
    receive(sock)
    hasty(words)(sock)


def say_with_capabilities(sock: socket.socket, words: bytes) -> None:
    """In one piece, so that the connection is at its end before it has begun."""
    send(sock, GREETING)
    receive(sock)
    hasty(b'{"return": {}}\r\n' + words)(sock)


def say_instead_of_an_answer(sock: socket.socket, words: bytes) -> None:
    send(sock, GREETING)
    answer(sock, {})
    with contextlib.suppress(ConnectionError):
        if sock.recv(4096):
            hasty(words)(sock)


STAGES = (say_first, say_instead_of_capabilities, say_with_capabilities, say_instead_of_an_answer)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path / "qmp")
    with no_fd_is_left():
        yield peer
    peer.close()


async def ask(monitor: Monitor) -> None:
    await monitor.execute("query-kvm")


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("stage", STAGES)
def test_nonsense_costs_the_connection(
    peer: Peer,
    caplog: pytest.LogCaptureFixture,
    stage: Callable[[socket.socket, bytes], None],
    words: bytes,
) -> None:
    def serve() -> None:
        with peer.listener.accept()[0] as sock:
            sock.settimeout(20.0)
            stage(sock, words)

    with pytest.raises(PeerGone) as caught:
        peer.run_raw(serve, ask)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    del caught
    gc.collect()
    assert caplog.records == [], "asyncio has found an exception that nobody asked for"


@pytest.mark.parametrize("stage", STAGES)
def test_a_message_that_can_be_parsed_and_not_be_printed(
    peer: Peer, stage: Callable[[socket.socket, bytes], None]
) -> None:
    """Where the one becomes too deep isn't where the other does, and depends on Python."""
    for depth in (*range(700, 1000, 10), 5_000, 50_000):
        words = b'{"event": ' + b"[" * depth + b"]" * depth + b"}\r\n"

        def serve(words: bytes = words) -> None:
            with peer.listener.accept()[0] as sock:
                sock.settimeout(20.0)
                stage(sock, words)

        with pytest.raises(PeerGone):
            peer.run_raw(serve, ask)


def test_the_second_answer_to_a_command_ends_the_connection(peer: Peer) -> None:
    def say(sock: socket.socket) -> None:
        command, _ = receive(sock)
        send(sock, *[{"return": {}, "id": command["id"]}] * 3)
        assert sock.recv(1) == b"", "it is still there"

    async def talk(monitor: Monitor) -> None:
        await monitor.execute("query-kvm")
        with pytest.raises(PeerGone, match="two answers to one command"):
            await monitor.wait_closed()

    peer.run(say, talk)


def test_says_what_ended_the_connection(peer: Peer) -> None:
    ends = {
        b"": "query-kvm: QEMU has closed its monitor",
        b"[]\r\n": ("query-kvm: QEMU's monitor sent an invalid message: UnexpectedTypeError in a message"),
    }
    for words, end in ends.items():

        def say(sock: socket.socket, words: bytes = words) -> None:
            receive(sock)
            sock.sendall(words)

        async def talk(monitor: Monitor, end: str = end) -> None:
            with pytest.raises(PeerGone) as caught:
                await monitor.execute("query-kvm")
            assert str(caught.value) == end

        peer.run(say, talk)


def test_an_error_may_be_as_long_as_a_message(peer: Peer) -> None:
    def say(sock: socket.socket) -> None:
        command, _ = receive(sock)
        error = {"class": "x" * 100_000, "desc": "y\n" * 100_000}
        sock.sendall(json.dumps({"error": error, "id": command["id"]}).encode() + b"\r\n")

    async def talk(monitor: Monitor) -> None:
        with pytest.raises(CommandError, match=r"^y"):
            await monitor.execute("query-kvm")

    peer.run(say, talk)
