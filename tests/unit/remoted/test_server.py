# SPDX-License-Identifier: GPL-2.0-or-later
"""A device as its clients find it: one at a time, by path or by an inherited connection."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UsageError
from common.mpqemu import BAR, Command
from remoted.server import adopt_connection
from tests.support.fds import await_fds, count_fds, no_more_fds
from tests.support.remotebench import MEM_BASE, LineDevice, Peer, RemoteBench


def works(peer: Peer) -> bool:
    return peer.config_read(0, 4) == 0x00421B36


def refusals(bench: RemoteBench) -> int:
    return sum(message.endswith(" is being served") for message in bench.log.messages)


def test_second_client_is_refused_while_the_first_is_served(bench: RemoteBench) -> None:
    with bench.connect("dev0") as first:
        with bench.connect("dev0") as second, bench.connect("dev0") as third:
            assert second.has_ended
            assert third.has_ended
        assert bench.servers["dev0"].refused == 2
        assert works(first)
        assert refusals(bench) == 1, "it is told once for each client that is served"
    with bench.connect("dev0") as after:
        assert works(after)
        assert bench.servers["dev0"].refused == 2
        with bench.connect("dev0") as fourth:
            assert fourth.has_ended
        assert refusals(bench) == 2


def test_successor_that_connects_before_the_end_of_the_first_was_seen_is_served(bench: RemoteBench) -> None:
    """A client that was killed and comes again at once finds its place free."""
    first = bench.connect("dev0")
    sock = socket.socket(socket.AF_UNIX)
    first.close()
    sock.connect(bench.path("dev0"))
    with Peer(bench, sock) as second:
        assert works(second)
    assert bench.servers["dev0"].refused == 0


def test_successor_waits_for_all_that_the_first_has_sent(bench: RemoteBench) -> None:
    function = bench.add(LineDevice, "dev", 8)
    first = bench.connect("dev")
    first.enable()
    for number in range(100):
        first.send(Command.BAR_WRITE, BAR.pack(MEM_BASE + 8, number, 4, True))
    first.sock.shutdown(socket.SHUT_WR)
    with bench.connect("dev") as second:
        assert function.registers[1, 8] == 99
        assert not second.has_ended
    first.close()
    assert bench.servers["dev"].refused == 0


def test_devices_are_served_side_by_side(bench: RemoteBench) -> None:
    with bench.connect("dev0") as one, bench.connect("dev1") as two:
        assert works(one)
        assert works(two)
    bench.settle()
    assert bench.idle == 2


def test_inherited_connection(bench: RemoteBench) -> None:
    ours, theirs = socket.socketpair()
    fd = theirs.detach()
    os.set_inheritable(fd, True)
    sock = adopt_connection(fd, "dev0")
    assert not sock.get_inheritable()
    bench.servers["dev0"].serve(sock)
    with Peer(bench, ours) as peer:
        assert works(peer)
    bench.settle()
    assert bench.idle == 1


def closed() -> int:
    fd = os.dup(0)
    os.close(fd)
    return fd


def unconnected() -> int:
    return socket.socket(socket.AF_UNIX).detach()


def inet() -> int:
    return socket.socket(socket.AF_INET).detach()


def eventfd() -> int:
    return os.eventfd(0)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (closed, "Bad file descriptor"),
        (unconnected, "is not connected"),
        (inet, "is not a UNIX stream socket"),
        (eventfd, "Socket operation on non-socket"),
    ],
)
def test_what_is_no_connection_is_a_usage_error_that_names_it(
    make: Callable[[], int], complaint: str
) -> None:
    fd = make()
    with pytest.raises(UsageError, match=f"^--device id=dev0: fd={fd}:? {complaint}"):
        adopt_connection(fd, "dev0")
    if make is eventfd:
        os.close(fd)


def test_datagram_socket_is_no_connection() -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with two, pytest.raises(UsageError, match="is not a UNIX stream socket"):
        adopt_connection(one.detach(), "dev0")


def test_close_ends_everything_once(bench: RemoteBench) -> None:
    server = bench.servers["dev0"]
    function = server.function
    assert isinstance(function, LineDevice)
    with bench.connect("dev0") as peer:
        pair = peer.set_irqfd()
        server.close()
        assert peer.has_ended
        assert not pair.resamplefd.test_and_clear()
    assert not os.path.exists(bench.path("dev0"))
    assert function.closed == 1
    assert not server.is_listening
    assert server.session is None
    with bench.connect("dev1") as other:
        assert works(other)


class BadAtTheEnd(LineDevice):
    def close(self) -> None:
        raise RuntimeError("close")


def test_device_whose_close_fails_keeps_nobody_from_ending(tmp_path: Path) -> None:
    bench = RemoteBench(tmp_path)
    bench.add(BadAtTheEnd, "bad", 1)
    bench.add(LineDevice, "good", 2)
    bench.close()
    assert os.listdir(tmp_path) == []
    assert any(record.exc_info for record in bench.log.records)


def test_client_waits_while_no_fd_is_left_and_is_served_then(bench: RemoteBench) -> None:
    with bench.connect("dev1") as other, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(bench.path("dev0"))
        with no_more_fds():
            bench.settle()  # comes to rest: the waiting client keeps nobody awake
            assert works(other)
        assert any("can't take a client: Too many open files" in text for text in bench.log.messages)
        assert bench.servers["dev0"].session is None
        bench.clock.now += 60
        bench.loop.step()
        bench.settle()
        assert works(Peer(bench, sock))


def test_irqfds_that_come_while_no_fd_is_left_cost_their_session(bench: RemoteBench) -> None:
    with bench.connect("dev0") as peer, bench.connect("dev1") as other:
        before = count_fds()
        pairs = [os.eventfd(0), os.eventfd(0)]
        with no_more_fds():
            peer.send_bytes(b"\6" + bytes(15), pairs)
            assert peer.has_ended
            assert works(other)
        for fd in pairs:
            os.close(fd)
        await_fds(before - 1)
