# SPDX-License-Identifier: GPL-2.0-or-later
"""The caller's side of a call."""

from __future__ import annotations

import contextlib
import socket
import time
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


@pytest.mark.parametrize(
    ("is_read", "line"), [(True, "it closed the connection without an answer"), (False, "Connection reset")]
)
def test_a_daemon_that_hangs_up_is_gone(tmp_path: Path, is_read: bool, line: str) -> None:
    path = str(tmp_path / "fake")
    loop = Loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def on_connect(_events: int) -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096 if is_read else 1)

        loop.add(listener.fileno(), on_connect)
        with running(loop), pytest.raises(PeerGone, match=f"fake: {line}"):
            call(path, f"{Remoted.name}.Status")
        loop.close()


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
