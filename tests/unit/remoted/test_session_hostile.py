# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients that send what they must not: what it may cost is its sender's session, nothing else."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from common import mpqemu
from common.mpqemu import CONFIG, SYSMEM, Command, request_frame
from tests.support.fds import count_fds
from tests.support.remotebench import Pair, Peer, RemoteBench
from tests.support.wait import wait_until


def frame(command: int, size: int, data: bytes = b"") -> bytes:
    return struct.pack("<i4xQ", command, size) + data


def send(data: bytes) -> Callable[[RemoteBench, Peer], None]:
    def act(bench: RemoteBench, peer: Peer) -> None:
        peer.send_bytes(data)

    return act


def then_silence(data: bytes, fds: int = 0) -> Callable[[RemoteBench, Peer], None]:
    def act(bench: RemoteBench, peer: Peer) -> None:
        fd = os.eventfd(0)
        peer.send_bytes(data, [fd] * fds)
        os.close(fd)
        bench.settle()
        bench.clock.now += 60
        bench.loop.step()

    return act


def drip(bench: RemoteBench, peer: Peer) -> None:
    """A byte a second: each is progress, and still the frame takes too long."""
    for byte in request_frame(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4)):
        try:
            peer.send_bytes(bytes([byte]))
        except BrokenPipeError:
            return
        bench.settle()
        bench.clock.now += 1
        bench.loop.step()


def flood(bench: RemoteBench, peer: Peer) -> None:
    request = request_frame(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
    try:
        for _ in range(100_000):
            try:
                peer.sock.send(request)
            except BlockingIOError:
                bench.settle()
    except BrokenPipeError:
        return
    raise AssertionError("the flood has no end")


def with_fds(data: bytes, *kinds: str) -> Callable[[RemoteBench, Peer], None]:
    def act(bench: RemoteBench, peer: Peer) -> None:
        fds = [make_fd(kind) for kind in kinds]
        if kinds == ("eventfd", "the same"):
            os.close(fds[1])
            fds[1] = os.dup(fds[0])
        peer.send_bytes(data, fds)
        for fd in fds:
            os.close(fd)

    return act


def make_fd(kind: str) -> int:
    if kind == "semaphore":
        return os.eventfd(0, os.EFD_SEMAPHORE)
    if kind == "file":
        return os.open("/etc/passwd", os.O_RDONLY)
    if kind == "null":
        return os.open(os.devnull, os.O_RDWR)
    if kind == "socket":
        return socket.socket(socket.AF_UNIX).detach()
    return os.eventfd(0)


SET_IRQFD = request_frame(Command.SET_IRQFD)
SYNC = request_frame(Command.SYNC_SYSMEM, bytes(SYSMEM.size))

ENDING = {
    "config read with 13 bytes": send(frame(Command.PCI_CFGREAD, 13, bytes(13))),
    "config write with none": send(frame(Command.PCI_CFGWRITE, 0)),
    "bar write with 23 bytes": send(frame(Command.BAR_WRITE, 23, bytes(23))),
    "bar read with 25 bytes": send(frame(Command.BAR_READ, 25, bytes(25))),
    "set irqfd with payload": send(frame(Command.SET_IRQFD, 8, bytes(8))),
    "reset with payload": send(frame(Command.DEVICE_RESET, 1, b"x")),
    "sync with a terabyte": send(frame(Command.SYNC_SYSMEM, 1 << 40)),
    "size of minus one": send(frame(Command.PCI_CFGREAD, (1 << 64) - 1)),
    "ret": send(mpqemu.reply_frame(0)),
    "command 8": send(frame(8, 0)),
    "command -1": send(frame(-1, 0)),
    "command 0x7fffffff": send(frame(0x7FFFFFFF, 12, bytes(12))),
    "garbage": send(bytes(range(256)) * 4),
    "http": send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "9 fds": with_fds(SET_IRQFD, *["eventfd"] * 9),
    "200 fds": with_fds(request_frame(Command.DEVICE_RESET), *["eventfd"] * 200),
    "one byte and silence": then_silence(b"\3"),
    "half a header and silence": then_silence(SET_IRQFD[:8], 2),
    "header and silence": then_silence(frame(Command.PCI_CFGREAD, 12)),
    "all but a byte and silence": then_silence(SYNC[:-1], 8),
    "a frame and a half and silence": then_silence(
        request_frame(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4)) + frame(Command.BAR_READ, 24)[:12]
    ),
    "a byte a second": drip,
    "flood without reading replies": flood,
}

