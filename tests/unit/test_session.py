# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions over real sockets and eventfds: interrupts never lost nor invented, bad input paid by its sender."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import mpqemu
from common.mpqemu import BAR, CONFIG, SYSMEM, Command, request_frame
from tests.support.fds import count_fds
from tests.support.remotebench import IO_BASE, MEM64_BASE, MEM_BASE, LineDevice, Pair, Peer, RemoteBench

ONES = 0xFFFFFFFFFFFFFFFF
FULL = (1 << 64) - 2


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[RemoteBench]:
    before = count_fds()
    bench = RemoteBench(tmp_path)
    bench.add(LineDevice, "dev0", 0x28)
    bench.add(LineDevice, "dev1", 0x30)
    yield bench
    bench.close()
    assert count_fds() == before


@pytest.fixture
def peer(bench: RemoteBench) -> Iterator[Peer]:
    with bench.connect("dev0") as peer:
        peer.enable()
        yield peer


@pytest.fixture
def pair(peer: Peer) -> Pair:
    return peer.set_irqfd()


def written(pair: Pair) -> int:
    """How often the irqfd was written since the last look."""
    try:
        return os.eventfd_read(pair.irqfd.fd)
    except BlockingIOError:
        return 0


def resample(bench: RemoteBench, pair: Pair) -> None:
    """What KVM does at an EOI."""
    pair.resamplefd.set()
    bench.settle()


# Levels


