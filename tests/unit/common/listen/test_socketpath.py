# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets at a path: whom they replace and whom not, and who can reach them."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from common.disposal import Disposal
from common.errors import UntrustedError, UsageError
from common.journal import RateLimited
from common.listen import UnixListener
from common.peer import is_dying
from common.socketpath import lock_path
from common.trust import Trust
from tests.support.listenbench import STRANGER, ListenBench, as_user, connect, own_name
from tests.support.steploop import run_ready
from tests.support.wait import wait_until


def test_socket_is_private_whatever_the_umask(bench: ListenBench, path: str) -> None:
    before = os.umask(0)
    try:
        listener = bench.listen(path)
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    listener.close()


def test_a_lock_that_a_dying_process_holds_locks_nothing(bench: ListenBench, path: str) -> None:
    lock = os.path.join(os.path.dirname(path), ".edu0.sock.lock")
    dying = subprocess.Popen(["true"])
    wait_until(lambda: is_dying(dying.pid), "it is a zombie")
    with open(lock, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{os.getpid()}")
        file.flush()
        with pytest.raises(UsageError, match="is being taken by another daemon"):
            bench.listen(path)
        file.seek(0)
        file.truncate()
        file.write(f"{dying.pid}")
        file.flush()
        bench.listen(path).close()
    dying.wait()
    assert os.listdir(os.path.dirname(path)) == []


def test_close_unlinks_the_path_once(bench: ListenBench, path: str) -> None:
    listener = bench.listen(path)
    listener.close()
    assert not os.path.exists(path)
    other = bench.listen(path)
    listener.close()
    assert os.path.exists(path)
    other.close()


def test_close_leaves_a_path_that_somebody_else_has_bound_since(bench: ListenBench, path: str) -> None:
    listener = bench.listen(path)
    os.unlink(path)
    other = bench.listen(path)
    listener.close()
    assert os.path.exists(path)
    connect(path).close()
    other.close()
    assert not os.path.exists(path)


def test_close_when_the_path_has_gone(bench: ListenBench, path: str) -> None:
    listener = bench.listen(path)
    os.unlink(path)
    listener.close()


def test_stale_socket_is_taken_over(bench: ListenBench, path: str) -> None:
    dead_socket(path)
    listener = bench.listen(path)
    connect(path).close()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    listener.close()


def dead_socket(path: str) -> None:
    """What a daemon leaves behind when it is killed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()


def is_beaten(bench: ListenBench, path: str) -> bool:
    """Whether another daemon that starts at this moment is refused, with one clear line."""
    try:
        bench.listen(path)
    except UsageError as error:
        assert str(error) in (
            f"socket {path} is being taken by another daemon",
            f"socket {path} is in use by {own_name()}",
        )
        return True
    return False


@pytest.mark.parametrize("is_stale", [True, False])
def test_of_two_daemons_at_once_one_has_the_socket(
    bench: ListenBench, path: str, monkeypatch: pytest.MonkeyPatch, is_stale: bool
) -> None:
    """The other one starts at each step: before the stale socket goes, and before the new one listens."""
    if is_stale:
        dead_socket(path)
    beaten = []
    unlink, listen = os.unlink, socket.socket.listen

    def meanwhile_unlink(victim: str) -> None:
        if victim == path:
            with monkeypatch.context() as patch:
                patch.setattr(os, "unlink", unlink)
                beaten.append(is_beaten(bench, path))
        unlink(victim)

    def meanwhile_listen(sock: socket.socket, backlog: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "listen", listen)
            patch.setattr(os, "unlink", unlink)
            beaten.append(is_beaten(bench, path))
        listen(sock, backlog)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", meanwhile_unlink)
        patch.setattr(socket.socket, "listen", meanwhile_listen)
        listener = bench.listen(path)
    assert beaten == [True] * (1 + is_stale)
    with connect(path):
        run_ready(bench.loop)
        assert len(bench.clients) == 1
    listener.close()
    assert os.listdir(os.path.dirname(path)) == []


def test_a_lock_whose_file_has_gone_locks_nothing(
    bench: ListenBench, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another daemon removes the lock file between open() and flock(): the lock must be taken anew."""
    flock, listen = fcntl.flock, socket.socket.listen
    beaten = []
    lock = os.path.join(os.path.dirname(path), ".edu0.sock.lock")

    def late(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        os.unlink(lock)
        flock(fd, operation)

    def meanwhile_listen(sock: socket.socket, backlog: int) -> None:
        monkeypatch.setattr(socket.socket, "listen", listen)
        beaten.append(is_beaten(bench, path))
        listen(sock, backlog)

    monkeypatch.setattr(fcntl, "flock", late)
    monkeypatch.setattr(socket.socket, "listen", meanwhile_listen)
    listener = bench.listen(path)
    assert beaten == [True]
    listener.close()
    assert os.listdir(os.path.dirname(path)) == []


def test_a_lock_file_that_somebody_removes_meanwhile_is_no_error(
    bench: ListenBench, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen = socket.socket.listen

    def meanwhile_listen(sock: socket.socket, backlog: int) -> None:
        os.unlink(os.path.join(os.path.dirname(path), ".edu0.sock.lock"))
        listen(sock, backlog)

    monkeypatch.setattr(socket.socket, "listen", meanwhile_listen)
    listener = bench.listen(path)
    connect(path).close()
    listener.close()


def test_lock_file_that_a_killed_daemon_left_is_no_obstacle(bench: ListenBench, path: str) -> None:
    Path(os.path.dirname(path), ".edu0.sock.lock").touch()
    bench.listen(path).close()
    assert os.listdir(os.path.dirname(path)) == []


def test_live_socket_is_refused_and_lives_on(bench: ListenBench, path: str) -> None:
    live = bench.listen(path)
    with pytest.raises(UsageError) as raised:
        bench.listen(path)
    assert str(raised.value) == f"socket {path} is in use by {own_name()}"
    assert f"[{os.getpid()}]" in own_name()
    connect(path).close()
    live.close()


def test_live_socket_with_a_full_queue_is_refused(bench: ListenBench, path: str) -> None:
    live = bench.listen(path)
    clients = []
    while True:
        clients.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        if clients[-1].connect_ex(path):
            break
    with pytest.raises(UsageError, match="in use by a live daemon"):
        bench.listen(path)
    pid_file = Path(path).with_name(".edu0.sock.pid")
    pid_file.unlink()
    os.mkfifo(pid_file)
    with pytest.raises(UsageError, match="in use by a live daemon"):  # and waits for nobody who writes to it
        bench.listen(path)
    for client in clients:
        client.close()
    live.close()


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "dangling link", "link to a dead socket"])
def test_what_is_no_socket_is_left_alone(bench: ListenBench, path: str, kind: str) -> None:
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
    with pytest.raises(UsageError, match=r"edu0\.sock exists and is not a socket$"):
        bench.listen(path)
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
def test_path_that_cant_be_bound(bench: ListenBench, tmp_path: Path, tail: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        bench.listen(str(tmp_path) + tail)
    assert os.listdir(tmp_path) == []


def test_users_that_are_listed_can_connect_and_no_others(bench: ListenBench, open_path: str) -> None:
    listener = UnixListener(
        bench.loop,
        open_path,
        bench.clients.append,
        RateLimited(logging.getLogger("test")),
        Disposal(),
        trust=Trust([STRANGER, 65534]),
    )
    for uid in (STRANGER, 65534):
        with as_user(uid):
            client = connect(open_path)
        with client:
            run_ready(bench.loop)
            bench.clients.pop().close()
    with as_user(STRANGER + 1), pytest.raises(PermissionError):
        connect(open_path)
    listener.close()


@pytest.mark.parametrize("change", ["owner", "mode"])
def test_directory_that_others_can_change_is_refused(bench: ListenBench, open_path: str, change: str) -> None:
    directory = os.path.dirname(open_path)
    if change == "mode":
        os.chmod(directory, 0o777)
    else:
        os.chown(directory, STRANGER, STRANGER)
    with pytest.raises(UntrustedError, match=rf"^socket {open_path}: .*{directory} "):
        bench.listen(open_path)
    assert os.listdir(directory) == []


def test_the_lock_names_its_holder(bench: ListenBench, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By it other daemons tell a holder that is being killed, whose lock counts no more."""
    listen = socket.socket.listen
    holders = []

    def meanwhile_listen(sock: socket.socket, backlog: int) -> None:
        holders.append(int(Path(lock_path(path)).read_text(encoding="ascii")))
        listen(sock, backlog)

    monkeypatch.setattr(socket.socket, "listen", meanwhile_listen)
    bench.listen(path).close()
    assert holders == [os.getpid()]


def test_a_strangers_lock_file_is_refused(bench: ListenBench, open_path: str) -> None:
    """Its owner could hold the lock for ever, or have another pid read from it."""
    Path(lock_path(open_path)).touch()
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a file another user's")
    os.chown(lock_path(open_path), STRANGER, STRANGER)
    with pytest.raises(UntrustedError, match=rf"belongs to user {STRANGER}, who is not trusted"):
        bench.listen(open_path)
    assert not os.path.exists(open_path)
