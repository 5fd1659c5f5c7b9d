# SPDX-License-Identifier: GPL-2.0-or-later
"""DMA_MAP and DMA_UNMAP: which memory the device reaches by them, and what is refused."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.support import vfiouserclient as vfu
from tests.support import vfiouserdevice as device
from tests.support.vfiouserclient import CONFIG_REGION, Refused, VfioUserClient
from tests.support.vfiouserprocess import PROBE, VfioUserServer, memory, set_bus_master
from tests.support.wait import wait_until

PAGE = 4096
SIZE = 1 << 20
BASE = 0x4000_0000


@pytest.fixture
def ram() -> Iterator[int]:
    with memory(SIZE) as fd:
        yield fd


@pytest.fixture
def master(client: VfioUserClient) -> VfioUserClient:
    """A client whose device may access memory."""
    set_bus_master(client)
    return client


def read(client: VfioUserClient, address: int) -> int | None:
    """Four bytes that the device reads by DMA; None if it can't."""
    client.write(0, device.DMA_ADDRESS, address, 8)
    value = client.read(0, device.DMA_DATA)
    return None if client.read(0, device.DMA_FAILED) else value


def write(client: VfioUserClient, address: int, value: int) -> bool:
    """Lets the device write four bytes by DMA; whether it could."""
    client.write(0, device.DMA_ADDRESS, address, 8)
    client.write(0, device.DMA_DATA, value)
    return not client.read(0, device.DMA_FAILED)


def test_device_reads_and_writes_what_was_mapped(master: VfioUserClient, ram: int) -> None:
    master.dma_map(BASE, SIZE - PAGE, ram, offset=PAGE)
    assert write(master, BASE + 0x10, 0x11223344)
    assert os.pread(ram, 4, PAGE + 0x10) == b"\x44\x33\x22\x11"
    os.pwrite(ram, b"last", SIZE - 4)
    assert read(master, BASE + SIZE - PAGE - 4) == int.from_bytes(b"last", "little")


def test_access_across_adjoining_ranges(master: VfioUserClient, ram: int) -> None:
    master.dma_map(BASE, PAGE, ram, offset=PAGE)
    master.dma_map(BASE + PAGE, PAGE, ram, offset=0)
    assert write(master, BASE + PAGE - 2, 0x11223344)
    assert (os.pread(ram, 2, 2 * PAGE - 2), os.pread(ram, 2, 0)) == (b"\x44\x33", b"\x22\x11")


@pytest.mark.parametrize("address", [0, BASE - 4, BASE - 2, BASE + SIZE - 2, BASE + SIZE, (1 << 64) - 2])
def test_nothing_is_reached_outside(master: VfioUserClient, ram: int, address: int) -> None:
    master.dma_map(BASE, SIZE, ram)
    assert read(master, address) is None
    assert not write(master, address, 1)
    assert os.pread(ram, 4, 0) == os.pread(ram, 4, SIZE - 4) == bytes(4)


def test_device_that_is_no_bus_master_reaches_nothing(client: VfioUserClient, ram: int) -> None:
    client.dma_map(BASE, SIZE, ram)
    assert read(client, BASE) is None
    assert not write(client, BASE, 1)
    set_bus_master(client)
    assert read(client, BASE) == 0


def test_range_that_can_only_be_read(master: VfioUserClient, ram: int) -> None:
    os.pwrite(ram, b"bios", 0)
    master.dma_map(BASE, SIZE, ram, flags=vfu.DMA_READABLE)
    assert read(master, BASE) == int.from_bytes(b"bios", "little")
    assert not write(master, BASE, 1)
    assert os.pread(ram, 4, 0) == b"bios"


def test_range_that_can_only_be_written(master: VfioUserClient, ram: int) -> None:
    master.dma_map(BASE, SIZE, ram, flags=vfu.DMA_WRITABLE)
    assert write(master, BASE, 0x64636261)
    assert read(master, BASE) is None
    assert os.pread(ram, 4, 0) == b"abcd"


def test_range_of_a_file_that_can_only_be_read(master: VfioUserClient, ram: int) -> None:
    """A client may have opened its BIOS that way; the range says that it is not writable."""
    os.pwrite(ram, b"bios", 0)
    read_only = os.open(f"/proc/self/fd/{ram}", os.O_RDONLY)
    try:
        master.dma_map(BASE, SIZE, read_only, flags=vfu.DMA_READABLE)
    finally:
        os.close(read_only)
    assert read(master, BASE) == int.from_bytes(b"bios", "little")


def test_ram_without_an_fd_is_named(tmp_path: Path) -> None:
    """QEMU without a memory backend sends its RAM that way: device and operator are told.

    With a process of its own, as the log of the other tests' has reached its limit.
    """
    option = "memory-backend-memfd"
    with closing(VfioUserServer(tmp_path, {"probe": PROBE})) as server, server.negotiated("probe") as client:
        set_bus_master(client)
        client.dma_map(0, 64 << 20)
        assert read(client, 0x1000) is None
        assert not write(client, 0x1000, 1)
        assert option in str(server.status("probe")["amiss"])
        wait_until(lambda: option in server.child.log.read_text(), "the log names QEMU's option")


