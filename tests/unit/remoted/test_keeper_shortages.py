# SPDX-License-Identifier: GPL-2.0-or-later
"""Remoted runs out of file descriptors or epoll watches while it keeps links, eventfds and RAM in a fd store."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from select import EPOLLHUP, EPOLLIN, EPOLLOUT

import pytest

from common.loop import Loop
from tests.support.fds import no_more_fds
from tests.support.remotebench import Pair, Peer, RemoteBench
from tests.unit.remoted.test_keeper import VALUE, KeptBench, bench, peer, write
from tests.unit.remoted.test_shortages import set_irqfd, sync_sysmem

__all__ = ["bench", "peer"]


def fill_queue(bench: KeptBench) -> None:
    """The service manager is busy: its queue takes no more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(BlockingIOError):
        sender.connect(bench.manager.address)
        while True:
            sender.send(b"STATUS=busy", socket.MSG_DONTWAIT)


def survives(bench: KeptBench, peer: Peer, pair: Pair) -> None:
    """The daemon goes on: a client that comes again gets its interrupts, and a successor has nothing stale."""
    if peer.has_ended:
        assert bench.servers["dev0"].rejected == 0, "it is no fault of the client"
        peer.close()
        peer = bench.connect("dev0")
        set_irqfd(peer, pair)
    bench.settle()
    write(peer, VALUE, 0x55)
    bench.servers["dev0"].line.set_irq(True)
    assert pair.written() == 1
    write(peer, VALUE, 0x66)
    bench.restart()
    assert bench.dropped == []
    bench.servers["dev0"].line.set_irq(False)
    bench.servers["dev0"].line.set_irq(True)
    assert pair.written() == 1
    peer.close()


@pytest.mark.parametrize("spare", range(8))
@pytest.mark.parametrize("act", [set_irqfd, sync_sysmem])
def test_a_message_that_there_is_no_fd_for_costs_its_session_at_most(
    bench: KeptBench, peer: Peer, act: Callable[[Peer, Pair], None], spare: int
) -> None:
    pair = Pair()
    if act is sync_sysmem:
        set_irqfd(peer, pair)
        bench.settle()
    fill_queue(bench)
    act(peer, pair)
    with no_more_fds(spare):
        RemoteBench.settle(bench)
    survives(bench, peer, pair)
    pair.close()


@pytest.mark.parametrize("spare", range(7))
def test_a_client_that_there_is_no_fd_for_is_hung_up_at_most(bench: KeptBench, spare: int) -> None:
    pair = Pair()
    fill_queue(bench)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(bench.path("dev0"))
    with no_more_fds(spare):
        RemoteBench.settle(bench)
    bench.clock.now += 2  # a listener that could not accept() waits for a second
    bench.loop.step()
    first = Peer(bench, sock)
    if first.has_ended:
        first.close()
        first = bench.connect("dev0")
    set_irqfd(first, pair)
    bench.settle()
    first.config_write(0x10, 4, 0xC000)
    first.config_write(0x04, 2, 1)
    survives(bench, first, pair)
    pair.close()


@pytest.mark.parametrize("events", [EPOLLIN, EPOLLHUP, EPOLLOUT])
@pytest.mark.parametrize("act", [set_irqfd, sync_sysmem])
def test_without_an_epoll_watch_a_session_ends_at_most(
    bench: KeptBench,
    peer: Peer,
    act: Callable[[Peer, Pair], None],
    events: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = Loop.add

    def full(
        self: Loop, fd: int, callback: Callable[[int], None], wanted: int = EPOLLIN, **how: bool
    ) -> None:
        if wanted == events:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, fd, callback, wanted, **how)

    pair = Pair()
    if act is sync_sysmem:
        set_irqfd(peer, pair)
        bench.settle()
    fill_queue(bench)
    act(peer, pair)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "add", full)
        RemoteBench.settle(bench)
        bench.manager.serve()
        RemoteBench.settle(bench)
    bench.store.remove("nothing")  # the next message notices that the queue has room
    survives(bench, peer, pair)
    pair.close()
