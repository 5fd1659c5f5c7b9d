# SPDX-License-Identifier: GPL-2.0-or-later
"""Listening sockets by path: whom they replace and whom not, and how clients come in."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.disposal import Disposal
from common.errors import UntrustedError, UsageError
from common.journal import RateLimited
from common.listen import UnixListener
from common.peer import is_dying, peer_credentials
from common.trust import Trust
from tests.support.fds import count_fds, no_more_fds
from tests.support.remotebench import Clock
from tests.support.steploop import CountingLoop, run_ready
from tests.support.unsendable import unsendable_socket
from tests.support.wait import wait_until


class Bench:
    """A loop in the test's time, and the clients that listeners on it have taken."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.loop = CountingLoop(self.clock)
        self.clients: list[socket.socket] = []

    def listen(self, path: str) -> UnixListener:
        log = RateLimited(logging.getLogger("test"))
        return UnixListener(self.loop, path, self.clients.append, log, Disposal())

    def close(self) -> None:
        self.loop.close()
        for client in self.clients:
            client.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = count_fds()
    bench = Bench()
    yield bench
    bench.close()
    assert count_fds() == before


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "edu0.sock")


def dead_socket(path: str) -> None:
    """What a daemon leaves behind when it is killed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def test_clients_are_taken_one_after_another(bench: Bench, path: str) -> None:
    listener = bench.listen(path)
    assert run_ready(bench.loop) == 0
    with connect(path) as one, connect(path) as two:
        for count, client in enumerate((one, two), 1):
            bench.loop.step()
            assert len(bench.clients) == count
            client.send(b"x")
            assert bench.clients[-1].recv(1) == b"x"
            with pytest.raises(BlockingIOError):
                bench.clients[-1].recv(1)
            assert not os.get_inheritable(bench.clients[-1].fileno())
        assert run_ready(bench.loop) == 0
    listener.close()


def test_clients_wait_while_they_are_held(bench: Bench, path: str) -> None:
    listener = bench.listen(path)
    listener.hold()
    with connect(path):
        assert run_ready(bench.loop) == 0
        listener.resume()
        run_ready(bench.loop)
        assert len(bench.clients) == 1
    listener.hold()
    listener.close()
    assert not os.path.exists(path)


def test_without_an_fd_left_clients_wait_and_are_taken_later(
    bench: Bench, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    listener = bench.listen(path)
    with connect(path):
        with no_more_fds():
            assert run_ready(bench.loop) == 1, "the loop must not spin on it"
        assert caplog.messages == [f"{path}: can't take a client: Too many open files"]
        assert run_ready(bench.loop) == 0
        bench.clock.now += 1.0
        bench.loop.step()
        run_ready(bench.loop)
        assert len(bench.clients) == 1
    listener.close()


@pytest.mark.parametrize("end", [UnixListener.hold, UnixListener.close])
def test_no_client_is_taken_after_hold_or_close_though_one_waited_for_an_fd(
    bench: Bench, path: str, end: Callable[[UnixListener], None]
) -> None:
    listener = bench.listen(path)
    with connect(path):
        with no_more_fds():
            run_ready(bench.loop)
        end(listener)
        bench.clock.now += 60
        bench.loop.step()
        run_ready(bench.loop)
        assert bench.clients == []
    listener.close()


def test_socket_is_private_whatever_the_umask(bench: Bench, path: str) -> None:
    before = os.umask(0)
    try:
        listener = bench.listen(path)
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    listener.close()


STRANGER = 54321


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Acts as another user."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to act as other users")
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_path() -> Iterator[str]:
    """In a directory that all users can reach."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield os.path.join(directory, "edu0.sock")


