# SPDX-License-Identifier: GPL-2.0-or-later
"""A session of vfio-user: negotiation, order, what is answered and what ends it."""

from __future__ import annotations

import errno
import os

import pytest

from common import mpqemu
from common.vfiouser import (
    DEVICE_INFO,
    DMA_MAP,
    HEADER,
    IRQ_SET,
    MAX_SIZE,
    REGION_ACCESS,
    VERSION,
    Command,
    Flag,
)
from remoted.clientsession import HALF_MESSAGE_SECONDS
from tests.support.fds import await_fds, count_fds, send_fds
from tests.support.remotebench import LineDevice, RemoteBench
from tests.support.vfiouserbench import TRIGGER, VfioUserPeer, signals

INFO = DEVICE_INFO.pack(16, 0, 0, 0)


@pytest.mark.parametrize(
    "text", [b"", b"{}\0", b'{"capabilities":{}}\0', b'{"capabilities":{"x":[1]}}\0', b"\0"]
)
def test_version(bench: RemoteBench, text: bytes) -> None:
    with VfioUserPeer(bench, "dev", version=False) as peer:
        reply = peer.call(Command.VERSION, VERSION.pack(0, 7) + text)
        assert reply.error == 0
        assert VERSION.unpack_from(reply.payload) == (0, 0)
        assert reply.payload.endswith(b"}}\0")
        assert len(reply.payload) + HEADER.size <= 214, "QEMU's request has 214 bytes, its room for the reply"
        assert peer.call(Command.DEVICE_GET_INFO, INFO).error == 0


@pytest.mark.parametrize(
    "payload",
    [
        VERSION.pack(1, 0) + b"{}\0",
        VERSION.pack(0, 0) + b"{}",
        VERSION.pack(0, 0) + b"{} ",
        VERSION.pack(0, 0) + b"{}\0\0",
        VERSION.pack(0, 0) + b"{\0",
        VERSION.pack(0, 0) + b"[]\0",
        VERSION.pack(0, 0) + b'{"capabilities":1}\0',
        VERSION.pack(0, 0) + b"\xff\0",
        VERSION.pack(0, 0) + b"[" * 4000 + b"\0",
        b"\0\0",
    ],
)
def test_a_bad_version_is_refused_and_another_one_may_follow(bench: RemoteBench, payload: bytes) -> None:
    with VfioUserPeer(bench, "dev", version=False) as peer:
        assert peer.call(Command.VERSION, payload).error == errno.EINVAL
        assert peer.call(Command.DEVICE_GET_INFO, INFO).error == errno.EINVAL, "not before VERSION"
        assert peer.read(7, 0, 4).error == errno.EINVAL
        assert bench.servers["dev"].rejected == 3
        assert peer.call(Command.VERSION, VERSION.pack(0, 0)).error == 0
        assert peer.call(Command.VERSION, VERSION.pack(0, 0)).error == errno.EINVAL, "once"
        assert peer.read(7, 0, 4).error == 0


@pytest.mark.parametrize(
    ("command", "code"),
    [(0, errno.ENOTSUP), (6, errno.ENOTSUP), (15, errno.ENOTSUP), (16, errno.EINVAL), (999, errno.ENOTSUP)],
)
def test_what_is_not_supported_is_answered(peer: VfioUserPeer, command: int, code: int) -> None:
    assert peer.call(command, bytes(64)).error == code
    assert peer.bench.servers["dev"].rejected == 0, "a client may ask"
    assert peer.call(Command.DEVICE_GET_INFO, INFO).error == 0


