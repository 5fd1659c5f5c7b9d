# SPDX-License-Identifier: GPL-2.0-or-later
"""The serving end of a link: framing, the fds that belong to a frame, whose end it is. Over a real socketpair."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import pytest

from common.disposal import Disposal
from common.errors import PeerGone, ProtocolError, ShortageError
from common.link import Link
from common.mpqemu import BAR, CONFIG, ERROR, SYSMEM, Command, reply_frame, request_frame
from common.peer import peer_credentials
from tests.support.fds import await_fds, count_fds, identity, no_more_fds, send_fds
from tests.support.lives import check_lives
from tests.support.unsendable import returns_soon, unsendable_socket
from tests.support.wait import wait_until


class Frame(NamedTuple):
    """One frame and how many fds come with it."""

    data: bytes
    fds: int = 0


RESET = request_frame(Command.DEVICE_RESET)
CONFIG_READ = request_frame(Command.PCI_CFGREAD, CONFIG.pack(0x3D, 0x11223344, 1))
BAR_WRITE = request_frame(Command.BAR_WRITE, BAR.pack(0xFEDCBA9876543210, 0x1122334455667788, 8, True))
SYNC = request_frame(Command.SYNC_SYSMEM, SYSMEM.pack(*range(1, 25)))
SET_IRQFD = request_frame(Command.SET_IRQFD)

ALL_FRAMES = [
    Frame(RESET),
    Frame(CONFIG_READ),
    Frame(BAR_WRITE),
    Frame(SYNC),
    Frame(SYNC, 1),
    Frame(SYNC, 8),
    Frame(SET_IRQFD, 2),
]
UNWELCOME = [Frame(RESET, 3), Frame(CONFIG_READ, 1), Frame(BAR_WRITE, 8)]
"""fds that must not be there"""

Received = tuple[int, bytes, list[str]]


class Bench:
    """A Link, its peer, and fresh fds to send whose copies can be told apart."""

    def __init__(self) -> None:
        self.peer, sock = socket.socketpair()
        self.link = Link(sock, Disposal())

    def send(self, frame: Frame, *cuts: int) -> Received:
        """Sends a frame in one piece or cut at some bytes, fds on the first; what must arrive of it."""
        fds = [os.eventfd(0) for _ in range(frame.fds)]
        try:
            edges = [0, *cuts, len(frame.data)]
            for number, (start, end) in enumerate(itertools.pairwise(edges)):
                send_fds(self.peer, frame.data[start:end], fds if number == 0 else ())
            return expected(frame, [identity(fd) for fd in fds])
        finally:
            for fd in fds:
                os.close(fd)

    def receive(self) -> Received | None:
        """What a session sees: it takes the fds of the two commands that have any."""
        command = self.link.receive()
        if command < 0:
            return None
        fds: list[int] = []
        if command in (Command.SYNC_SYSMEM, Command.SET_IRQFD):
            fds = self.link.take_fds()
        names = [identity(fd) for fd in fds]
        for fd in fds:
            os.close(fd)
        size = {
            Command.SYNC_SYSMEM: SYSMEM.size,
            Command.PCI_CFGREAD: CONFIG.size,
            Command.BAR_WRITE: BAR.size,
        }.get(Command(command), 0)
        return command, bytes(self.link.payload[:size]), names

    def receive_all(self) -> list[Received]:
        """Frames until nothing is left; -1 comes between the pieces of one."""
        received: list[Received] = []
        idle = 0
        while idle < 3:
            one = self.receive()
            if one is None:
                idle += 1
            else:
                idle = 0
                received.append(one)
        return received


def expected(frame: Frame, names: list[str]) -> Received:
    command, _ = struct.unpack_from("<i4xQ", frame.data)
    wanted = command in (Command.SYNC_SYSMEM, Command.SET_IRQFD)
    return command, frame.data[16:], names if wanted else []


@contextlib.contextmanager
def open_bench() -> Iterator[Bench]:
    """Closes both ends, and checks that nothing else has stayed open."""
    before = count_fds()
    bench = Bench()
    try:
        yield bench
    finally:
        bench.link.close()
        bench.peer.close()
    await_fds(before)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with open_bench() as bench:
        yield bench


@pytest.mark.parametrize("frame", ALL_FRAMES)
def test_whole_frame(bench: Bench, frame: Frame) -> None:
    wanted = bench.send(frame)
    assert bench.receive_all() == [wanted]


@pytest.mark.parametrize("frame", ALL_FRAMES)
def test_frame_byte_by_byte(bench: Bench, frame: Frame) -> None:
    """Only the last byte completes it, and its fds, sent with the first byte, are kept until then."""
    fds = [os.eventfd(0) for _ in range(frame.fds)]
    wanted = expected(frame, [identity(fd) for fd in fds])
    send_fds(bench.peer, frame.data[:1], fds)
    for byte in frame.data[1:]:
        assert bench.receive() is None
        assert bench.link.is_partial
        send_fds(bench.peer, bytes([byte]))
    assert bench.receive_all() == [wanted]
    assert not bench.link.is_partial
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_frame_of_a_queue_gets_its_own_fds(bench: Bench, count: int) -> None:
    for frames in itertools.product(ALL_FRAMES, repeat=count):
        wanted = [bench.send(frame) for frame in frames]
        assert bench.receive_all() == wanted


def test_unwelcome_fds_never_reach_the_next_frame(bench: Bench) -> None:
    for frames in itertools.product(ALL_FRAMES, UNWELCOME, ALL_FRAMES):
        wanted = [bench.send(frame) for frame in frames]
        assert bench.receive_all() == wanted


def test_frames_in_two_pieces_keep_their_fds_apart(bench: Bench) -> None:
    """Every cut of a header with fds, behind and before frames that a read could run into."""
    cuttable = [frame for frame in ALL_FRAMES if frame.fds]
    for first, second, third in itertools.product(ALL_FRAMES, cuttable, ALL_FRAMES):
        for cut in range(1, 16):
            wanted = [bench.send(first)]
            wanted.append(bench.send(second, *([cut] if cut < len(second.data) else [])))
            wanted.append(bench.send(third))
            assert bench.receive_all() == wanted


Sent = tuple[Frame, list[int], int]
"""a frame, where it is cut, and how many reads are tried before the next"""


def draw_traffic(random: Random) -> list[Sent]:
    return [
        (
            frame,
            sorted(random.sample(range(1, len(frame.data)), random.randrange(4))),
            random.choice((0, 0, 1, 2, 3)),
        )
        for frame in random.choices(ALL_FRAMES + UNWELCOME, k=random.randint(1, 12))
    ]


def exchange(traffic: Sequence[Sent]) -> None:
    with open_bench() as bench:
        wanted, received = [], []
        for frame, cuts, pace in traffic:
            wanted.append(bench.send(frame, *cuts))
            for _ in range(pace):
                one = bench.receive()
                if one is not None:
                    received.append(one)
        assert received + bench.receive_all() == wanted


def test_any_fragments_at_any_pace() -> None:
    check_lives(300, draw_traffic, exchange, str)


def test_fds_sent_with_glued_frames_go_to_the_one_that_may_have_them(bench: Bench) -> None:
    """One sendmsg for two frames: the kernel doesn't say whose byte the fds came with."""
    fds = [os.eventfd(0), os.eventfd(0)]
    names = [identity(fd) for fd in fds]
    send_fds(bench.peer, RESET + SET_IRQFD, fds)
    send_fds(bench.peer, SET_IRQFD + CONFIG_READ, fds)
    assert [(command, got) for command, _, got in bench.receive_all()] == [
        (Command.DEVICE_RESET, []),
        (Command.SET_IRQFD, names),
        (Command.SET_IRQFD, names),
        (Command.PCI_CFGREAD, []),
    ]
    for fd in fds:
        os.close(fd)


