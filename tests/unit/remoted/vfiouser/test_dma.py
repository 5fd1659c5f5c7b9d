# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM on vfio-user: what is mapped, what can be reached, and what is gone after an unmap."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator

import pytest

from common.vfiouser import MAX_DMA_MAPS
from remoted.memory import DmaError, GuestMemory, MapError
from tests.support.fds import await_fds, count_fds
from tests.support.remotebench import RemoteBench
from tests.support.vfiouserbench import VfioUserPeer

PAGE = 4096
READ, WRITE, BOTH = 1, 2, 3


@pytest.fixture
def ram() -> Iterator[int]:
    """A memfd as QEMU's memory-backend-memfd makes it; each page begins with its number."""
    fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 64 * PAGE)
    for page in range(64):
        os.pwrite(fd, bytes((page,)), page * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    yield fd
    os.close(fd)


@pytest.fixture
def memory(client: VfioUserPeer) -> GuestMemory:
    return client.bench.servers["vectors"].function.host.memory


def test_regions_of_one_file_that_adjoin(client: VfioUserPeer, memory: GuestMemory, ram: int) -> None:
    assert client.map(0, 2 * PAGE, ram, 8 * PAGE) == 0
    assert client.map(2 * PAGE, PAGE, ram, 4 * PAGE) == 0
    assert memory.read(0, 3 * PAGE)[::PAGE] == bytes((8, 9, 4))
    memory.write(2 * PAGE - 2, b"abcd")
    assert os.pread(ram, 2, 10 * PAGE - 2) + os.pread(ram, 2, 4 * PAGE) == b"abcd"
    assert len(memory.fds) == 1


def test_a_file_stays_as_long_as_one_region_uses_it(
    client: VfioUserPeer, memory: GuestMemory, ram: int
) -> None:
    assert client.map(0, PAGE, ram, PAGE) == 0
    assert client.map(2 * PAGE, PAGE, ram, 3 * PAGE) == 0
    fds = count_fds()
    assert client.unmap(0, PAGE).error == 0
    assert memory.read(2 * PAGE, 1) == b"\3"
    assert count_fds() == fds
    assert client.unmap(2 * PAGE, PAGE).error == 0
    await_fds(fds - 1)


def test_a_file_that_can_only_be_written_is_refused(
    client: VfioUserPeer, memory: GuestMemory, ram: int
) -> None:
    fd = os.open(f"/proc/self/fd/{ram}", os.O_WRONLY | os.O_CLOEXEC)
    for flags in (READ, WRITE, BOTH):
        assert client.map(0, PAGE, fd, flags=flags) == errno.EINVAL
    os.close(fd)
    assert memory.regions == []


def test_unmap_is_exact_and_takes_effect_before_its_reply(
    client: VfioUserPeer, memory: GuestMemory, ram: int
) -> None:
    assert client.map(0, 2 * PAGE, ram) == 0
    for address, size in ((0, PAGE), (PAGE, PAGE), (0, 3 * PAGE), (4 * PAGE, PAGE)):
        assert client.unmap(address, size).error == errno.ENOENT
    assert memory.read(PAGE, 1) == b"\1"
    reply = client.unmap(0, 2 * PAGE)
    assert (reply.error, len(reply.payload)) == (0, 24)
    assert memory.fds == []
    with pytest.raises(DmaError, match="no RAM at 0x0"):
        memory.read(0, 1)
    assert client.map(0, PAGE, ram) == 0


def test_all_are_unmapped_at_once(client: VfioUserPeer, memory: GuestMemory, ram: int) -> None:
    fds = count_fds() + 1
    """with the buffer for DMA, which lasts as long as the client"""
    for page in range(8):
        assert client.map(page * PAGE, PAGE, ram, page * PAGE) == 0
    assert client.unmap(0, PAGE, flags=2).error == errno.EINVAL, "ALL is given without a range"
    assert client.unmap(0, 0, flags=1).error == errno.EINVAL, "no dirty pages are logged"
    assert client.unmap(0, 0, flags=2).error == 0
    assert memory.regions == []
    await_fds(fds)


@pytest.mark.parametrize(
    ("address", "size"), [(PAGE, 2 * PAGE), (0, 8 * PAGE), (2 * PAGE, PAGE), (3 * PAGE, 2 * PAGE)]
)
def test_an_overlap_is_refused(
    client: VfioUserPeer, memory: GuestMemory, ram: int, address: int, size: int
) -> None:
    assert client.map(2 * PAGE, 2 * PAGE, ram) == 0
    assert client.map(address, size, ram) == errno.EEXIST
    assert client.map(address, size) == errno.EEXIST
    assert memory.regions == [(2 * PAGE, 2 * PAGE)]


def test_rights_are_those_of_the_region(client: VfioUserPeer, memory: GuestMemory, ram: int) -> None:
    assert client.map(0, PAGE, ram, flags=READ) == 0
    assert client.map(PAGE, PAGE, ram, flags=WRITE) == 0
    assert client.map(2 * PAGE, PAGE, ram, flags=BOTH) == 0
    assert memory.read(0, 1) == b"\0"
    memory.write(PAGE, b"x")
    with pytest.raises(DmaError, match="can't be written"):
        memory.write(0, b"x")
    with pytest.raises(DmaError, match="can't be read"):
        memory.read(PAGE, 1)
    with pytest.raises(DmaError, match="can't be written"):
        memory.write(PAGE - 4, bytes(8))
    for address in (0, PAGE):
        with pytest.raises(DmaError, match="can't be both"):
            memory.view(address, 1)
    memory.view(2 * PAGE, 1).release()
    assert os.pread(ram, 1, 0) == b"x", "of the page that is mapped three times"


def test_a_file_that_can_only_be_read_serves_for_a_region_that_can_only_be_read(
    client: VfioUserPeer, memory: GuestMemory, ram: int
) -> None:
    fd = os.open(f"/proc/self/fd/{ram}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert client.map(0, PAGE, fd, flags=BOTH) == errno.EINVAL
        assert client.map(0, PAGE, fd, PAGE, flags=READ) == 0
        assert client.map(PAGE, PAGE, ram, PAGE) == 0
    finally:
        os.close(fd)
    assert memory.read(0, 1) == b"\1"
    memory.write(PAGE, b"x")
    assert client.unmap(0, PAGE).error == 0
    assert memory.read(PAGE, 1) == b"x"


@pytest.mark.parametrize(
    ("address", "size", "offset", "flags"),
    [
        (1, PAGE, 0, BOTH),
        (0, 100, 0, BOTH),
        (0, PAGE, 1, BOTH),
        (0, 0, 0, BOTH),
        (0, 65 * PAGE, 0, BOTH),
        (0, PAGE, 64 * PAGE, BOTH),
        (0, PAGE, (1 << 64) - PAGE, BOTH),
        ((1 << 64) - PAGE, 2 * PAGE, 0, BOTH),
        (0, PAGE, 0, 0),
        (0, PAGE, 0, 7),
    ],
)
def test_bad_region(
    client: VfioUserPeer, memory: GuestMemory, ram: int, address: int, size: int, offset: int, flags: int
) -> None:
    fds = count_fds()
    assert client.map(address, size, ram, offset, flags) == errno.EINVAL
    assert memory.regions == []
    assert client.bench.servers["vectors"].rejected == 1
    await_fds(fds)


def test_a_file_that_is_not_memory_is_refused(client: VfioUserPeer, ram: int) -> None:
    with open("/proc/self/stat", "rb") as file:
        assert client.map(0, PAGE, file.fileno()) == errno.EINVAL
    server = client.bench.servers["vectors"]
    text = (
        "DMA is impossible, the guest's RAM was refused: RAM at 0x0, 0x1000 bytes from offset 0x0: the fd is"
    )

    def complaints() -> list[str]:
        return [amiss for amiss in server.function.amiss.texts() if amiss.startswith(text)]

    assert len(complaints()) == 1
    assert client.map(PAGE, PAGE, ram) == 0
    assert len(complaints()) == 1, "that is elsewhere"
    assert client.map(0, PAGE, ram) == 0
    assert complaints() == []


def test_ram_that_was_refused_is_forgotten_when_it_is_unmapped(client: VfioUserPeer) -> None:
    server = client.bench.servers["vectors"]
    for address, size, flags in ((0, PAGE, 0), (0, 0, 2)):
        with open("/proc/self/stat", "rb") as file:
            assert client.map(0, PAGE, file.fileno()) == errno.EINVAL
        assert server.session is not None
        assert server.session.ram_refusal
        client.unmap(address, size, flags)
        assert not server.session.ram_refusal


def test_ram_without_a_file_is_named_together_with_its_mend(
    client: VfioUserPeer, memory: GuestMemory, ram: int
) -> None:
    assert client.map(0, PAGE, flags=READ) == 0
    assert not memory.complaint, "a ROM has none either"
    assert client.map(PAGE, PAGE) == 0
    with pytest.raises(
        DmaError, match="RAM at 0x1000 has no file descriptor: QEMU needs -object memory-backend-"
    ):
        memory.read(PAGE, 1)
    server, log = client.bench.servers["vectors"], client.bench.log
    assert any("memory-backend-memfd" in text for text in server.function.amiss.texts())
    assert not any("no file descriptor" in line for line in log.messages), "it may be the first of many"
    for _ in range(2):
        client.bench.clock.now += 2.0
        client.bench.loop.step()
        assert client.map(2 * PAGE, PAGE) in (0, errno.EEXIST)
    assert sum("DMA is impossible: the guest's RAM has no file" in line for line in log.messages) == 1
    assert client.map(4 * PAGE, PAGE, ram) == 0
    assert not any("memory-backend-memfd" in text for text in server.function.amiss.texts())


def test_the_mend_is_logged_for_the_client_that_is_there(bench: RemoteBench) -> None:
    for _ in range(3):
        with VfioUserPeer(bench, "vectors") as client:
            assert client.map(0, PAGE) == 0
    with VfioUserPeer(bench, "vectors") as client:
        assert client.map(0, PAGE) == 0
        bench.clock.now += 2.0
        bench.loop.step()
    assert sum("DMA is impossible" in line for line in bench.log.messages) == 1


def test_unreachable_ram_that_is_unmapped_is_no_complaint(client: VfioUserPeer, memory: GuestMemory) -> None:
    assert client.map(0, PAGE) == 0
    assert client.unmap(0, PAGE).error == 0
    assert not memory.complaint


def test_a_device_that_is_not_bus_master_reaches_nothing(
    client: VfioUserPeer, memory: GuestMemory, ram: int
) -> None:
    assert client.map(0, PAGE, ram) == 0
    client.set_command(2)
    with pytest.raises(DmaError, match="bus mastering"):
        memory.read(0, 1)


def test_maps_are_gone_with_their_client(bench: RemoteBench, ram: int) -> None:
    memory, fds = bench.servers["vectors"].function.host.memory, count_fds()
    for _ in range(3):
        with VfioUserPeer(bench, "vectors") as client:
            for page in range(4):
                assert client.map(page * PAGE, PAGE, ram) == 0
        bench.settle()
        assert (memory.regions, memory.fds) == ([], [])
    await_fds(fds)


def test_maps_are_bounded(ram: int) -> None:
    memory = GuestMemory()
    for page in range(MAX_DMA_MAPS):
        for fd in memory.map(page * PAGE, PAGE, 0, os.dup(ram)):
            os.close(fd)
    assert len(memory.fds) == 1
    with pytest.raises(MapError) as raised:
        memory.map(MAX_DMA_MAPS * PAGE, PAGE, 0, ram)
    assert raised.value.code == errno.ENOSPC
    assert memory.read((MAX_DMA_MAPS - 1) * PAGE, 1) == b"\0"
    for fd in memory.clear():
        os.close(fd)


def test_files_are_bounded() -> None:
    memory = GuestMemory()
    for number in range(257):
        fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE)
        if number < 256:
            assert memory.map(number * PAGE, PAGE, 0, fd) == []
            continue
        with pytest.raises(MapError, match="more than 256 files") as raised:
            memory.map(number * PAGE, PAGE, 0, fd)
        assert raised.value.code == errno.ENOSPC
        os.close(fd)
    fds = memory.clear()
    assert len(fds) == 256
    for fd in fds:
        os.close(fd)