REJECTED = {
    "set irqfd without fds": with_fds(SET_IRQFD),
    "set irqfd with one": with_fds(SET_IRQFD, "eventfd"),
    "set irqfd with three": with_fds(SET_IRQFD, *["eventfd"] * 3),
    "set irqfd with eight": with_fds(SET_IRQFD, *["eventfd"] * 8),
    "irqfd is a file": with_fds(SET_IRQFD, "file", "eventfd"),
    "resamplefd is a file": with_fds(SET_IRQFD, "eventfd", "file"),
    "resamplefd is a socket": with_fds(SET_IRQFD, "eventfd", "socket"),
    "irqfd is a semaphore": with_fds(SET_IRQFD, "semaphore", "eventfd"),
    "resamplefd is a semaphore": with_fds(SET_IRQFD, "eventfd", "semaphore"),
    "both are one": with_fds(SET_IRQFD, "eventfd", "the same"),
    "RAM is /dev/null": with_fds(SYNC, "null"),
    "RAM is an eventfd": with_fds(SYNC, "eventfd"),
}


@pytest.fixture
def victim(bench: RemoteBench) -> Iterator[tuple[Peer, Pair]]:
    """The client of the other device."""
    with bench.connect("dev1") as peer:
        peer.enable()
        yield peer, peer.set_irqfd()


Victim = tuple[Peer, Pair]


def check_victim(bench: RemoteBench, victim: Victim) -> None:
    peer, pair = victim
    peer.drive(True)
    assert pair.written() == 1
    bench.resample(pair)
    assert pair.written() == 1
    peer.drive(False)
    bench.resample(pair)
    assert pair.written() == 0


@pytest.mark.parametrize("act", ENDING.values(), ids=ENDING)
def test_what_puts_the_stream_out_of_step_ends_its_session_only(
    bench: RemoteBench, victim: Victim, act: Callable[[RemoteBench, Peer], None]
) -> None:
    before = count_fds()
    with bench.connect("dev0") as peer:
        peer.enable()
        pair = peer.set_irqfd()
        peer.drive(True)
        bench.log.records.clear()
        act(bench, peer)
        assert peer.has_ended
        pair.written()
        assert bench.servers["dev0"].rejected == 1
        assert len(bench.log.messages) == 1
        assert bench.log.messages[0].count("\n") == 0
        check_victim(bench, victim)
    with bench.connect("dev0") as again:
        assert again.config_read(0, 4) == 0x00421B36
        new = again.set_irqfd()
        assert new.written() == 1  # the level that rose in the session before
        again.drive(False)
        bench.resample(new)
        assert new.written() == 0
    bench.settle()
    wait_until(lambda: count_fds() == before, "all fds are closed")


@pytest.mark.parametrize("act", REJECTED.values(), ids=REJECTED)
def test_unfit_message_without_reply_is_dropped_and_the_session_goes_on(
    bench: RemoteBench, victim: Victim, peer: Peer, pair: Pair, act: Callable[[RemoteBench, Peer], None]
) -> None:
    peer.drive(True)
    assert pair.written() == 1
    before = count_fds()
    bench.log.records.clear()
    act(bench, peer)
    assert not peer.has_ended
    wait_until(lambda: count_fds() == before, "all fds are closed")
    assert bench.servers["dev0"].rejected == 1
    assert len(bench.log.messages) == 1
    assert peer.config_read(0, 4) == 0x00421B36
    bench.resample(pair)  # the pair of before is still the one
    assert pair.written() == 1
    check_victim(bench, victim)


