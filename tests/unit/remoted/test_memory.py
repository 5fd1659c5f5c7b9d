# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM: what SYNC_SYSMEM may describe, what it replaces, and DMA to it."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from common import mpqemu
from common.errors import ProtocolError, ShortageError
from common.mpqemu import CONFIG, Command
from remoted.memory import DmaError, GuestMemory
from tests.support.fds import await_fds, count_fds, no_more_fds
from tests.support.mappings import dumped_mappings
from tests.support.remotebench import LineDevice, Peer, RemoteBench
from tests.support.wait import wait_until

PAGE = mmap.PAGESIZE
NAME = "iohub-test-ram"
F_SEAL_FUTURE_WRITE = 0x10


class Region(NamedTuple):
    """A row of the table."""

    start: int
    size: int
    offset: int
    fd: int


def payload(regions: Sequence[Region]) -> bytes:
    """A SYNC_SYSMEM payload; what is past its regions is rubbish, which must not matter."""
    rest = [0xDEADBEEF] * (mpqemu.MAX_FDS - len(regions))
    return mpqemu.SYSMEM.pack(
        *[region.start for region in regions],
        *rest,
        *[region.size for region in regions],
        *rest,
        *[region.offset for region in regions],
        *rest,
    )


def mapped_pages() -> int:
    """How many pages of test files this process has mapped."""
    pages = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"memfd:{NAME}" in line:
            start, _, end = line.split()[0].partition("-")
            pages += (int(end, 16) - int(start, 16)) // PAGE
    return pages


def memory_kib() -> dict[str, int]:
    """How much address space this process takes, and how much memory for its page tables, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmSize", "VmPTE"))
    }


class Files:
    """Memory files, closed at the test's end."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def create(self, pages: int, *, sealed: bool = True) -> int:
        """A file of random bytes; sealed as QEMU's memory-backend-memfd seals its own."""
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.fds.append(fd)
        os.write(fd, random.Random(fd).randbytes(pages * PAGE))
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return fd

    def own(self, fd: int) -> int:
        self.fds.append(fd)
        return fd


@pytest.fixture
def files() -> Iterator[Files]:
    files = Files()
    yield files
    for fd in files.fds:
        os.close(fd)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    before = count_fds()
    memory = GuestMemory()
    yield memory
    close_all(memory.clear())
    assert mapped_pages() == 0
    assert count_fds() == before


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def sync(memory: GuestMemory, *regions: Region) -> None:
    """As a session does: with fds of the memory's own, of which it closes what comes back."""
    fds = [os.dup(region.fd) for region in regions]
    try:
        fds = memory.sync(payload(regions), fds)
    finally:
        close_all(fds)


def pread(fd: int, size: int, offset: int) -> bytes:
    return os.pread(fd, size, offset)