def test_clients_of_users_that_are_not_trusted_are_hung_up(
    bench: Bench, open_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Though the socket may have been made accessible to them."""
    listener = bench.listen(open_path)
    with as_user(STRANGER), pytest.raises(PermissionError):
        connect(open_path)
    os.chmod(open_path, 0o666)
    with as_user(STRANGER):
        client = connect(open_path)
    with client, connect(open_path):
        run_ready(bench.loop)
        client.setblocking(False)
        assert client.recv(1) == b""
        assert len(bench.clients) == 1
    (line,) = caplog.messages
    assert (
        line
        == f"{open_path}: refused: {own_name()} belongs to user {STRANGER}, who is not trusted (--allow-user)"
    )
    listener.close()


def test_users_that_are_listed_can_connect_and_no_others(bench: Bench, open_path: str) -> None:
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
def test_directory_that_others_can_change_is_refused(bench: Bench, open_path: str, change: str) -> None:
    directory = os.path.dirname(open_path)
    if change == "mode":
        os.chmod(directory, 0o777)
    else:
        os.chown(directory, STRANGER, STRANGER)
    with pytest.raises(UntrustedError, match=rf"^socket {open_path}: .*{directory} "):
        bench.listen(open_path)
    assert os.listdir(directory) == []


def test_a_client_that_cant_be_taken_is_hung_up_and_others_wait(
    bench: Bench, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_sock: socket.socket) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = RateLimited(logging.getLogger("test"))
    listener = UnixListener(bench.loop, path, full, log, Disposal())
    with connect(path) as one, connect(path) as two:
        assert run_ready(bench.loop) == 1
        one.setblocking(False)
        assert one.recv(1) == b""
        assert caplog.messages == [f"{path}: can't take a client: No space left on device"]
        two.setblocking(False)
        with pytest.raises(BlockingIOError):
            two.recv(1)
    listener.close()


def test_without_an_epoll_watch_clients_wait_and_are_taken_later(
    bench: Bench, path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(bench.loop, "add", full)
        with pytest.raises(UsageError, match="No space left on device"):
            bench.listen(path)
        assert os.listdir(os.path.dirname(path)) == []
    listener = bench.listen(path)
    listener.hold()
    with monkeypatch.context() as patch:
        patch.setattr(bench.loop, "add", full)
        listener.resume()
    assert caplog.messages == [f"{path}: can't take a client: No space left on device"]
    with connect(path):
        bench.clock.now += 1.0
        bench.loop.step()
        run_ready(bench.loop)
        assert len(bench.clients) == 1
    listener.close()


def test_a_lock_that_a_dying_process_holds_locks_nothing(bench: Bench, path: str) -> None:
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


def test_close_unlinks_the_path_once(bench: Bench, path: str) -> None:
    listener = bench.listen(path)
    listener.close()
    assert not os.path.exists(path)
    other = bench.listen(path)
    listener.close()
    assert os.path.exists(path)
    other.close()


def test_close_leaves_a_path_that_somebody_else_has_bound_since(bench: Bench, path: str) -> None:
    listener = bench.listen(path)
    os.unlink(path)
    other = bench.listen(path)
    listener.close()
    assert os.path.exists(path)
    connect(path).close()
    other.close()
    assert not os.path.exists(path)


def test_close_when_the_path_has_gone(bench: Bench, path: str) -> None:
    listener = bench.listen(path)
    os.unlink(path)
    listener.close()


def test_stale_socket_is_taken_over(bench: Bench, path: str) -> None:
    dead_socket(path)
    listener = bench.listen(path)
    connect(path).close()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    listener.close()


def own_name() -> str:
    """What a daemon that is refused calls this process."""
    one, two = socket.socketpair()
    with one, two:
        return str(peer_credentials(one))


def is_beaten(bench: Bench, path: str) -> bool:
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
    bench: Bench, path: str, monkeypatch: pytest.MonkeyPatch, is_stale: bool
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
    bench: Bench, path: str, monkeypatch: pytest.MonkeyPatch
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
    bench: Bench, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen = socket.socket.listen

    def meanwhile_listen(sock: socket.socket, backlog: int) -> None:
        os.unlink(os.path.join(os.path.dirname(path), ".edu0.sock.lock"))
        listen(sock, backlog)

    monkeypatch.setattr(socket.socket, "listen", meanwhile_listen)
    listener = bench.listen(path)
    connect(path).close()
    listener.close()


def test_lock_file_that_a_killed_daemon_left_is_no_obstacle(bench: Bench, path: str) -> None:
    Path(os.path.dirname(path), ".edu0.sock.lock").touch()
    bench.listen(path).close()
    assert os.listdir(os.path.dirname(path)) == []


def test_clients_wait_as_long_as_too_many_fds_of_earlier_ones_are_to_be_closed(
    bench: Bench, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    disposal = Disposal()
    log = RateLimited(logging.getLogger("test"))
    listener = UnixListener(bench.loop, path, bench.clients.append, log, disposal, takes_fds=True)
    with connect(path):
        with unsendable_socket() as sock:
            disposal.close_fds([sock.detach(), *[os.open("/", os.O_PATH) for _ in range(255)]])
            assert run_ready(bench.loop) == 1, "the loop must not spin on it"
            assert caplog.messages == [
                f"{path}: can't take a client: too many file descriptors of earlier ones take long to close"
            ]
        wait_until(lambda: not disposal.is_full, "the backlog is gone")
        bench.clock.now += 1.0
        bench.loop.step()
        run_ready(bench.loop)
        assert len(bench.clients) == 1
    listener.close()
    wait_until(lambda: not disposal._pending, "all fds are closed")


def test_live_socket_is_refused_and_lives_on(bench: Bench, path: str) -> None:
    live = bench.listen(path)
    with pytest.raises(UsageError) as raised:
        bench.listen(path)
    assert str(raised.value) == f"socket {path} is in use by {own_name()}"
    assert f"[{os.getpid()}]" in own_name()
    connect(path).close()
    live.close()


def test_live_socket_with_a_full_queue_is_refused(bench: Bench, path: str) -> None:
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
def test_what_is_no_socket_is_left_alone(bench: Bench, path: str, kind: str) -> None:
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
def test_path_that_cant_be_bound(bench: Bench, tmp_path: Path, tail: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        bench.listen(str(tmp_path) + tail)
    assert os.listdir(tmp_path) == []