def test_what_was_unmapped_is_out_of_reach_and_no_longer_mapped(
    server: VfioUserServer, master: VfioUserClient, ram: int
) -> None:
    master.dma_map(BASE, SIZE, ram)
    assert write(master, BASE, 1)
    master.dma_unmap(BASE, SIZE)
    assert server.count_maps() <= server.maps  # before the reply: the client may give it to somebody else
    assert not write(master, BASE, 2)
    assert os.pread(ram, 1, 0) == b"\1"
    master.dma_map(BASE, SIZE, ram)
    assert read(master, BASE) == 1


def test_unmap_all(master: VfioUserClient, ram: int) -> None:
    for number in range(8):
        master.dma_map(BASE + 2 * number * PAGE, PAGE, ram, offset=number * PAGE)
    master.dma_map(0, PAGE)
    master.call(vfu.DMA_UNMAP, vfu.UNMAP.pack(24, 2, 0, 0))
    assert read(master, BASE) is None
    master.dma_map(0, SIZE, ram)
    assert read(master, 0) == 0


@pytest.mark.parametrize(
    ("address", "size"),
    [
        (BASE, PAGE),
        (BASE, SIZE + PAGE),
        (BASE + PAGE, SIZE - PAGE),
        (BASE - PAGE, SIZE + PAGE),
        (0, PAGE),
        (0, 0),
        (BASE, 0),
        ((1 << 64) - PAGE, PAGE),
    ],
)
def test_unmap_of_something_else_is_refused(
    master: VfioUserClient, ram: int, address: int, size: int
) -> None:
    master.dma_map(BASE, SIZE, ram)
    with pytest.raises(Refused) as refused:
        master.dma_unmap(address, size)
    assert refused.value.errno in (errno.EINVAL, errno.ENOENT)
    assert read(master, BASE) == 0


@pytest.mark.parametrize("with_fd", [False, True])
@pytest.mark.parametrize(
    ("address", "size"),
    [
        (BASE, SIZE),
        (BASE, PAGE),
        (BASE + SIZE - PAGE, PAGE),
        (BASE + PAGE, PAGE),
        (BASE - PAGE, 2 * PAGE),
        (BASE - PAGE, SIZE + 2 * PAGE),
    ],
)
def test_map_over_a_range_is_refused(
    master: VfioUserClient, ram: int, address: int, size: int, with_fd: bool
) -> None:
    master.dma_map(BASE, SIZE, ram)
    with memory(2 * SIZE) as other, pytest.raises(Refused) as refused:
        master.dma_map(address, size, other if with_fd else None)
    assert refused.value.errno == errno.EEXIST
    assert write(master, BASE, 1)
    assert os.pread(ram, 1, 0) == b"\1"
    master.dma_map(BASE - PAGE, PAGE, ram)
    master.dma_map(BASE + SIZE, PAGE, ram)


def request(
    address: int = BASE, size: int = SIZE, offset: int = 0, flags: int = 3, argsz: int = vfu.MAP.size
) -> bytes:
    return vfu.MAP.pack(argsz, flags, offset, address, size)


BAD_MAPS = {
    "nothing": request(size=0),
    "an address within a page": request(address=BASE + 512),
    "a part of a page": request(size=SIZE - 512),
    "an offset within a page": request(offset=512, size=PAGE),
    "more than the file": request(size=SIZE + PAGE),
    "behind the file": request(offset=SIZE, size=PAGE),
    "an offset that wraps": request(offset=(1 << 64) - PAGE, size=2 * PAGE),
    "a huge offset": request(offset=1 << 63, size=PAGE),
    "an address that wraps": request(address=(1 << 64) - PAGE, size=2 * PAGE),
    "all there is": request(address=0, size=(1 << 64) - PAGE),
    "no rights": request(flags=0),
    "rights that don't exist": request(flags=7),
    "a small argsz": request(argsz=31),
    "a payload that is too short": request()[:-1],
    "no payload": b"",
    "a payload that is too long": request() + bytes(8),
}


@pytest.mark.parametrize("payload", BAD_MAPS.values(), ids=BAD_MAPS)
def test_impossible_range_is_refused(master: VfioUserClient, ram: int, payload: bytes) -> None:
    for _ in range(5):
        with pytest.raises(Refused) as refused:
            master.call(vfu.DMA_MAP, payload, [ram])
        assert refused.value.errno == errno.EINVAL
    master.dma_map(BASE, SIZE, ram)
    assert read(master, BASE) == 0


def open_pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


