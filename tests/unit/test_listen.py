# SPDX-License-Identifier: GPL-2.0-or-later
"""Listening sockets by path: whom they replace, and whom not."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import UsageError
from common.listen import UnixListener
from tests.support.fds import count_fds, no_more_fds


@pytest.fixture(autouse=True)
def no_fd_stays_open() -> Iterator[None]:
    before = count_fds()
    yield
    assert count_fds() == before


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "edu0.sock")


def dead_socket(path: str) -> None:
    """What a daemon leaves behind when it is killed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()


def test_clients_are_taken_one_after_another(path: str) -> None:
    listener = UnixListener(path)
    assert listener.accept() is None
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        one.connect(path)
        two.connect(path)
        for client in (one, two):
            server = listener.accept()
            assert server is not None
            with server:
                client.send(b"x")
                assert server.recv(1) == b"x"
                assert not os.get_inheritable(server.fileno())
        assert listener.accept() is None
    listener.close()


def test_socket_is_private_whatever_the_umask(path: str) -> None:
    before = os.umask(0)
    try:
        listener = UnixListener(path)
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    listener.close()


def test_close_unlinks_the_path_once(path: str) -> None:
    listener = UnixListener(path)
    listener.close()
    assert not os.path.exists(path)
    other = UnixListener(path)
    listener.close()
    assert os.path.exists(path)
    other.close()


def test_close_leaves_a_path_that_somebody_else_has_bound_since(path: str) -> None:
    listener = UnixListener(path)
    os.unlink(path)
    other = UnixListener(path)
    listener.close()
    assert os.path.exists(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    other.close()
    assert not os.path.exists(path)


def test_close_when_the_path_has_gone(path: str) -> None:
    listener = UnixListener(path)
    os.unlink(path)
    listener.close()


def test_stale_socket_is_taken_over(path: str) -> None:
    dead_socket(path)
    listener = UnixListener(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    listener.close()


def test_live_socket_is_refused_and_lives_on(path: str) -> None:
    live = UnixListener(path)
    with pytest.raises(UsageError, match=r"edu0\.sock is in use by a live daemon$"):
        UnixListener(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    live.close()


def test_live_socket_with_a_full_queue_is_refused(path: str) -> None:
    live = UnixListener(path)
    clients = []
    while True:
        clients.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        if clients[-1].connect_ex(path):
            break
    with pytest.raises(UsageError, match="in use by a live daemon"):
        UnixListener(path)
    for client in clients:
        client.close()
    live.close()


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "dangling link", "link to a dead socket"])
def test_what_is_no_socket_is_left_alone(path: str, kind: str) -> None:
    if kind == "file":
        Path(path).write_text("precious")
    elif kind == "directory":
        os.mkdir(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling link":
        os.symlink("nowhere", path)
    else:
        dead_socket(path + ".dead")
        os.symlink(path + ".dead", path)
    before = os.lstat(path)
    with pytest.raises(UsageError, match=r"edu0\.sock exists and is no socket$"):
        UnixListener(path)
    assert os.lstat(path).st_ino == before.st_ino


@pytest.mark.parametrize(
    ("tail", "complaint"),
    [
        ("/missing/edu0.sock", "No such file or directory"),
        ("/" + "x" * 200, "path too long"),
        ("/a\0b", "NUL"),
    ],
    ids=["no directory", "too long", "NUL"],
)
def test_path_that_cant_be_bound(tmp_path: Path, tail: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        UnixListener(str(tmp_path) + tail)
    assert os.listdir(tmp_path) == []


def test_accept_without_an_fd_left_keeps_the_client_waiting(path: str) -> None:
    listener = UnixListener(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        with no_more_fds(), pytest.raises(OSError, match="Too many open files"):
            listener.accept()
        server = listener.accept()
        assert server is not None
        server.close()
    listener.close()
