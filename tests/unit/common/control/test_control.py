# SPDX-License-Identifier: GPL-2.0-or-later
"""The caller's side of a call."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from asyncvarlink import VarlinkErrorReply

from common.control import call
from common.errors import PeerGone, ProtocolError
from common.loop import Loop
from common.remoted_interface import Remoted
from tests.support.controlbench import Bench
from tests.support.loops import running


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


class FakeDaemon:
    """What listens where a daemon would, and what it does with a client."""

    def __init__(self, directory: Path, serve: Callable[[Loop, socket.socket], None]) -> None:
        self._path = directory / "fake"
        self._loop = Loop()
        self._serve = serve
        self._stack = contextlib.ExitStack()
        self._listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._loop.add(self._listener.fileno(), self._on_connect)

    def call(self) -> None:
        """Raises what a call to it raises."""
        with self._stack, closing(self._loop), running(self._loop):
            call(self._path, f"{Remoted.name}.Status")

    def _on_connect(self, _events: int) -> None:
        self._serve(self._loop, self._stack.enter_context(self._listener.accept()[0]))


@pytest.mark.parametrize("answer", [b"junk\0", b"5\0", b"[]\0", b"[" * 50_000 + b"\0"])
def test_an_answer_that_is_no_reply_is_an_error(tmp_path: Path, answer: bytes) -> None:
    def serve(_loop: Loop, sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(answer)

    with pytest.raises(ProtocolError, match="not a reply to"):
        FakeDaemon(tmp_path, serve).call()


@pytest.mark.parametrize(
    ("size", "line"), [(4096, "it closed the connection without an answer"), (1, "Connection reset")]
)
def test_a_daemon_that_hangs_up_is_gone(tmp_path: Path, size: int, line: str) -> None:
    """After the whole call, or a part of it, was read."""

    def serve(_loop: Loop, sock: socket.socket) -> None:
        sock.recv(size)
        sock.close()

    with pytest.raises(PeerGone, match=f"fake: {line}"):
        FakeDaemon(tmp_path, serve).call()


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

    def serve(loop: Loop, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.send(piece)
            loop.call_later(0.01 if len(piece) == 1 else 0, lambda: serve(loop, sock))

    started = time.monotonic()
    with pytest.raises((ProtocolError, PeerGone), match=f"fake: {line}"):
        FakeDaemon(tmp_path, serve).call()
    assert time.monotonic() - started < 4