def test_fds_that_come_with_payload_are_closed(bench: Bench) -> None:
    before = count_fds()
    fd = os.eventfd(0)
    send_fds(bench.peer, SYNC[:16])
    assert bench.receive() is None
    send_fds(bench.peer, SYNC[16:100], [fd] * 8)
    assert bench.receive() is None
    send_fds(bench.peer, SYNC[100:], [fd])
    assert bench.receive_all() == [(Command.SYNC_SYSMEM, SYNC[16:], [])]
    os.close(fd)
    await_fds(before)


def test_fds_that_nobody_takes_are_closed_with_the_next_receive(bench: Bench) -> None:
    before = count_fds()
    bench.send(Frame(SET_IRQFD, 2))
    assert bench.link.receive() == Command.SET_IRQFD
    await_fds(before + 2)
    assert bench.link.receive() == -1
    await_fds(before)


@pytest.mark.parametrize("frame", UNWELCOME)
def test_unwelcome_fds_are_closed_at_once(bench: Bench, frame: Frame) -> None:
    before = count_fds()
    bench.send(frame)
    assert bench.link.receive() >= 0
    await_fds(before)


def test_close_closes_fds_of_a_frame_that_never_ended(bench: Bench) -> None:
    before = count_fds()
    fds = [os.eventfd(0) for _ in range(3)]
    send_fds(bench.peer, SYNC[:5], fds)
    for fd in fds:
        os.close(fd)
    assert bench.receive() is None
    await_fds(before + 3)
    bench.link.close()
    bench.link.close()
    await_fds(before - 1)


