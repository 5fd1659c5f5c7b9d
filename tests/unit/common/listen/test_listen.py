# SPDX-License-Identifier: GPL-2.0-or-later
"""Listening sockets: how clients come in."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable

import pytest

from common.disposal import Disposal
from common.errors import UsageError
from common.journal import RateLimited
from common.listen import UnixListener
from tests.support.fds import no_more_fds
from tests.support.listenbench import STRANGER, ListenBench, as_user, connect, own_name
from tests.support.steploop import run_ready
from tests.support.unsendable import unsendable_socket
from tests.support.wait import wait_until


def test_clients_are_taken_one_after_another(bench: ListenBench, path: str) -> None:
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


def test_clients_wait_while_they_are_held(bench: ListenBench, path: str) -> None:
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
    bench: ListenBench, path: str, caplog: pytest.LogCaptureFixture
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
    bench: ListenBench, path: str, end: Callable[[UnixListener], None]
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


def test_clients_of_users_that_are_not_trusted_are_hung_up(
    bench: ListenBench, open_path: str, caplog: pytest.LogCaptureFixture
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


def test_a_client_that_cant_be_taken_is_hung_up_and_others_wait(
    bench: ListenBench, path: str, caplog: pytest.LogCaptureFixture
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
    bench: ListenBench, path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
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


def test_clients_wait_as_long_as_too_many_fds_of_earlier_ones_are_to_be_closed(
    bench: ListenBench, path: str, caplog: pytest.LogCaptureFixture
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
