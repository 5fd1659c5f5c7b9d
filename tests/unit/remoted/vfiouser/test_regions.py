# SPDX-License-Identifier: GPL-2.0-or-later
"""Regions on vfio-user: what a client learns of them, maps, reads and writes."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from common.config import Transport
from common.vfiouser import DEVICE_INFO, HEADER, MAX_DATA, REGION_INFO, Command, RegionFlag, RegionIndex
from tests.support.fds import count_fds
from tests.support.listenbench import STRANGER, as_user
from tests.support.remotebench import LineDevice, RemoteBench
from tests.support.vfiouserbench import VfioUserPeer

CONFIG = RegionIndex.CONFIG
ACCESSIBLE = RegionFlag.READ | RegionFlag.WRITE
SIZES = {0: 16, 1: 4096, 2: 1 << 16, CONFIG: 256}
"""of LineDevice's regions"""


def info(client: VfioUserPeer, region: int, argsz: int = 32) -> tuple[int, ...]:
    """argsz, flags, index, offset of capabilities, size, offset in the file."""
    payload = client.call(Command.DEVICE_GET_REGION_INFO, REGION_INFO.pack(argsz, 0, region, 0, 0, 0)).payload
    return REGION_INFO.unpack(payload)


@contextmanager
def mapped(
    client: VfioUserPeer, region: int, size: int, argsz: int = 32
) -> Iterator[tuple[bytes, mmap.mmap]]:
    """What follows the structure in the reply, and a mapping of the file that came with it."""
    client.send(Command.DEVICE_GET_REGION_INFO, REGION_INFO.pack(argsz, 0, region, 0, 0, 0))
    client.bench.settle()
    data, fds, _, _ = socket.recv_fds(client.sock, 4096, 4)
    [fd] = fds
    with mmap.mmap(fd, size) as memory:
        os.close(fd)
        yield data[HEADER.size + REGION_INFO.size :], memory


def fill(sock: socket.socket) -> None:
    """Sends fds until the kernel refuses to."""
    try:
        while True:
            socket.send_fds(sock, [b"x"], [0] * 50)
    except OSError as error:
        assert error.errno == errno.ETOOMANYREFS