@pytest.mark.parametrize("count", [9, 10, 253])
def test_more_fds_than_a_message_may_have(bench: Bench, count: int) -> None:
    fd = os.eventfd(0)
    send_fds(bench.peer, SET_IRQFD, [fd] * count)
    os.close(fd)
    with pytest.raises(ProtocolError, match="more than 8 file descriptors"):
        bench.receive()


def test_more_fds_than_a_message_may_have_in_pieces(bench: Bench) -> None:
    fd = os.eventfd(0)
    send_fds(bench.peer, SET_IRQFD[:5], [fd] * 8)
    send_fds(bench.peer, SET_IRQFD[5:9], [fd])
    os.close(fd)
    assert bench.receive() is None
    with pytest.raises(ProtocolError, match="more than 8 file descriptors"):
        bench.receive()


def test_fds_that_are_lost_for_want_of_room_are_told(bench: Bench) -> None:
    fd = os.eventfd(0)
    send_fds(bench.peer, SET_IRQFD, [fd, fd])
    os.close(fd)
    with no_more_fds(), pytest.raises(ShortageError, match="too many files are open here"):
        bench.receive()


HOSTILE = {
    "with a frame that has none": [(RESET, True)],
    "with a frame that nobody takes them of": [(SET_IRQFD, True)],
    "with a payload": [(SYNC[:16], False), (SYNC[16:], True)],
    "with a frame that doesn't end": [(SYNC[:5], True)],
    "with bytes that nobody reads": [(RESET, False), (RESET, False), (SYNC, True)],
}


