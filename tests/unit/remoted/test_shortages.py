# SPDX-License-Identifier: GPL-2.0-or-later
"""Remoted runs out of file descriptors or epoll watches: a session ends and can come again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from common.mpqemu import MAX_FDS, SYSMEM, Command
from tests.support.fds import no_more_fds
from tests.support.remotebench import Pair, Peer, RemoteBench


def set_irqfd(peer: Peer, pair: Pair) -> None:
    peer.send(Command.SET_IRQFD, fds=pair.fds)


def sync_sysmem(peer: Peer, _pair: Pair) -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 4096)
    rest = [0] * (MAX_FDS - 1)
    peer.send(Command.SYNC_SYSMEM, SYSMEM.pack(0, *rest, 4096, *rest, 0, *rest), [fd])
    os.close(fd)


@pytest.mark.parametrize(
    ("act", "spare", "reason"),
    [
        (set_irqfd, 0, "a message's file descriptors are lost: too many files are open here"),
        (set_irqfd, 1, "a message's file descriptors are lost: too many files are open here"),
        (set_irqfd, 2, "an eventfd can't be examined: Too many open files"),
        (sync_sysmem, 0, "a message's file descriptors are lost: too many files are open here"),
        (sync_sysmem, 1, "no buffer for DMA: Too many open files"),
    ],
)
def test_a_message_that_there_is_no_fd_for_ends_the_session_which_can_come_again(
    bench: RemoteBench, peer: Peer, act: Callable[[Peer, Pair], None], spare: int, reason: str
) -> None:
    other, pair = bench.connect("dev1"), Pair()
    other.enable()
    act(peer, pair)
    with no_more_fds(spare):
        bench.settle()
    assert peer.has_ended
    assert bench.log.messages[-1] == f"the session ends, the client can connect again: {reason}"
    assert bench.log.records[-1].__dict__["peer"].endswith(f"[{os.getpid()}]")
    assert bench.servers["dev0"].rejected == 0, "it is no fault of the client"
    other.drive(True)
    with bench.connect("dev0") as again:
        again.enable()
        assert again.set_irqfd().written() == 0
        again.drive(True)
    other.close()
    pair.close()


class FullEpoll:
    """Another process of the user has taken all watches (max_user_watches, epoll(7))."""

    def __init__(self, bench: RemoteBench, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_arguments: object, **_options: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.undo = monkeypatch.undo
        monkeypatch.setattr(bench.loop, "add", full)


def test_without_an_epoll_watch_a_client_is_refused_and_can_come_again(
    bench: RemoteBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench.connect("dev1") as served:
        epoll = FullEpoll(bench, monkeypatch)
        with bench.connect("dev0") as peer:
            assert peer.has_ended
        assert bench.log.messages[-1] == "can't be served: the link can't be watched: No space left on device"
        assert bench.log.records[-1].__dict__["peer"].endswith(f"[{os.getpid()}]")
        assert served.config_read(0, 2) == 0x1B36
        epoll.undo()
        with bench.connect("dev0") as again:
            assert again.config_read(0, 2) == 0x1B36


def test_without_an_epoll_watch_for_a_resamplefd_the_session_ends_and_can_come_again(
    bench: RemoteBench, peer: Peer, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoll = FullEpoll(bench, monkeypatch)
    peer.set_irqfd()
    assert peer.has_ended
    assert not bench.hub.pirqs[0x28].has_irqfd
    assert bench.log.messages[-1] == (
        "the session ends, the client can connect again: the resamplefd can't be watched: No space left on device"
    )
    epoll.undo()
    with bench.connect("dev0") as again:
        again.enable()
        again.drive(True)
        assert again.set_irqfd().written() == 1