@pytest.mark.parametrize(
    ("command", "size"),
    [
        *((command, size) for command in (2, 3, 4, 5, 7, 8, 9, 10, 13) for size in (1, 7, 15)),
        *((command, 100) for command in (2, 3, 7, 8, 9, 10, 13)),
    ],
)
def test_a_wrong_size_is_answered(peer: VfioUserPeer, command: int, size: int) -> None:
    fds = count_fds()
    with open(os.devnull) as null:
        reply = peer.call(command, b"\xff" * size, [null.fileno()])
    assert reply.error == errno.EINVAL
    assert peer.bench.servers["dev"].rejected == 1
    assert peer.call(Command.DEVICE_GET_INFO, INFO).error == 0
    await_fds(fds)


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(1, Command.DEVICE_RESET, 15, 0, 0),
        HEADER.pack(1, Command.REGION_WRITE, MAX_SIZE + 1, 0, 0),
        HEADER.pack(1, Command.REGION_WRITE, 0xFFFFFFFF, 0, 0),
        HEADER.pack(1, Command.DEVICE_RESET, 16, Flag.REPLY, 0),
        HEADER.pack(1, Command.REGION_READ, 32, 2, 0) + REGION_ACCESS.pack(0, 7, 4),
        HEADER.pack(1, Command.REGION_WRITE, 36, 2, 0) + REGION_ACCESS.pack(0, 7, 4) + bytes(4),
    ],
)
def test_a_header_after_which_the_stream_is_out_of_step_ends_the_session(
    peer: VfioUserPeer, header: bytes
) -> None:
    peer.sock.send(header)
    assert peer.has_ended()
    assert peer.bench.servers["dev"].rejected == 1


def test_a_client_of_the_other_transport_is_told(bench: RemoteBench) -> None:
    bench.add(LineDevice, "mpqemu", 0x38)
    with VfioUserPeer(bench, "mpqemu", version=False) as peer:
        peer.send(Command.VERSION, VERSION.pack(0, 0) + b"{}\0")
        assert peer.has_ended()
    with VfioUserPeer(bench, "dev", version=False) as peer:
        peer.sock.send(mpqemu.request_frame(mpqemu.Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0, 0, 4)))
        assert peer.has_ended()
    told = [line.rpartition(": ")[2] for line in bench.log.messages if line.endswith("?")]
    assert told == ["a client of transport=vfio-user?", "a client of transport=mpqemu?"]


def test_requests_are_handled_in_order_however_they_are_cut(peer: VfioUserPeer) -> None:
    """Ten writes and reads of one register, in one piece and byte by byte."""
    stream = b""
    for number in range(10):
        access = REGION_ACCESS.pack(16, 1, 4)
        stream += HEADER.pack(number, Command.REGION_WRITE, 36, Flag.NO_REPLY, 0) + access
        stream += number.to_bytes(4, "little")
        stream += HEADER.pack(number, Command.REGION_READ, 32, 0, 0) + access
        stream += HEADER.pack(number, Command.DEVICE_RESET, 16, 0, 0)
    for cut in (len(stream), 1, 17, 37):
        for start in range(0, len(stream), cut):
            peer.sock.send(stream[start : start + cut])
            peer.bench.settle()
        for number in range(10):
            reply = peer.sock.recv(36)
            assert HEADER.unpack_from(reply) == (number, Command.REGION_READ, 36, Flag.REPLY, 0)
            assert int.from_bytes(reply[32:], "little") == number
            assert HEADER.unpack(peer.sock.recv(16)) == (number, Command.DEVICE_RESET, 16, Flag.REPLY, 0)


def test_fds_belong_to_the_request_that_they_came_with(peer: VfioUserPeer, eventfds: list[int]) -> None:
    """Between requests that carry none, though one may, all in the socket before the first is read."""
    trigger = eventfds[0]
    peer.send(Command.DEVICE_RESET)
    peer.send(Command.DMA_MAP, DMA_MAP.pack(DMA_MAP.size, 3, 0, 1 << 20, 4096))
    peer.send(Command.DEVICE_SET_IRQS, IRQ_SET.pack(20, TRIGGER, 0, 0, 1), [trigger])
    peer.send(Command.DEVICE_RESET)
    peer.post(0, 0, b"\1")
    peer.bench.settle()
    assert signals(trigger) == 1
    assert [HEADER.unpack_from(peer.sock.recv(16))[1::3] for _ in range(4)] == [
        (13, 0),
        (2, 0),
        (8, 0),
        (13, 0),
    ]


