# SPDX-License-Identifier: GPL-2.0-or-later
"""EventNotifier: which fds it takes, and that it never blocks, whatever the other end does to the eventfd."""

from __future__ import annotations

import array
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import ProtocolError, ShortageError
from common.notifier import EventNotifier, adopt_pair, is_eventfd
from tests.support.fds import count_fds, no_more_fds
from tests.support.unsendable import returns_soon

FULL = (1 << 64) - 2


def is_own(_identity: str) -> bool:
    return False


def with_peer(notifier: EventNotifier) -> int:
    """A copy that went through a socket, as a peer holds it: one open file, one set of flags."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [notifier.fd]))])
        fds = socket.recv_fds(theirs, 1, 1)[1]
    return fds[0]


def test_set_test_and_clear() -> None:
    notifier = EventNotifier.create()
    assert not notifier.test_and_clear()
    notifier.set()
    assert notifier.test_and_clear()
    assert not notifier.test_and_clear()
    notifier.close()


def test_is_set_tells_of_events_and_leaves_them() -> None:
    notifier = EventNotifier.create()
    assert not notifier.is_set()
    notifier.set()
    assert notifier.is_set()
    assert notifier.is_set()
    assert notifier.test_and_clear()
    assert not notifier.is_set()
    notifier.close()


def test_any_number_of_events_is_one() -> None:
    notifier = EventNotifier.create()
    for _ in range(4):
        notifier.set()
    os.eventfd_write(notifier.fd, 1000)
    assert notifier.test_and_clear()
    assert not notifier.test_and_clear()
    notifier.close()


def test_created_fd_is_close_on_exec() -> None:
    notifier = EventNotifier.create()
    assert not os.get_inheritable(notifier.fd)
    notifier.close()


def test_never_blocks_although_the_peer_made_the_eventfd_blocking() -> None:
    """O_NONBLOCK belongs to the open file that both share; QEMU clears it on every fd that it receives."""
    notifier = EventNotifier.create()
    peer = with_peer(notifier)
    os.set_blocking(peer, True)
    assert os.get_blocking(notifier.fd)
    assert not notifier.test_and_clear()
    os.eventfd_write(peer, FULL)
    assert returns_soon(notifier.set)
    assert notifier.test_and_clear()
    notifier.set()
    assert os.eventfd_read(peer) == 1
    os.close(peer)
    notifier.close()


@pytest.mark.parametrize("blocking", [False, True])
def test_full_counter(blocking: bool) -> None:
    notifier = EventNotifier.create()
    os.set_blocking(notifier.fd, blocking)
    os.eventfd_write(notifier.fd, FULL)
    for _ in range(3):
        assert returns_soon(notifier.set)
    assert notifier.test_and_clear()
    assert not notifier.test_and_clear()
    notifier.close()


def test_the_peer_has_read_first() -> None:
    notifier = EventNotifier.create()
    notifier.set()
    peer = with_peer(notifier)
    os.set_blocking(peer, True)
    assert os.eventfd_read(peer) == 1
    assert not notifier.test_and_clear()
    os.close(peer)
    notifier.close()


def test_a_closed_one_signals_nobody_elses_eventfd() -> None:
    notifier = EventNotifier.create()
    number = notifier.fd
    notifier.close()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    assert other == number
    with pytest.raises(OSError):
        notifier.set()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)


def test_close_is_idempotent_and_closes_nobody_elses_fd() -> None:
    before = count_fds()
    notifier = EventNotifier.create()
    old = notifier.fd
    notifier.close()
    assert notifier.fd == -1
    reused = os.dup(0)
    assert reused == old
    notifier.close()
    os.fstat(reused)
    os.close(reused)
    assert count_fds() == before


def semaphore() -> int:
    return os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)


def pipe_end(which: int) -> Callable[[], int]:
    def make() -> int:
        ends = os.pipe()
        os.close(ends[1 - which])
        return ends[which]

    return make


def regular_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def unix_socket() -> int:
    return socket.socket(socket.AF_UNIX).detach()


def memfd() -> int:
    return os.memfd_create("anon_inode:[eventfd]")


UNFIT = [
    pytest.param(semaphore, "EFD_SEMAPHORE", id="semaphore"),
    pytest.param(pipe_end(0), "expected an eventfd, got 'pipe:", id="pipe's reading end"),
    pytest.param(pipe_end(1), "expected an eventfd, got 'pipe:", id="closed pipe's writing end"),
    pytest.param(regular_file, "expected an eventfd, got '/", id="file"),
    pytest.param(unix_socket, "expected an eventfd, got 'socket:", id="socket"),
    pytest.param(memfd, "expected an eventfd, got '/memfd:", id="memfd with an eventfd's name"),
]


@pytest.mark.parametrize(("make", "complaint"), UNFIT)
@pytest.mark.parametrize("place", [0, 1])
def test_pair_with_an_unfit_fd_is_refused_and_stays_the_callers(
    make: Callable[[], int], complaint: str, place: int
) -> None:
    pair = [os.eventfd(0), os.eventfd(0)]
    os.close(pair[place])
    pair[place] = make()
    with pytest.raises(ProtocolError, match=complaint.replace("[", r"\[")):
        adopt_pair(pair[0], pair[1], is_own)
    for fd in pair:
        os.close(fd)


def test_one_eventfd_as_both_of_a_pair_is_refused() -> None:
    fd = os.eventfd(0)
    copy = os.dup(fd)
    with pytest.raises(ProtocolError, match="the same eventfd"):
        adopt_pair(fd, copy, is_own)
    os.close(fd)
    os.close(copy)


@pytest.mark.parametrize("place", [0, 1])
def test_eventfd_of_another_device_is_refused(place: int) -> None:
    """Whichever of a pair it is, and whichever fd refers to it."""
    others = adopt_pair(os.eventfd(0), os.eventfd(0), is_own)
    pair = [os.eventfd(0), os.eventfd(0)]
    for other in others:
        os.dup2(other.fd, pair[place])
        with pytest.raises(ProtocolError, match="an eventfd that another device uses"):
            adopt_pair(pair[0], pair[1], lambda identity: identity in [other.identity for other in others])
    for fd in pair:
        os.close(fd)
    for other in others:
        other.close()


def test_pair() -> None:
    fds = [os.eventfd(0), os.eventfd(0)]
    peer = os.dup(fds[0])
    pair = adopt_pair(fds[0], fds[1], is_own)
    assert [notifier.fd for notifier in pair] == fds
    pair[0].set()
    assert os.eventfd_read(peer) == 1
    os.close(peer)
    for notifier in pair:
        notifier.close()


def test_pair_is_refused_when_no_fd_is_left_to_examine_it() -> None:
    fds = [os.eventfd(0), os.eventfd(0)]
    with (
        no_more_fds(),
        pytest.raises(ShortageError, match="an eventfd can't be examined: Too many open files"),
    ):
        adopt_pair(fds[0], fds[1], is_own)
    for fd in fds:
        os.close(fd)


def test_file_whose_path_is_too_long_is_refused(tmp_path: Path) -> None:
    """The kernel gives no link in /proc for it."""
    directory = os.open(tmp_path, os.O_PATH)
    for _ in range(17):
        os.mkdir("x" * 255, dir_fd=directory)
        inner = os.open("x" * 255, os.O_PATH, dir_fd=directory)
        os.close(directory)
        directory = inner
    eventfd = os.eventfd(0)
    with pytest.raises(ProtocolError, match="can't examine an eventfd: File name too long"):
        adopt_pair(eventfd, directory, is_own)
    assert not is_eventfd(directory)
    os.close(eventfd)
    os.close(directory)