OTHER_FDS: dict[str, Callable[[], int]] = {
    "an eventfd": lambda: os.eventfd(0),
    "a pipe": open_pipe,
    "/dev/null": lambda: os.open(os.devnull, os.O_RDWR),
    "/dev/zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "a socket": lambda: socket.socket(socket.AF_UNIX).detach(),
    "a directory": lambda: os.open("/", os.O_RDONLY),
    "a file on a disk": lambda: os.open(__file__, os.O_RDONLY),
    "a path only": lambda: os.open(__file__, os.O_PATH),
    "a file of proc": lambda: os.open("/proc/self/mem", os.O_RDWR),
}


@pytest.mark.parametrize("make", OTHER_FDS.values(), ids=OTHER_FDS)
def test_what_is_no_memory_is_refused(master: VfioUserClient, make: Callable[[], int]) -> None:
    fd = make()
    try:
        with pytest.raises(Refused) as refused:
            master.dma_map(BASE, PAGE, fd)
    finally:
        os.close(fd)
    assert refused.value.errno in (errno.EINVAL, errno.EBADF, errno.EACCES)
    assert read(master, BASE) is None


@pytest.mark.parametrize("count", [2, 16])
def test_map_with_more_than_one_fd_is_refused(master: VfioUserClient, ram: int, count: int) -> None:
    with pytest.raises(Refused) as refused:
        master.call(vfu.DMA_MAP, request(), [ram] * count)
    assert refused.value.errno == errno.EINVAL


def test_writable_range_of_a_file_that_can_only_be_read_is_refused(master: VfioUserClient, ram: int) -> None:
    read_only = os.open(f"/proc/self/fd/{ram}", os.O_RDONLY)
    try:
        with pytest.raises(Refused):
            master.dma_map(BASE, SIZE, read_only)
    finally:
        os.close(read_only)


def test_file_that_is_truncated_later_costs_its_client_only(master: VfioUserClient, ram: int) -> None:
    master.dma_map(BASE, SIZE, ram)
    assert write(master, BASE, 1)
    os.ftruncate(ram, 0)
    assert read(master, BASE) is None
    assert not write(master, BASE, 1)
    assert master.read(CONFIG_REGION, 0) == device.IDENTITY


def test_ranges_are_forgotten_with_their_client(server: VfioUserServer, ram: int) -> None:
    with server.negotiated("probe") as client:
        client.dma_map(BASE, SIZE, ram)
    with server.negotiated("probe") as client:
        set_bus_master(client)
        assert read(client, BASE) is None
        client.dma_map(BASE, SIZE, ram)
        assert read(client, BASE) == 0


def test_memory_stays_mapped_over_a_reset(master: VfioUserClient, ram: int) -> None:
    master.dma_map(BASE, SIZE, ram)
    master.reset()
    assert read(master, BASE) is None  # it is no bus master any more
    set_bus_master(master)
    assert read(master, BASE) == 0


def test_number_of_ranges_is_bounded_and_they_all_work(server: VfioUserServer) -> None:
    with server.connect("probe") as client, memory(PAGE) as ram:
        limit = client.version()["max_dma_maps"]
        client.reset()
        set_bus_master(client)
        batch = 500
        for start in range(0, limit, batch):
            numbers = range(start, min(limit, start + batch))
            client.send_frame(
                b"".join(
                    vfu.frame(vfu.DMA_MAP, request(2 * PAGE * n, PAGE), flags=vfu.NO_REPLY) for n in numbers
                )
            )
        with pytest.raises(Refused) as refused:
            client.dma_map(2 * PAGE * limit, PAGE, ram)
        assert refused.value.errno in (errno.ENOSPC, errno.ENOMEM, errno.E2BIG, errno.EINVAL, errno.EDQUOT)
        middle = 2 * PAGE * (limit // 2)
        client.dma_unmap(middle, PAGE)
        client.dma_map(middle, PAGE, ram)
        assert write(client, middle, 0x41414141)
        assert os.pread(ram, 4, 0) == b"AAAA"
        assert read(client, 0) is None


def test_ranges_come_and_go(server: VfioUserServer, master: VfioUserClient) -> None:
    """As while the guest's firmware runs: with and without fd, split and merged again."""
    with ExitStack() as stack:
        rams = [stack.enter_context(memory(SIZE)) for _ in range(4)]
        for turn in range(100):
            fd = rams[turn % 4]
            master.dma_map(0, 0xA0000, fd)
            master.dma_map(0xA0000, 0x10000)
            master.dma_map(0xC0000, 0x10000, fd, offset=0xC0000, flags=vfu.DMA_READABLE)
            master.dma_map(0xD0000, 0x30000, fd, offset=0xD0000)
            assert write(master, 0x1000, turn)
            assert os.pread(fd, 1, 0x1000) == bytes([turn])
            assert not write(master, 0xC0000, 1)
            for address, size in ((0xC0000, 0x10000), (0, 0xA0000), (0xD0000, 0x30000), (0xA0000, 0x10000)):
                master.dma_unmap(address, size)
            assert not write(master, 0x1000, turn)
    assert server.count_maps() <= server.maps