def test_a_malformed_request_does_not_cost_the_next_one_its_fds(
    peer: VfioUserPeer, eventfds: list[int]
) -> None:
    """The first read ends within the second request, and brings its fds."""
    peer.send(Command.DEVICE_SET_IRQS, bytes(15))
    payload = IRQ_SET.pack(20, TRIGGER, 0, 0, 1)
    second = peer.send(Command.DEVICE_SET_IRQS, payload, eventfds[:1])
    peer.bench.settle()
    assert HEADER.unpack(peer.sock.recv(16))[4] == errno.EINVAL
    assert peer.receive(second, Command.DEVICE_SET_IRQS).error == 0


def test_fds_of_a_request_that_takes_none_are_closed(peer: VfioUserPeer, eventfds: list[int]) -> None:
    fds = count_fds()
    for _ in range(20):
        assert peer.call(Command.DEVICE_GET_INFO, INFO, eventfds).error == 0
        send_fds(peer.sock, HEADER.pack(0, Command.DEVICE_RESET, 16, 0, 0), eventfds)
        peer.bench.settle()
        assert peer.receive(0, Command.DEVICE_RESET).error == 0
    await_fds(fds)


def test_too_many_fds_end_the_session(peer: VfioUserPeer, eventfds: list[int]) -> None:
    peer.send(Command.DEVICE_SET_IRQS, bytes(20), eventfds * 3)
    assert peer.has_ended()


def test_half_a_message_and_silence_end_the_session(peer: VfioUserPeer) -> None:
    peer.sock.send(HEADER.pack(1, Command.REGION_WRITE, 36, 0, 0))
    peer.bench.settle()
    peer.bench.clock.now += HALF_MESSAGE_SECONDS + 1
    peer.bench.loop.step()
    assert peer.has_ended()


def fill(peer: VfioUserPeer, request: bytes) -> int:
    """Sends requests until remoted reads no more of them, as it has no room for replies. Returns how many."""
    count = 0
    while True:
        try:
            peer.sock.send(request)
            count += 1
        except BlockingIOError:
            before = peer.bench.servers["dev"].accesses
            peer.bench.settle()
            if peer.bench.servers["dev"].accesses == before:
                return count


@pytest.mark.parametrize("alone", [0, 1])
def test_requests_wait_while_their_answers_are_not_read(
    peer: VfioUserPeer, eventfds: list[int], alone: int
) -> None:
    """A part of the next request has been read by then in one of the two cases."""
    request = HEADER.pack(7, Command.DEVICE_GET_INFO, 32, 0, 0) + INFO
    assert peer.set_irqs(TRIGGER, fds=[eventfds[0]]) == 0
    for _ in range(alone):
        peer.sock.send(request)
        peer.bench.settle()
    count = alone + fill(peer, request)
    for _ in range(2):
        peer.bench.clock.now += HALF_MESSAGE_SECONDS + 1
        peer.bench.loop.step()
    peer.bench.servers["dev"].function.drive_intx(True)
    assert signals(eventfds[0]) == 1, "interrupts don't wait"
    for _ in range(count):
        reply = peer.sock.recv(32)
        assert HEADER.unpack_from(reply) == (7, Command.DEVICE_GET_INFO, 32, Flag.REPLY, 0)
        peer.bench.settle()
    assert peer.call(Command.DEVICE_RESET).error == 0
    assert not peer.bench.servers["dev"].rejected


def test_a_client_that_goes_while_answers_wait_is_noticed(bench: RemoteBench, peer: VfioUserPeer) -> None:
    fill(peer, HEADER.pack(7, Command.DEVICE_RESET, 16, 0, 0))
    peer.close()
    with VfioUserPeer(bench, "dev") as other:
        assert other.call(Command.DEVICE_RESET).error == 0


def test_unplugging_again_and_again_leaves_nothing_behind(bench: RemoteBench, eventfds: list[int]) -> None:
    fds = count_fds()
    ram = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(ram, 8192)
    for _ in range(50):
        with VfioUserPeer(bench, "vectors") as client:
            assert client.map(0, 8192, ram) == 0
            assert client.set_irqs(TRIGGER, fds=eventfds[:1]) == 0
            assert client.set_irqs(0x14, fds=eventfds[1:2]) == 0
            assert client.set_irqs(TRIGGER, 2, 0, 6, fds=eventfds[2:]) == 0
    os.close(ram)
    await_fds(fds)
    assert bench.hub.owners == {}