def test_rest_of_a_frame_may_take_its_time(bench: RemoteBench, peer: Peer) -> None:
    request = request_frame(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
    for _ in range(3):
        peer.send_bytes(request[:20])
        bench.settle()
        bench.clock.now += 4.9
        bench.loop.step()
        peer.send_bytes(request[20:22])
        bench.settle()
        peer.send_bytes(request[22:])
        bench.settle()
        assert peer.receive() == 0x00421B36
    bench.clock.now += 60
    bench.loop.step()
    assert not peer.has_ended


@pytest.mark.parametrize("size", [28, 30, 40, 100])
def test_client_that_always_owes_half_a_frame_lives_as_long_as_each_ends_in_time(
    bench: RemoteBench, peer: Peer, size: int
) -> None:
    request = request_frame(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
    stream = request * 4 * size
    replies = 0
    peer.send_bytes(stream[:13])
    for start in range(13, len(stream) // 2, size):
        bench.settle()
        bench.clock.now += 4.9
        bench.loop.step()
        peer.send_bytes(stream[start : start + size])
        bench.settle()
        while peer.receive() == 0x00421B36:
            replies += 1
    assert replies >= size


def test_link_whose_other_end_remoted_itself_was_sent_ends_by_the_clock(bench: RemoteBench) -> None:
    """The client's own socket, in a frame that never ends: closing it is no end of the stream."""
    before = count_fds()
    with bench.connect("dev0") as peer:
        peer.send_bytes(SET_IRQFD[:9], [peer.sock.fileno()])
    bench.settle()
    assert bench.idle == 0
    bench.clock.now += 60
    bench.loop.step()
    assert bench.idle == 1
    wait_until(lambda: count_fds() == before, "all fds are closed")


def test_session_that_ended_within_a_frame_isnt_ended_again_by_the_clock(bench: RemoteBench) -> None:
    with bench.connect("dev0") as peer:
        peer.send_bytes(SET_IRQFD[:9])
        bench.settle()
    bench.settle()
    bench.log.records.clear()
    bench.clock.now += 60
    bench.loop.step()
    assert bench.log.messages == []


def test_silence_between_frames_costs_nothing(bench: RemoteBench, peer: Peer) -> None:
    bench.clock.now += 1e6
    bench.loop.step()
    assert peer.config_read(0, 4) == 0x00421B36


def test_client_that_sends_ahead_without_end_doesnt_starve_others(
    bench: RemoteBench, victim: Victim, peer: Peer
) -> None:
    """It reads its replies, so it may go on; its frames end nowhere where a read of remoted's does."""
    request = request_frame(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
    other, pair = victim
    other.drive(True)
    pair.written()
    for _ in range(200):
        peer.send_bytes(request)
    pair.resamplefd.set()
    other.send(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
    for _ in range(2):  # the other's message goes before its resample
        bench.loop.step()
    assert pair.written() == 1
    assert other.receive() == 0x00421B36
    answered = sum(1 for _ in iter(peer.receive, None))
    assert 0 < answered < 200


def test_rejected_messages_are_counted_but_dont_fill_the_log(bench: RemoteBench, peer: Peer) -> None:
    for _ in range(1000):
        peer.send(Command.SET_IRQFD)
        bench.settle()
    assert bench.servers["dev0"].rejected == 1000
    assert len(bench.log.records) < 100


def test_client_that_comes_again_and_again_doesnt_fill_the_log(bench: RemoteBench) -> None:
    for _ in range(500):
        with bench.connect("dev0") as peer:
            peer.send_bytes(frame(99, 0))
        bench.settle()
    assert bench.servers["dev0"].rejected == 500
    assert len(bench.log.records) < 100


# The log


@pytest.mark.parametrize("act", [*REJECTED.values(), *ENDING.values()], ids=[*REJECTED, *ENDING])
def test_each_line_about_a_client_names_it(
    bench: RemoteBench, act: Callable[[RemoteBench, Peer], None]
) -> None:
    """From its connection to its end, and also who is refused meanwhile."""
    bench.log.records.clear()
    with bench.connect("dev0") as peer, bench.connect("dev0"):
        act(bench, peer)
        bench.settle()
    bench.settle()
    bench.clock.now += 60
    bench.loop.step()
    assert len(bench.log.records) >= 3
    for record in bench.log.records:
        assert record.__dict__.get("peer", "").endswith(f"[{os.getpid()}]"), record.getMessage()


# File descriptors in the long run


def test_fds_after_1000_reconnects(bench: RemoteBench) -> None:
    before = count_fds()
    for turn in range(1000):
        with bench.connect("dev0") as peer:
            pair = peer.set_irqfd()
            if turn % 2:
                peer.send_bytes(SET_IRQFD[:9], pair.fds * 4)
        bench.settle()
    wait_until(lambda: count_fds() == before, "all fds are closed")
    assert bench.idle == 1000


def test_fds_after_1000_replaced_irqfds(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    before = count_fds()
    for _ in range(1000):
        peer.forget(peer.set_irqfd())
    wait_until(lambda: count_fds() == before, "all fds are closed")
    peer.drive(True)
    assert peer.set_irqfd().written() == 1


def test_fds_after_1000_rejected_frames(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    before = count_fds()
    for act in itertools.islice(itertools.cycle(REJECTED.values()), 1000):
        act(bench, peer)
        bench.settle()
        wait_until(lambda: count_fds() == before, "all fds are closed")
    assert bench.servers["dev0"].rejected == 1000
    peer.drive(True)
    assert pair.written() == 1


def test_fds_after_1000_sessions_that_ended_badly(bench: RemoteBench) -> None:
    before = count_fds()
    acts = [act for name, act in ENDING.items() if name != "flood without reading replies"]
    for act in itertools.islice(itertools.cycle(acts), 1000):
        with bench.connect("dev0") as peer:
            act(bench, peer)
            bench.settle()
    bench.settle()
    wait_until(lambda: count_fds() == before, "all fds are closed")
    assert bench.servers["dev0"].rejected == 1000