def test_intx_disable_set_and_cleared_while_high_leaves_nothing_behind(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    """The line is a boolean: after it fell, no resample finds it high, and the next raise is signalled."""
    peer.drive(True)
    peer.disable_intx(True)
    peer.disable_intx(False)
    peer.drive(False)
    written(pair)
    for _ in range(4):
        resample(bench, pair)
    assert written(pair) == 0
    peer.drive(True)
    assert written(pair) == 1


def test_irqfd_is_written_once_for_each_effective_rise(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    for _ in range(3):
        peer.drive(True)
        peer.drive(True)
        assert written(pair) == 1
        peer.disable_intx(True)
        assert written(pair) == 0
        peer.disable_intx(False)
        assert written(pair) == 1
        peer.drive(False)
        assert written(pair) == 0


@pytest.mark.parametrize("count", [1, 4, FULL])
def test_resample_is_read_once_and_asserts_what_is_still_high(
    bench: RemoteBench, peer: Peer, pair: Pair, count: int
) -> None:
    peer.drive(True)
    written(pair)
    os.eventfd_write(pair.resamplefd.fd, count)
    bench.settle()
    assert written(pair) == 1
    assert not pair.resamplefd.test_and_clear()
    peer.disable_intx(True)
    os.eventfd_write(pair.resamplefd.fd, count)
    bench.settle()
    assert written(pair) == 0
    assert not pair.resamplefd.test_and_clear()


def test_acknowledgement_that_was_received_before_the_resample_counts(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    peer.drive(True)
    written(pair)
    peer.queue_line(False)
    pair.resamplefd.set()
    bench.settle()
    assert written(pair) == 0
    assert peer.receive() == 0


def test_acknowledgement_behind_other_messages_and_in_pieces_counts(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    acknowledge = request_frame(Command.BAR_WRITE, BAR.pack(IO_BASE, 0, 1, False))
    for cut in range(1, len(acknowledge)):
        peer.drive(True)
        written(pair)
        pair.resamplefd.set()
        for _ in range(10):
            peer.send(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
        peer.send_bytes(acknowledge[:cut])
        peer.send_bytes(acknowledge[cut:])
        bench.settle()
        assert written(pair) == 0
        assert [peer.receive() for _ in range(12)] == [0x00421B36] * 10 + [0, None]


def test_acknowledgements_of_all_functions_count_before_the_resample_of_their_gsi(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    """Both share a GSI: KVM tells both of the EOI. One is acknowledged, one isn't."""
    with bench.connect("dev1") as other:
        other.enable()
        others = other.set_irqfd()
        for acknowledged, still_high in ((peer, others), (other, pair)):
            peer.drive(True)
            other.drive(True)
            written(pair), written(others)
            acknowledged.queue_line(False)
            pair.resamplefd.set()
            others.resamplefd.set()
            bench.settle()
            assert acknowledged.receive() == 0
            assert {"pair": written(pair), "others": written(others)} == {
                "pair": int(still_high is pair),
                "others": int(still_high is others),
            }
            peer.drive(False)
            other.drive(False)


def test_new_irqfd_is_written_at_once_while_the_line_is_high(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    peer.drive(True)
    written(pair)
    new = peer.set_irqfd()
    assert written(new) == 1
    assert written(pair) == 0
    resample(bench, new)
    assert written(new) == 1
    pair.resamplefd.set()
    bench.settle()
    assert written(new) == written(pair) == 0


def test_level_that_rose_before_any_irqfd_reaches_the_first_one(bench: RemoteBench, peer: Peer) -> None:
    peer.drive(True)
    assert written(peer.set_irqfd()) == 1


def test_level_that_rose_without_a_client_reaches_the_next_one(bench: RemoteBench) -> None:
    bench.servers["dev0"].function.set_intx(True)
    with bench.connect("dev0") as peer:
        assert written(peer.set_irqfd()) == 1


def test_new_irqfd_is_left_alone_while_the_line_is_low_or_disabled(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    assert written(peer.set_irqfd()) == 0
    peer.drive(True)
    peer.disable_intx(True)
    assert written(peer.set_irqfd()) == 0


def test_replaced_pair_is_closed(bench: RemoteBench, peer: Peer) -> None:
    peer.forget(peer.set_irqfd())
    before = count_fds()
    for _ in range(10):
        peer.forget(peer.set_irqfd())
    assert count_fds() == before


def test_status_bit_is_the_raw_level_and_intx_disable_gates_the_line_only(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    peer.drive(True)
    assert peer.config_read(0x06, 2) == 0x08
    written(pair)
    peer.config_write(0x04, 2, 0x403)
    assert peer.config_read(0x04, 4) == 0x80403
    peer.config_write(0x06, 2, 0xFFFF)
    assert peer.config_read(0x06, 2) == 0x08
    assert written(pair) == 0
    peer.config_write(0x04, 2, 0x003)
    assert written(pair) == 1
    peer.drive(False)
    assert peer.config_read(0x06, 2) == 0


def test_reset_lowers_the_line_and_forgets_what_was_pending(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    peer.drive(True)
    written(pair)
    assert peer.call(Command.DEVICE_RESET) == 0
    resample(bench, pair)
    assert written(pair) == 0
    assert [peer.config_read(addr, 4) for addr in (0x04, 0x10, 0x14, 0x3C)] == [0, 1, 0, 0x0100]
    peer.enable()
    peer.drive(True)
    assert written(pair) == 1


def test_reset_and_resample_queued_together(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    peer.drive(True)
    written(pair)
    peer.send(Command.DEVICE_RESET)
    pair.resamplefd.set()
    bench.settle()
    assert written(pair) == 0
    assert peer.receive() == 0


def test_reset_while_disabled_leaves_nothing_behind(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    peer.drive(True)
    peer.disable_intx(True)
    written(pair)
    peer.call(Command.DEVICE_RESET)
    peer.enable()
    resample(bench, pair)
    assert written(pair) == 0
    assert peer.config_read(0x06, 2) == 0


# Accesses


def test_config_space_byte_by_byte_to_its_last(peer: Peer) -> None:
    peer.config_write(0xFC, 4, 0xA4A3A2A1)
    assert [peer.config_read(addr, 1) for addr in range(256)][-4:] == [0xA1, 0xA2, 0xA3, 0xA4]
    assert [peer.config_read(addr, 2) for addr in (0xFE, 0x00)] == [0xA4A3, 0x1B36]


@pytest.mark.parametrize(
    ("addr", "size"),
    [
        (0xFD, 4),
        (0xFF, 2),
        (0x100, 1),
        (0xFFFFFFFF, 4),
        *((0, size) for size in (0, 3, 5, 64, 256, 200_000, -1, -0x80000000)),
    ],
)
def test_config_access_out_of_range_is_answered_with_all_ones(peer: Peer, addr: int, size: int) -> None:
    assert peer.config_read(addr, size) == ONES
    assert peer.config_write(addr, size, 0) == ONES
    assert peer.config_read(0, 2) == 0x1B36


@pytest.mark.parametrize(
    ("memory", "addr", "size"),
    [
        *itertools.product([False, True], [0, 0xC010, 0xFEB01000, MEM64_BASE - 1, ONES], [1, 8]),
        *itertools.product([True], [MEM_BASE, MEM64_BASE], [0, 3, 16, 0xFFFFFFFF]),
        (False, IO_BASE + 16, 2),
        (True, MEM_BASE + 4095, 8),
        (True, IO_BASE, 1),
        (False, MEM_BASE, 1),
    ],
)
def test_bar_access_out_of_range_is_answered_with_all_ones(
    peer: Peer, memory: bool, addr: int, size: int
) -> None:
    assert peer.bar_read(memory, addr, size) == ONES
    assert peer.bar_write(memory, addr, size, 1) == ONES
    assert peer.bar_read(True, MEM_BASE, 4) == 0


@pytest.mark.parametrize(
    ("memory", "base"), [(False, IO_BASE), (True, MEM_BASE), (True, MEM64_BASE)], ids=["io", "mem", "mem64"]
)
def test_bar_access(peer: Peer, memory: bool, base: int) -> None:
    assert peer.bar_write(memory, base + 8, 8, 0x8877665544332211) == 0
    assert [peer.bar_read(memory, base + 8, size) for size in (1, 2, 4, 8)] == [
        0x11,
        0x2211,
        0x44332211,
        0x8877665544332211,
    ]


def test_requests_sent_ahead_are_answered_in_order(bench: RemoteBench, peer: Peer) -> None:
    """No client should; one that does costs nobody anything, and none of its frames is lost."""
    for value in range(50):
        peer.send(Command.BAR_WRITE, BAR.pack(MEM_BASE + 8, value, 4, True))
        peer.send(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 2))
        peer.send(Command.BAR_READ, BAR.pack(MEM_BASE + 8, 0, 4, True))
    bench.settle()
    assert [peer.receive() for _ in range(151)] == [
        *itertools.chain.from_iterable((0, 0x1B36, value) for value in range(50)),
        None,
    ]


# File descriptors


@pytest.mark.parametrize(
    "frame",
    [
        request_frame(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4)),
        request_frame(Command.PCI_CFGWRITE, CONFIG.pack(0x40, 0, 4)),
        request_frame(Command.BAR_READ, BAR.pack(MEM_BASE, 0, 4, True)),
        request_frame(Command.BAR_WRITE, BAR.pack(MEM_BASE + 8, 0, 4, True)),
        request_frame(Command.DEVICE_RESET),
    ],
    ids=["config read", "config write", "bar read", "bar write", "reset"],
)
def test_fds_of_a_message_that_must_not_carry_any_are_closed(
    bench: RemoteBench, peer: Peer, frame: bytes
) -> None:
    before = count_fds()
    with open(os.devnull, "rb") as null:
        for _ in range(20):
            peer.send_bytes(frame, [null.fileno()] * 7)
            bench.settle()
            assert peer.receive() is not None
    assert count_fds() == before
    assert not peer.has_ended


def test_end_of_the_link_closes_irqfd_and_resamplefd_at_once(bench: RemoteBench) -> None:
    """The VMM has closed its copies: these are the last, and KVM drops the irqfd with them."""
    before = count_fds()
    peer = bench.connect("dev0")
    peer.forget(peer.set_irqfd())
    assert count_fds() == before + 4
    peer.close()
    bench.settle()
    assert count_fds() == before


def test_end_of_the_link_while_asserted_keeps_the_level_for_the_next_client(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    peer.drive(True)
    peer.close()
    bench.settle()
    assert not bench.hub.pirqs[0x28].has_irqfd
    with bench.connect("dev0") as again:
        assert written(again.set_irqfd()) == 1


def test_eventfds_that_the_peer_made_blocking_hold_nobody(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    for fd in pair.fds:
        os.set_blocking(fd, True)
    peer.drive(True)
    resample(bench, pair)
    bench.servers["dev0"].pirq._on_resample(0)  # as after a resample that somebody else has read
    assert os.eventfd_read(pair.irqfd.fd) == 2
    os.eventfd_write(pair.irqfd.fd, FULL)
    resample(bench, pair)
    peer.drive(False)
    peer.drive(True)
    assert os.eventfd_read(pair.irqfd.fd) == FULL


# Bad input. What it may cost is its sender's session, nothing else.


def frame(command: int, size: int, data: bytes = b"") -> bytes:
    return struct.pack("<i4xQ", command, size) + data


def send(data: bytes) -> Callable[[RemoteBench, Peer], None]:
    def act(bench: RemoteBench, peer: Peer) -> None:
        peer.send_bytes(data)

    return act


def then_silence(data: bytes, fds: int = 0) -> Callable[[RemoteBench, Peer], None]:
    def act(bench: RemoteBench, peer: Peer) -> None:
        with open(os.devnull, "rb") as null:
            peer.send_bytes(data, [null.fileno()] * fds)
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
    "size of minus one": send(frame(Command.PCI_CFGREAD, ONES)),
    "ret": send(mpqemu.reply_frame(0)),
    "command 8": send(frame(8, 0)),
    "command -1": send(frame(-1, 0)),
    "command 0x7fffffff": send(frame(0x7FFFFFFF, 12, bytes(12))),
    "garbage": send(bytes(range(256)) * 4),
    "http": send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "9 fds": with_fds(SET_IRQFD, *["eventfd"] * 9),
    "200 fds": with_fds(request_frame(Command.DEVICE_RESET), *["null"] * 200),
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
    assert written(pair) == 1
    resample(bench, pair)
    assert written(pair) == 1
    peer.drive(False)
    resample(bench, pair)
    assert written(pair) == 0


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
        written(pair)
        assert bench.servers["dev0"].rejected == 1
        assert len(bench.log.messages) == 1
        assert bench.log.messages[0].count("\n") == 0
        check_victim(bench, victim)
    with bench.connect("dev0") as again:
        assert again.config_read(0, 4) == 0x00421B36
        new = again.set_irqfd()
        assert written(new) == 1  # the level that rose in the session before
        again.drive(False)
        resample(bench, new)
        assert written(new) == 0
    bench.settle()
    assert count_fds() == before


@pytest.mark.parametrize("act", REJECTED.values(), ids=REJECTED)
def test_unfit_message_without_reply_is_dropped_and_the_session_goes_on(
    bench: RemoteBench, victim: Victim, peer: Peer, pair: Pair, act: Callable[[RemoteBench, Peer], None]
) -> None:
    peer.drive(True)
    assert written(pair) == 1
    before = count_fds()
    bench.log.records.clear()
    act(bench, peer)
    assert not peer.has_ended
    assert count_fds() == before
    assert bench.servers["dev0"].rejected == 1
    assert len(bench.log.messages) == 1
    assert peer.config_read(0, 4) == 0x00421B36
    resample(bench, pair)  # the pair of before is still the one
    assert written(pair) == 1
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
    assert count_fds() == before


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
    written(pair)
    for _ in range(200):
        peer.send_bytes(request)
    pair.resamplefd.set()
    other.send(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
    bench.loop.step()
    assert written(pair) == 1
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


# File descriptors in the long run


def test_fds_after_1000_reconnects(bench: RemoteBench) -> None:
    before = count_fds()
    for turn in range(1000):
        with bench.connect("dev0") as peer:
            pair = peer.set_irqfd()
            if turn % 2:
                peer.send_bytes(SET_IRQFD[:9], pair.fds * 4)
        bench.settle()
    assert count_fds() == before
    assert bench.idle == 1000


def test_fds_after_1000_replaced_irqfds(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    before = count_fds()
    for _ in range(1000):
        peer.forget(peer.set_irqfd())
    assert count_fds() == before
    peer.drive(True)
    assert written(peer.set_irqfd()) == 1


def test_fds_after_1000_rejected_frames(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    before = count_fds()
    for act in itertools.islice(itertools.cycle(REJECTED.values()), 1000):
        act(bench, peer)
        bench.settle()
    assert count_fds() == before
    assert bench.servers["dev0"].rejected == 1000
    peer.drive(True)
    assert written(pair) == 1


def test_fds_after_1000_sessions_that_ended_badly(bench: RemoteBench) -> None:
    before = count_fds()
    acts = [act for name, act in ENDING.items() if name != "flood without reading replies"]
    for act in itertools.islice(itertools.cycle(acts), 1000):
        with bench.connect("dev0") as peer:
            act(bench, peer)
            bench.settle()
    bench.settle()
    assert count_fds() == before
    assert bench.servers["dev0"].rejected == 1000
