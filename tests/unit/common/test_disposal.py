# SPDX-License-Identifier: GPL-2.0-or-later
"""Files from peers are closed without waiting for what their close does."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.disposal import ANCILLARY_SIZE, Disposal, receive_urgent_inline, refuse_fds
from tests.support.fds import await_fds, count_fds, no_more_fds, send_fds
from tests.support.unsendable import has_passrights, lasting_eventfd, returns_soon, unsendable_socket
from tests.support.wait import wait_until


@pytest.fixture
def place() -> Iterator[Disposal]:
    """What is left open at a test's end is closed soon."""
    before = count_fds()
    yield Disposal()
    wait_until(lambda: count_fds() == before, "all fds are closed")


def fail(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def paths(count: int) -> list[int]:
    return [os.open("/", os.O_PATH) for _ in range(count)]


def tmpfs_file() -> int:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        return os.dup(file.fileno())


MEMORY = [
    pytest.param(lambda: os.memfd_create("ram"), id="memfd"),
    pytest.param(lambda: os.memfd_create("ram", os.MFD_HUGETLB), id="memfd of huge pages"),
    pytest.param(tmpfs_file, id="file on tmpfs"),
]
OTHERS = [
    pytest.param(lambda: os.open("/proc/self/comm", os.O_RDONLY), id="file"),
    pytest.param(lambda: os.open("/dev/shm", os.O_PATH), id="path"),
    pytest.param(lambda: os.pidfd_open(os.getpid()), id="pidfd"),
    pytest.param(lambda: socket.socket().detach(), id="socket"),
    *MEMORY,
]


def test_an_eventfd_is_closed_by_a_thread(place: Disposal) -> None:
    with lasting_eventfd() as eventfd:
        assert returns_soon(lambda: place.close_fds([eventfd]))


def test_many_eventfds_wait_in_few_fds(place: Disposal) -> None:
    before = count_fds()
    with lasting_eventfd() as eventfd:
        held = count_fds()
        place.close_fds([eventfd])
        for _ in range(2000):
            assert not place.close_fds([os.eventfd(0), os.eventfd(0)])
        assert count_fds() <= held + 2 * 16
        while not place.is_full:
            place.close_fds([os.eventfd(0), os.eventfd(0)])
    await_fds(before)


def test_without_a_socket_pair_eventfds_are_closed_one_by_one(place: Disposal) -> None:
    fds = [os.eventfd(0), os.eventfd(0)]
    with no_more_fds():
        assert place.close_fds(fds)


@pytest.mark.parametrize("opener", MEMORY)
def test_memory_is_closed_at_once_if_another_fd_of_it_is_kept(
    place: Disposal, opener: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = opener()
    keeping = Disposal(lambda: [kept])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        assert not keeping.close_fds([os.dup(kept), os.dup(kept)])
        other = opener()
        assert keeping.close_fds([other])
        os.fstat(other)
    assert not keeping.is_full  # which makes the next attempt
    assert place.close_fds([kept])


@pytest.mark.parametrize("opener", OTHERS)
def test_other_files_are_closed_by_a_thread(place: Disposal, opener: Callable[[], int]) -> None:
    fd = opener()
    with unsendable_socket() as sock:
        assert place.close_fds([sock.detach()])
        assert place.close_fds([fd, os.eventfd(0)])
        os.fstat(fd)


def test_a_close_that_lasts_delays_nobody_and_fills_only_its_own_place(place: Disposal) -> None:
    other = Disposal()
    with unsendable_socket() as sock:
        before = count_fds()
        assert returns_soon(lambda: place.close_fds([sock.detach()]))
        await_fds(before - 1)  # the thread is at it
        assert not place.is_full
        place.close_fds(paths(255))
        assert place.is_full
        before = count_fds()
        other.close_fds(paths(256))
        wait_until(lambda: count_fds() == before, "the other place's are closed")
        assert not other.is_full
    wait_until(lambda: not place.is_full, "the backlog is gone")


def test_threads_end_when_nothing_is_left_and_the_next_fd_brings_another(place: Disposal) -> None:
    before = threading.active_count()
    for _ in range(100):  # each may come just before, or just after, a thread finds nothing
        place.close_fds(paths(1))
    wait_until(lambda: threading.active_count() == before, "the thread has ended")


def test_without_a_thread_fds_wait_for_the_next_attempt(
    place: Disposal, monkeypatch: pytest.MonkeyPatch
) -> None:
    fds = paths(2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        place.close_fds(fds[:1])
    os.fstat(fds[0])
    place.close_fds(fds[1:])


def test_who_asks_whether_it_is_full_makes_the_next_attempt(
    place: Disposal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        place.close_fds(paths(256))
        assert place.is_full
    wait_until(lambda: not place.is_full, "the backlog is gone")


class TestReceive:
    def test_bytes_arrive_as_they_do_without_fds(self, place: Disposal) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, theirs:
            with pytest.raises(BlockingIOError):
                place.receive(ours, 10)
            theirs.send(b"abc")
            send_fds(theirs, b"def", [0, 1])
            theirs.close()
            assert [place.receive(ours, 2) for _ in range(4)] == [b"ab", b"cd", b"ef", b""]

    def test_fds_are_closed_by_a_thread(self, place: Disposal) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, unsendable_socket() as sock:
            send_fds(theirs, b"x", [sock.fileno()])
            sock.close()
            assert returns_soon(lambda: place.receive(ours, 10))

    def test_as_many_as_a_message_can_have(self, place: Disposal) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, unsendable_socket() as sock:
            send_fds(theirs, b"x", [0] * 252 + [sock.fileno()])
            sock.close()
            assert returns_soon(lambda: place.receive(ours, 10))


class TestSockets:
    def test_with_nothing_unread_is_closed_at_once(self) -> None:
        before = count_fds()
        place = Disposal()
        ours, theirs = socket.socketpair()
        with theirs:
            place.hang_up(ours)
            assert theirs.recv(1) == b""
        assert count_fds() == before
        place.hang_up(ours)

    def test_with_fds_unread_ends_at_once_and_is_closed_by_a_thread(self, place: Disposal) -> None:
        ours, theirs = socket.socketpair()
        with theirs, unsendable_socket() as sock:
            send_fds(theirs, b"x", [sock.fileno()])
            sock.close()
            assert returns_soon(lambda: place.hang_up(ours))
            with contextlib.suppress(ConnectionResetError):  # which comes with the close itself
                assert theirs.recv(1) == b""
            with pytest.raises(BrokenPipeError):
                theirs.send(b"x")

    def test_closing_a_copy_leaves_the_connection(self, place: Disposal) -> None:
        ours, theirs = socket.socketpair()
        copy = ours.dup()
        with ours, theirs:
            place.close_socket(copy)
            ours.send(b"x")
            assert theirs.recv(1) == b"x"

    def test_urgent_data_brings_its_fds(self, place: Disposal) -> None:
        ours, theirs = socket.socketpair()
        receive_urgent_inline(ours)
        with ours, theirs, unsendable_socket() as sock:
            send_fds(theirs, b"!", [sock.fileno()], socket.MSG_OOB)
            sock.close()
            received: list[list[int]] = []
            assert returns_soon(lambda: received.append(socket.recv_fds(ours, 10, 8)[1]))
            assert len(received[0]) == 1
            place.close_fds(received[0])

    def test_the_control_buffer_takes_all_that_a_message_can_have(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            with pytest.raises(OSError, match="Invalid argument"):
                send_fds(theirs, b"x", [0] * 254)
            send_fds(theirs, b"x", [0] * 253)
            _, ancillary, flags, _ = ours.recvmsg(1, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
        fds = [int.from_bytes(ancillary[0][2][n : n + 4], "little") for n in range(0, 4 * 253, 4)]
        for fd in fds:
            os.close(fd)
        assert not flags & socket.MSG_CTRUNC


@pytest.mark.skipif(not has_passrights(), reason="this kernel knows no SO_PASSRIGHTS")
class TestRefusal:
    def test_fds_are_refused_and_bytes_are_not(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            refuse_fds(ours)
            with pytest.raises(PermissionError):
                send_fds(theirs, b"x", [0])
            send_fds(theirs, b"y")
            assert ours.recv(2) == b"y"

    def test_a_listening_socket_refuses_before_the_client_is_taken(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            refuse_fds(server)
            server.bind(str(tmp_path / "socket"))
            server.listen()
            client.connect(str(tmp_path / "socket"))
            with pytest.raises(PermissionError):
                send_fds(client, b"x", [0])


@pytest.mark.usefixtures("older_kernel")
def test_an_older_kernel_refuses_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        refuse_fds(ours)
        send_fds(theirs, b"x", [0])