@contextmanager
def too_many_fds_under_way() -> Iterator[None]:
    """As many as a user may have open are sent and not received: the kernel lets none but root send more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ours, theirs = socket.socketpair()
    with ours, theirs, as_user(STRANGER):
        resource.setrlimit(resource.RLIMIT_NOFILE, (count_fds(), hard))
        try:
            fill(ours)
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_can_not_be_sent_costs_the_session_and_is_called_a_shortage(
    client: VfioUserPeer, bench: RemoteBench
) -> None:
    with too_many_fds_under_way():
        client.send(Command.DEVICE_GET_REGION_INFO, REGION_INFO.pack(32, 0, 3, 0, 0, 0))
        assert client.has_ended()
    assert "a reply's fd can't be sent: Too many references" in bench.log.messages[-1]
    with VfioUserPeer(bench, "vectors") as again, mapped(again, 3, 8192):
        pass


def test_device_info(peer: VfioUserPeer) -> None:
    reply = peer.call(Command.DEVICE_GET_INFO, DEVICE_INFO.pack(16, 0, 0, 0))
    assert DEVICE_INFO.unpack(reply.payload) == (16, 3, 9, 5)


@pytest.mark.parametrize("region", range(9))
def test_region_info(peer: VfioUserPeer, region: int) -> None:
    size = SIZES.get(region, 0)
    assert info(peer, region) == (32, ACCESSIBLE if size else 0, region, 0, size, 0)


def test_a_bar_that_is_memory_throughout_is_mapped_whole(client: VfioUserPeer) -> None:
    assert info(client, 3)[:5] == (32, ACCESSIBLE | RegionFlag.MMAP, 3, 0, 8192)
    with mapped(client, 3, 8192) as (rest, memory):
        assert rest == b""
        memory[8188:] = b"abcd"
        assert client.read(3, 8188, 4).payload == b"abcd"
        assert client.write(3, 0, b"efgh").error == 0
        assert memory[:4] == b"efgh"


def test_a_bar_with_registers_and_memory_has_areas(client: VfioUserPeer) -> None:
    flags = ACCESSIBLE | RegionFlag.MMAP | RegionFlag.CAPS
    assert info(client, 2) == (64, flags, 2, 32, 16384, 0), "no room for the areas: the size that they need"
    with mapped(client, 2, 16384, argsz=64) as (rest, memory):
        assert struct.unpack("<HHIIIQQ", rest) == (1, 1, 0, 1, 0, 4096, 8192)
        memory[4096:4100] = b"abcd"
        assert client.read(2, 4096, 4).payload == b"abcd"
        assert client.write(2, 0, b"regs").error == 0
        assert client.read(2, 0, 4).payload == b"regs"
        assert memory[:4] == bytes(4), "a register is not memory"


@pytest.mark.parametrize("size", [1, 2, 4, 8, 3, 5, 64, 4095])
@pytest.mark.parametrize("offset", [1, 4])
def test_accesses_of_any_size(peer: VfioUserPeer, size: int, offset: int) -> None:
    size = min(size, 4096 - offset)
    data = bytes(n % 251 for n in range(size))
    assert peer.write(1, offset, data).error == 0
    assert peer.read(1, offset, size).payload == data
    peer.post(1, offset, bytes(size))
    assert peer.read(1, offset, size).payload == bytes(size)


def test_config_space_is_read_at_once(peer: VfioUserPeer) -> None:
    whole = peer.read(CONFIG, 0, 256).payload
    assert whole[:4] == struct.pack("<HH", LineDevice.VENDOR_ID, LineDevice.DEVICE_ID)
    assert whole == b"".join(peer.read(CONFIG, n, 1).payload for n in range(256))
    assert peer.read(CONFIG, 0, 8).payload == whole[:8]


def test_an_odd_access_consists_of_aligned_ones(bench: RemoteBench) -> None:
    class Recorder(LineDevice):
        def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
            done.append((offset, size))

        def config_write(self, addr: int, size: int, value: int) -> None:
            done.append((addr, size))

    done: list[tuple[int, int]] = []
    bench.add(Recorder, "recorder", 0x38, Transport.VFIO_USER)
    with VfioUserPeer(bench, "recorder") as peer:
        assert peer.write(1, 3, bytes(22)).error == 0
        assert done == [(3, 1), (4, 4), (8, 8), (16, 8), (24, 1)]
        done.clear()
        assert peer.write(CONFIG, 0x40, bytes(8)).error == 0
    assert done == [(0x40, 4), (0x44, 4)]


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        (0, 13, 4),
        (0, 16, 1),
        (1, 0, 0),
        (1, 4096, 4),
        (1, (1 << 64) - 4, 4),
        (1, 0, 0xFFFFFFFF),
        (2, 0, MAX_DATA + 4),
        (3, 0, 4),
        (CONFIG, 254, 4),
        (6, 0, 4),
        (9, 0, 4),
    ],
)
def test_an_access_beyond_a_region_is_refused(
    peer: VfioUserPeer, region: int, offset: int, count: int
) -> None:
    assert peer.read(region, offset, count).error == errno.EINVAL
    if count <= MAX_DATA:
        assert peer.write(region, offset, bytes(count)).error == errno.EINVAL
    assert peer.bench.servers["dev"].rejected == 0, "a guest may try"


def test_a_failing_device_reads_as_all_ones_and_fails_a_write(client: VfioUserPeer) -> None:
    assert client.read(1, 4, 4).payload == b"\xff" * 4
    assert client.write(1, 4, bytes(4)).error == errno.EIO
    assert client.write(1, 3, bytes(6)).error == errno.EIO, "one of its parts"
    server = client.bench.servers["vectors"]
    assert (server.function.errors, server.rejected) == (3, 0)
