# SPDX-License-Identifier: GPL-2.0-or-later
"""What another thread tells clients of the control socket while the loop is busy."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.controlbench import STATUS, Bench
from tests.support.fds import no_fd_is_left
from tests.support.listenbench import STRANGER, as_user, connect
from tests.support.unsendable import returns_soon

REFUSAL = b'{"error": "busy"}\0'


@pytest.fixture
def bench() -> Iterator[Bench]:
    """In a directory that all users can reach. Its loop takes no client."""
    with tempfile.TemporaryDirectory() as directory, no_fd_is_left():
        os.chmod(directory, 0o755)
        with closing(Bench(Path(directory))) as bench:
            yield bench


def caller(bench: Bench, call: bytes = STATUS) -> socket.socket:
    sock = connect(bench.path)
    sock.sendall(call)
    sock.settimeout(20)
    return sock


def refuse(bench: Bench) -> None:
    bench.server.refuse(lambda: REFUSAL)


def test_who_waits_is_answered_and_hung_up(bench: Bench) -> None:
    with caller(bench) as one, caller(bench) as two:
        refuse(bench)
        for sock in (one, two):
            assert sock.recv(100) == REFUSAL
            assert sock.recv(100) == b""
    refuse(bench)


def test_who_says_nothing_or_has_gone_keeps_nobody_waiting(bench: Bench) -> None:
    connect(bench.path).close()
    with connect(bench.path), caller(bench) as other:
        assert returns_soon(lambda: refuse(bench))
        assert other.recv(100) == REFUSAL


def test_who_is_not_trusted_is_not_answered_and_keeps_nobody_waiting(bench: Bench) -> None:
    os.chmod(bench.path, 0o666)
    with as_user(STRANGER):
        stranger = connect(bench.path)
    with stranger, caller(bench) as other:
        refuse(bench)
        assert other.recv(100) == REFUSAL
        assert stranger.recv(100) == b""