@pytest.mark.parametrize("pieces", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("flags", [0, socket.MSG_OOB])
def test_fds_whose_close_lasts_delay_nobody(pieces: list[tuple[bytes, bool]], flags: int) -> None:
    before = count_fds()
    with unsendable_socket() as sock:
        bench = Bench()
        for data, has_fds in pieces:
            send_fds(bench.peer, data, [sock.fileno()] if has_fds else [], flags)
        sock.close()

        def use() -> None:
            for _ in range(2):
                bench.link.receive()
            bench.link.close()

        assert returns_soon(use)
    bench.peer.close()
    wait_until(lambda: count_fds() == before, "all fds are closed")


def test_a_peer_that_goes_on_sending_fds_whose_close_lasts_loses_its_link() -> None:
    before = count_fds()
    with unsendable_socket() as sock, open(os.devnull, "rb") as null:
        bench = Bench()
        send_fds(bench.peer, RESET, [sock.fileno(), *[null.fileno()] * 4])
        sock.close()
        for _ in range(51):
            assert bench.link.receive() == Command.DEVICE_RESET
            send_fds(bench.peer, RESET, [null.fileno()] * 5)
        with pytest.raises(ProtocolError, match="too many file descriptors that take long to close"):
            bench.link.receive()
        bench.link.close()
    bench.peer.close()
    wait_until(lambda: count_fds() == before, "all fds are closed")


def test_a_peer_that_sends_none_of_these_loses_nothing_by_those_of_others() -> None:
    before = count_fds()
    with unsendable_socket() as sock:
        place = Disposal()
        place.close_fds([sock.detach(), *[os.open("/", os.O_PATH) for _ in range(255)]])
        assert place.is_full
        ours, theirs = socket.socketpair()
        link = Link(ours, place)
        with theirs:
            link.discard([])
            link.discard([os.eventfd(0)])
            with pytest.raises(ProtocolError, match="too many file descriptors that take long to close"):
                link.discard([os.open("/", os.O_PATH)])
            link.close()
    wait_until(lambda: count_fds() == before, "all fds are closed")


def test_received_fds_are_close_on_exec(bench: Bench) -> None:
    sent = os.eventfd(0)
    os.set_inheritable(sent, True)
    send_fds(bench.peer, SET_IRQFD, [sent, sent])
    os.close(sent)
    assert bench.link.receive() == Command.SET_IRQFD
    fds = bench.link.take_fds()
    inheritable = [os.get_inheritable(fd) for fd in fds]
    for fd in fds:
        os.close(fd)
    assert inheritable == [False, False]


@pytest.mark.parametrize("frame", [Frame(RESET), Frame(SYNC, 8)])
def test_end_of_stream_within_a_frame(bench: Bench, frame: Frame) -> None:
    for cut in (1, 15, 16, 17, 100):
        if cut < len(frame.data):
            with open_bench() as other:
                fds = [os.eventfd(0) for _ in range(frame.fds)]
                send_fds(other.peer, frame.data[:cut], fds)
                for fd in fds:
                    os.close(fd)
                other.peer.close()
                assert other.receive() is None
                with pytest.raises(PeerGone, match="within a frame"):
                    other.receive_all()


def test_end_of_stream_comes_after_what_was_sent(bench: Bench) -> None:
    wanted = [bench.send(Frame(CONFIG_READ)), bench.send(Frame(SET_IRQFD, 2))]
    bench.peer.close()
    assert [bench.receive(), bench.receive()] == wanted
    with pytest.raises(PeerGone, match=r"closed the link$"):
        bench.receive()


@pytest.mark.parametrize(
    ("command", "size"),
    [(Command.PCI_CFGREAD, 13), (Command.SYNC_SYSMEM, 1 << 63), (Command.RET, 8), (8, 0), (-1, 0)],
)
def test_bad_header_is_refused_before_its_payload_is_here(bench: Bench, command: int, size: int) -> None:
    send_fds(bench.peer, struct.pack("<i4xQ", command, size))
    with pytest.raises(ProtocolError):
        bench.receive()


def test_bad_header_behind_a_good_frame(bench: Bench) -> None:
    send_fds(bench.peer, CONFIG_READ + struct.pack("<i4xQ", 99, 0))
    assert bench.receive() is not None
    with pytest.raises(ProtocolError, match="command 99"):
        bench.receive_all()


def test_reply(bench: Bench) -> None:
    bench.link.reply(0x8877665544332211)
    bench.link.reply(ERROR)
    assert bench.peer.recv(100) == reply_frame(0x8877665544332211) + reply_frame(ERROR)


def test_reply_to_a_peer_that_has_gone(bench: Bench) -> None:
    bench.peer.close()
    with pytest.raises(PeerGone):
        bench.link.reply(0)


def test_replies_that_nobody_reads_end_in_an_error_not_in_waiting(bench: Bench) -> None:
    def flood() -> None:
        while True:
            bench.link.reply(0)

    with pytest.raises(ProtocolError, match="doesn't read its replies"):
        flood()


def test_credentials_name_the_peer(bench: Bench) -> None:
    peer = peer_credentials(bench.peer)
    assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.getuid(), os.getgid())
    assert str(peer).endswith(f"[{os.getpid()}]")
    assert str(peer._replace(pid=1 << 30)) == f"pid {1 << 30}"


def test_a_peers_name_cant_forge_a_log_line(bench: Bench) -> None:
    comm = "/proc/self/comm"
    with open(comm, encoding="utf-8") as file:
        name = file.read().rstrip("\n")
    try:
        with open(comm, "w", encoding="utf-8") as file:
            file.write("a\nb\x1b[2J")
        text = str(peer_credentials(bench.peer))
    finally:
        with open(comm, "w", encoding="utf-8") as file:
            file.write(name)
    assert text == f"a?b?[2J[{os.getpid()}]"