class TestSync:
    @pytest.mark.parametrize("count", range(9))
    def test_any_number_of_regions(self, memory: GuestMemory, files: Files, count: int) -> None:
        """In any order; all of them from one file, each at an offset of its own."""
        fd = files.create(count or 1)
        regions = [Region((count - n) * 0x100000, PAGE, n * PAGE, fd) for n in range(count)]
        sync(memory, *regions)
        assert memory.regions == [(region.start, PAGE) for region in reversed(regions)]
        for region in regions:
            assert memory.read(region.start, PAGE) == pread(fd, PAGE, region.offset)

    def test_a_table_replaces_all_of_the_one_before(self, memory: GuestMemory, files: Files) -> None:
        first, second = files.create(4), files.create(1)
        sync(memory, Region(0, 2 * PAGE, 0, first), Region(0x100000, 2 * PAGE, 2 * PAGE, first))
        before = count_fds()
        sync(memory, Region(2 * PAGE, PAGE, 0, second))
        assert count_fds() == before - 1
        assert memory.read(2 * PAGE, PAGE) == pread(second, PAGE, 0)
        for gone in (0, PAGE, 0x100000):
            with pytest.raises(DmaError, match=f"no RAM at {gone:#x}"):
                memory.read(gone, 1)
        sync(memory)
        with pytest.raises(DmaError):
            memory.read(2 * PAGE, 1)

    def test_the_top_of_the_address_space(self, memory: GuestMemory, files: Files) -> None:
        top = (1 << 64) - PAGE
        sync(memory, Region(top, PAGE, 0, files.create(1)))
        memory.write(top + PAGE - 1, b"x")
        with pytest.raises(DmaError):
            memory.write(top + PAGE - 1, b"xy")

    @pytest.mark.parametrize(
        ("regions", "reason"),
        [
            ([(0, 0, 0)], "impossible"),
            ([(0, PAGE, -PAGE)], "impossible"),
            ([((1 << 64) - PAGE, 2 * PAGE, 0)], "impossible"),
            ([(1, PAGE, 0)], "not page-aligned"),
            ([(0, PAGE // 2, 0)], "not page-aligned"),
            ([(0, PAGE, 1)], "not page-aligned"),
            ([(0, 3 * PAGE, 0)], "has only"),
            ([(0, PAGE, 2 * PAGE)], "has only"),
            ([(0, 2 * PAGE, PAGE)], "has only"),
            ([(0, PAGE, (1 << 63) - PAGE)], "has only"),
            ([(0, (1 << 64) - PAGE, 0)], "has only"),
            ([(0, PAGE, 0), (0, PAGE, PAGE)], "overlap"),
            ([(PAGE, 2 * PAGE, 0), (0, 2 * PAGE, 0)], "overlap at 0x1000"),
            ([(0, 2 * PAGE, 0), (0x10000, PAGE, 0), (PAGE, PAGE, 0)], "overlap"),
            ([(0, PAGE, 0), (PAGE, PAGE, 7 * PAGE)], "has only"),
        ],
    )
    def test_bad_table(
        self, memory: GuestMemory, files: Files, regions: list[tuple[int, int, int]], reason: str
    ) -> None:
        """It changes nothing, and keeps nothing."""
        good, bad = files.create(1), files.create(2)
        sync(memory, Region(0x5000, PAGE, 0, good))
        before = count_fds()
        with pytest.raises(ProtocolError, match=reason):
            sync(memory, *[Region(*region, bad) for region in regions])
        assert count_fds() == before
        assert memory.read(0x5000, PAGE) == pread(good, PAGE, 0)

    @pytest.mark.parametrize(
        "opener",
        [
            lambda: os.eventfd(0),
            lambda: os.open("/dev/zero", os.O_RDWR),
            lambda: os.open("/", os.O_RDONLY),
            lambda: socket.socket(socket.AF_UNIX).detach(),
            lambda: os.open(__file__, os.O_RDONLY),
            lambda: os.open("/dev/shm", os.O_RDONLY),
            lambda: os.open("/proc/self/exe", os.O_PATH),
        ],
        ids=["eventfd", "device", "directory", "socket", "file on a disk", "directory on tmpfs", "O_PATH"],
    )
    def test_what_is_no_memory(self, memory: GuestMemory, files: Files, opener: Callable[[], int]) -> None:
        fd = files.own(opener())
        with pytest.raises(ProtocolError, match="the fd is neither a memfd nor a file on tmpfs or hugetlbfs"):
            sync(memory, Region(0, PAGE, 0, fd))

    @pytest.mark.parametrize("seal", [None, fcntl.F_SEAL_WRITE, F_SEAL_FUTURE_WRITE])
    def test_a_file_that_cannot_be_written(self, memory: GuestMemory, files: Files, seal: int | None) -> None:
        good = files.create(1)
        if seal is None:
            with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
                file.truncate(PAGE)
                fd = files.own(os.open(file.name, os.O_RDONLY))
        else:
            fd = files.create(1)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
        with pytest.raises(ProtocolError, match=r"RAM at 0x1000, .*: the file can only be read"):
            sync(memory, Region(0, PAGE, 0, good), Region(PAGE, PAGE, 0, fd))
        assert memory.regions == []

    def test_without_an_fd_left_everything_stays_as_it_was(self, memory: GuestMemory, files: Files) -> None:
        fd = os.dup(files.create(1))
        with no_more_fds(), pytest.raises(ShortageError, match="no buffer for DMA: Too many open files"):
            memory.sync(payload([Region(0, PAGE, 0, fd)]), [fd])
        assert memory.regions == []
        os.close(fd)

    def test_sparse_files_larger_than_any_address_space_take_none(
        self, memory: GuestMemory, files: Files
    ) -> None:
        """Nor does DMA to them leave page tables behind."""
        fd = files.own(os.memfd_create(NAME, os.MFD_CLOEXEC))
        size = (1 << 63) - PAGE
        os.ftruncate(fd, size)
        sync(memory, Region(0, size, 0, fd))
        memory.write(size - 4, b"last")
        assert memory.read(size - 4, 4) == b"last"
        before = memory_kib()
        for _ in range(100):
            sync(memory, *[Region(n * size, size, 0, fd) for n in range(2)])
        for n in range(1000):
            memory.write(n << 30, b"x")
            assert memory.read((n << 30) + (1 << 29), 1) == b"\0"
        after = memory_kib()
        assert after["VmSize"] - before["VmSize"] < 4096
        assert after["VmPTE"] - before["VmPTE"] < 1024
        os.ftruncate(fd, 0)


class TestCopies:
    def test_regions_that_adjoin_are_one(self, memory: GuestMemory, files: Files) -> None:
        low, high = files.create(2), files.create(2)
        sync(memory, Region(0x10000, 2 * PAGE, 0, low), Region(0x10000 + 2 * PAGE, 2 * PAGE, 0, high))
        data = random.Random(1).randbytes(2 * PAGE + 5)
        memory.write(0x10000 + PAGE - 3, data)
        assert memory.read(0x10000 + PAGE - 3, len(data)) == data
        assert pread(low, PAGE + 3, PAGE - 3) + pread(high, PAGE + 2, 0) == data

    @pytest.mark.parametrize("size", [0, 1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 5 * (1 << 16) + 77])
    def test_any_size(self, memory: GuestMemory, files: Files, size: int) -> None:
        fd = files.create(100)
        whole = bytearray(pread(fd, 100 * PAGE, 0))
        sync(memory, Region(0, 100 * PAGE, 0, fd))
        data = random.Random(size).randbytes(size)
        memory.write(33, data)
        whole[33 : 33 + size] = data
        assert memory.read(33, size) == data
        assert pread(fd, 100 * PAGE, 0) == whole

    @pytest.mark.parametrize(
        ("address", "size", "where"),
        [
            (0, 1, 0),
            (0xFFFF, 2, 0xFFFF),
            (0x10000 + 2 * PAGE, 1, 0x10000 + 2 * PAGE),
            (0x10000 + 2 * PAGE - 1, 2, 0x10000 + 2 * PAGE),
            (0x10000, 4 * PAGE, 0x10000 + 2 * PAGE),
            ((1 << 64) - 1, 1, (1 << 64) - 1),
            (1 << 64, 1, 1 << 64),
        ],
    )
    def test_nothing_is_copied_where_there_is_no_ram(
        self, memory: GuestMemory, files: Files, address: int, size: int, where: int
    ) -> None:
        """Nor to the RAM that lies before and behind the hole."""
        fd = files.create(3)
        before = pread(fd, 3 * PAGE, 0)
        sync(memory, Region(0x10000, 2 * PAGE, 0, fd), Region(0x10000 + 3 * PAGE, PAGE, 2 * PAGE, fd))
        for access in (
            lambda: memory.read(address, size),
            lambda: memory.write(address, bytes(size)),
            lambda: memory.view(address, size),
        ):
            with pytest.raises(DmaError, match=f"no RAM at {where:#x}$"):
                access()
        assert pread(fd, 3 * PAGE, 0) == before

    def test_truncated_ram(self, memory: GuestMemory, files: Files) -> None:
        """It would be SIGBUS to touch what is gone."""
        fd = files.create(4, sealed=False)
        sync(memory, Region(0, 4 * PAGE, 0, fd))
        os.ftruncate(fd, 2 * PAGE)
        rest = pread(fd, 2 * PAGE, 0)
        assert memory.read(0, 2 * PAGE) == rest
        for address in (2 * PAGE, 3 * PAGE, 2 * PAGE - 1):
            with pytest.raises(DmaError, match="is gone"):
                memory.read(address, 2)
        with pytest.raises(DmaError, match="is gone"):
            memory.write(2 * PAGE, b"xy")
        memory.write(0, rest[::-1])
        assert pread(fd, 4 * PAGE, 0) == rest[::-1], "and it doesn't grow again"


class TestViews:
    def test_a_view_is_ram_itself(self, memory: GuestMemory, files: Files) -> None:
        fd = files.create(2)
        sync(memory, Region(0x10000, 2 * PAGE, 0, fd))
        with memory.view(0x10000 + 10, 100) as view:
            assert view == pread(fd, 100, 10)
            os.pwrite(fd, b"guest", 20)
            assert bytes(view[10:15]) == b"guest"
            view[50:56] = b"device"
            assert pread(fd, 6, 60) == b"device"

    def test_what_is_mapped_is_in_no_core_dump(self, memory: GuestMemory, files: Files) -> None:
        sync(memory, Region(0, PAGE, 0, files.create(1)))
        assert dumped_mappings(NAME) == []
        with memory.view(0, PAGE):
            assert dumped_mappings(NAME) == [False]

    def test_no_view_of_two_regions(self, memory: GuestMemory, files: Files) -> None:
        fd = files.create(2)
        sync(memory, Region(0, PAGE, 0, fd), Region(PAGE, PAGE, PAGE, fd))
        with memory.view(PAGE - 1, 1), memory.view(PAGE, PAGE):
            pass
        with pytest.raises(DmaError, match="no single region"):
            memory.view(PAGE - 1, 2)

    def test_no_view_of_huge_pages(self, memory: GuestMemory, files: Files) -> None:
        """Sealed or not, their owner may punch holes in them, and touching one can be SIGBUS."""
        fd = files.own(os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB))
        size = os.fstat(fd).st_blksize
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        try:
            mmap.mmap(fd, size).close()
        except OSError as error:
            pytest.skip(f"no huge page is free (vm.nr_hugepages): {error.strerror}")
        sync(memory, Region(0, size, 0, fd))
        with pytest.raises(DmaError, match="may be taken away"):
            memory.view(0, 1)
        memory.write(5, b"huge")
        assert memory.read(5, 4) == b"huge"

    def test_no_view_of_what_may_be_truncated(self, memory: GuestMemory, files: Files) -> None:
        sync(memory, Region(0, PAGE, 0, files.create(1, sealed=False)))
        with pytest.raises(DmaError, match="may be taken away"):
            memory.view(0, 1)
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.truncate(PAGE)
            sync(memory, Region(0, PAGE, 0, file.fileno()))
            with pytest.raises(DmaError, match="may be taken away"):
                memory.view(0, 1)
            assert memory.read(0, PAGE) == bytes(PAGE)

    def test_a_view_that_is_kept_outlives_a_new_table(self, memory: GuestMemory, files: Files) -> None:
        old, new = files.create(1), files.create(1)
        sync(memory, Region(0, PAGE, 0, old))
        with memory.view(0, PAGE) as view:
            sync(memory, Region(0, PAGE, 0, new))
            assert view == pread(old, PAGE, 0)
            assert memory.read(0, PAGE) == pread(new, PAGE, 0)
            assert mapped_pages() == 1
        assert mapped_pages() == 0


class TestLink:
    """The same, as clients send it."""

    @pytest.fixture
    def bench(self, tmp_path: Path) -> Iterator[RemoteBench]:
        bench = RemoteBench(tmp_path)
        bench.add(LineDevice, "dev0", 0x28)
        yield bench
        bench.close()

    @pytest.fixture
    def peer(self, bench: RemoteBench) -> Iterator[Peer]:
        with bench.connect("dev0") as peer:
            yield peer

    def send(self, peer: Peer, *regions: Region) -> None:
        peer.send(Command.SYNC_SYSMEM, payload(regions), [region.fd for region in regions])

    @pytest.mark.parametrize("count", range(9))
    def test_old_fds_are_closed(self, bench: RemoteBench, peer: Peer, files: Files, count: int) -> None:
        memory = bench.servers["dev0"].function.host.memory
        fd = files.create(8)
        for start in (0, 0x100000):
            self.send(peer, *[Region(start + n * PAGE, PAGE, n * PAGE, fd) for n in range(8)])
        bench.settle()
        before = count_fds()
        self.send(peer, *[Region(n * PAGE, PAGE, n * PAGE, fd) for n in range(count)])
        peer.send(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
        while (answer := peer.receive()) is None:
            bench.loop.step()
        assert answer == 0x00421B36
        wait_until(lambda: count_fds() == before - 8 + count, "the old fds are closed")
        assert memory.regions == [(n * PAGE, PAGE) for n in range(count)]

    def test_a_bad_table_is_told_and_costs_nothing_else(
        self, bench: RemoteBench, peer: Peer, files: Files
    ) -> None:
        fd = files.create(1)
        self.send(peer, Region(0, PAGE, 0, fd))
        bench.settle()
        before = count_fds()
        for _ in range(3):
            self.send(peer, Region(0, 2 * PAGE, 0, fd), Region(0x10000, PAGE, 0, fd))
        assert peer.config_read(0, 4) == 0x00421B36
        assert bench.servers["dev0"].rejected == 3
        assert any("SYNC_SYSMEM: RAM at 0x0" in message for message in bench.log.messages)
        await_fds(before)

    def test_the_end_of_the_session_closes_them(self, bench: RemoteBench, files: Files) -> None:
        before = count_fds()
        fd = files.create(2)
        with bench.connect("dev0") as peer:
            self.send(peer, Region(0, PAGE, 0, fd), Region(PAGE, PAGE, PAGE, fd))
            bench.settle()
        bench.settle()
        await_fds(before + 1)
