# SPDX-License-Identifier: GPL-2.0-or-later
"""NVM commands of the nvme model, on a real image and in memory."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.loop import Loop
from remoted.devices.nvme.drive import Drive
from tests.support.fuseimage import fuse_image
from tests.support.nvmedriver import PAGE, RAM_SIZE, RAM_START, Driver, QueuePair, driver
from tests.support.steploop import run_until

FLUSH, WRITE, READ, WRITE_ZEROES, DATASET_MANAGEMENT = 0x00, 0x01, 0x02, 0x08, 0x09
DEALLOCATE, ATTRIBUTE_DEALLOCATE = 1 << 25, 1 << 2
INVALID_OPCODE, INVALID_FIELD, INVALID_NAMESPACE, DATA_TRANSFER_ERROR = 0x001, 0x002, 0x00B, 0x004
PRP_OFFSET_INVALID, WRITE_PROTECTED, LBA_OUT_OF_RANGE = 0x013, 0x020, 0x080
MORE, DO_NOT_RETRY = 0x2000, 0x4000
ALL = 0xFFFFFFFF
BLOCK = 512
SIZE = 4 << 20
MAX_TRANSFER = 512 << 10


@pytest.fixture(params=["file", "memory"])
def nvme(loop: Loop, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Driver]:
    if request.param == "file":
        (tmp_path / "image").write_bytes(bytes(SIZE))
    with driver(loop, drive=f"file:{tmp_path}/image" if request.param == "file" else "memory:4M") as made:
        made.enable()
        yield made


@pytest.fixture
def queue(nvme: Driver) -> QueuePair:
    return nvme.create_pair()


def extent(start: int, blocks: int) -> dict[str, int]:
    """The dwords of a command that name blocks."""
    return {"nsid": 1, "cdw10": start & 0xFFFFFFFF, "cdw11": start >> 32, "cdw12": blocks - 1}


def write(nvme: Driver, queue: QueuePair, start: int, data: bytes) -> None:
    """At most one page."""
    buffer = nvme.allocate()
    nvme.store(buffer, data)
    assert nvme.run(queue, WRITE, prp1=buffer, **extent(start, len(data) // BLOCK)).status == 0


def read(nvme: Driver, queue: QueuePair, start: int, size: int) -> bytes:
    """At most two pages."""
    buffer = nvme.allocate(2 * PAGE)
    completion = nvme.run(queue, READ, prp1=buffer, prp2=buffer + PAGE, **extent(start, size // BLOCK))
    assert completion.status == 0
    return nvme.load(buffer, size)


def test_what_was_written_is_read(nvme: Driver, queue: QueuePair) -> None:
    data = random.Random(1).randbytes(PAGE)
    write(nvme, queue, 16, data)
    assert nvme.run(queue, FLUSH, nsid=1).status == 0
    assert read(nvme, queue, 15, 10 * BLOCK - 512) == bytes(512) + data
    assert read(nvme, queue, 24, BLOCK) == bytes(BLOCK)


def test_the_last_block(nvme: Driver, queue: QueuePair) -> None:
    last = SIZE // BLOCK - 1
    write(nvme, queue, last, b"z" * BLOCK)
    assert read(nvme, queue, last, BLOCK) == b"z" * BLOCK


def test_blocks_of_4096_bytes(loop: Loop, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    with driver(loop, drive=f"file:{image}", **{"block-size": "4096"}) as nvme:
        nvme.enable()
        queue = nvme.create_pair()
        buffer = nvme.allocate()
        nvme.store(buffer, b"4" * 4096)
        assert nvme.run(queue, WRITE, prp1=buffer, **extent(3, 1)).status == 0
        assert nvme.run(queue, READ, prp1=buffer, **extent(1024, 1)).status == LBA_OUT_OF_RANGE
    content = image.read_bytes()
    assert (content.index(b"4"), content.count(b"4"), len(content)) == (3 * 4096, 4096, SIZE)


@pytest.mark.parametrize(
    ("opcode", "fields", "status"),
    [
        (READ, {"nsid": 0}, INVALID_NAMESPACE),
        (READ, {"nsid": 2}, INVALID_NAMESPACE),
        (READ, {"nsid": ALL}, INVALID_NAMESPACE),
        (WRITE, {"nsid": ALL}, INVALID_NAMESPACE),
        (WRITE_ZEROES, {"nsid": ALL}, INVALID_NAMESPACE),
        (DATASET_MANAGEMENT, {"nsid": ALL}, INVALID_NAMESPACE),
        (FLUSH, {"nsid": 0}, INVALID_NAMESPACE),
        (FLUSH, {"nsid": 2}, INVALID_NAMESPACE),
        (FLUSH, {"nsid": ALL}, 0),
        *(
            (opcode, extent(start, blocks), LBA_OUT_OF_RANGE)
            for opcode in (READ, WRITE, WRITE_ZEROES)
            for start, blocks in ((8192, 1), (8191, 2), (1 << 63, 1), ((1 << 64) - 1, 2), ((1 << 64) - 8, 8))
        ),
        (READ, extent(0, 1025), INVALID_FIELD),
        (WRITE, extent(0, 1025), INVALID_FIELD),
        (READ, {"nsid": 1, "flags": 0x40}, INVALID_FIELD),
        (WRITE, {"nsid": 1, "flags": 0x01}, INVALID_FIELD),
        (0x04, {"nsid": 1}, INVALID_OPCODE),
        (0x05, {"nsid": 1}, INVALID_OPCODE),
        (0x0C, {"nsid": 1}, INVALID_OPCODE),
        (0xFF, {"nsid": 1}, INVALID_OPCODE),
        (READ, {"nsid": 1, "prp1": RAM_START + 1}, PRP_OFFSET_INVALID),
        (READ, {"nsid": 1, "prp1": RAM_START - PAGE}, DATA_TRANSFER_ERROR),
        (WRITE, {"nsid": 1, "prp1": RAM_START + RAM_SIZE}, DATA_TRANSFER_ERROR),
        (WRITE, {"nsid": 1, "prp1": (1 << 64) - PAGE}, DATA_TRANSFER_ERROR),
        (READ, {"prp1": RAM_START, "prp2": RAM_START + 4, **extent(0, 9)}, PRP_OFFSET_INVALID),
        (READ, {"prp1": RAM_START + 4, "prp2": RAM_START + PAGE, **extent(0, 16)}, PRP_OFFSET_INVALID),
        (
            WRITE,
            {"prp1": RAM_START, "prp2": RAM_START + RAM_SIZE // 2 + 4, **extent(0, 100)},
            PRP_OFFSET_INVALID,
        ),
        (WRITE, {"prp1": RAM_START, "prp2": 0, **extent(0, 100)}, DATA_TRANSFER_ERROR),
        (WRITE, {"prp1": RAM_START, "prp2": RAM_START - PAGE, **extent(0, 9)}, DATA_TRANSFER_ERROR),
        (DATASET_MANAGEMENT, {"nsid": 1, "prp1": RAM_START + 2}, PRP_OFFSET_INVALID),
        (DATASET_MANAGEMENT, {"nsid": 1, "prp1": 0}, DATA_TRANSFER_ERROR),
    ],
)
def test_refused(nvme: Driver, queue: QueuePair, opcode: int, fields: dict[str, int], status: int) -> None:
    """It costs the command, and changes no block."""
    completion = nvme.run(queue, opcode, **{"prp1": RAM_START, **fields})
    assert completion.status == status
    if status not in (0, DATA_TRANSFER_ERROR):
        assert completion.flags == MORE | DO_NOT_RETRY
    assert read(nvme, queue, 0, BLOCK) == bytes(BLOCK)


def test_a_list_with_an_entry_at_an_offset(nvme: Driver, queue: QueuePair) -> None:
    pages = nvme.allocate()
    nvme.store(pages, struct.pack("<QQ", RAM_START, RAM_START + 8))
    completion = nvme.run(queue, READ, prp1=RAM_START, prp2=pages, **extent(0, 24))
    assert completion.status == PRP_OFFSET_INVALID


def test_a_list_that_is_chained_at_an_offset(nvme: Driver, queue: QueuePair) -> None:
    pages = nvme.allocate()
    nvme.store(pages + PAGE - 8, struct.pack("<Q", pages + 8))
    completion = nvme.run(queue, READ, prp1=RAM_START, prp2=pages + PAGE - 8, **extent(0, 24))
    assert completion.status == PRP_OFFSET_INVALID


def test_a_list_that_is_chained_to_itself_ends(nvme: Driver, queue: QueuePair) -> None:
    pages = nvme.allocate()
    nvme.store(pages, struct.pack("<512Q", *[pages] * 512))
    completion = nvme.run(queue, WRITE, prp1=RAM_START, prp2=pages + PAGE - 8, **extent(0, 1024))
    assert completion.status == 0


class TestLayouts:
    """Any layout of the data in RAM, against a model of the blocks."""

    def prps(self, nvme: Driver, rng: random.Random, size: int) -> tuple[int, int, list[tuple[int, int]]]:
        """PRP 1, PRP 2, and the ranges of RAM that they stand for."""
        offset = rng.choice((0, 0, 4, 512, 2048, 4092))
        first = min(size, PAGE - offset)
        count = -(-(size - first) // PAGE)
        if rng.random() < 0.3:
            start = nvme.allocate((count + 1) * PAGE)
            pages = [start + i * PAGE for i in range(count + 1)]
        else:
            pages = [nvme.allocate() for _ in range(count + 1)]
            rng.shuffle(pages)
        ranges = [(pages[0] + offset, first)]
        rest = size - first
        for page in pages[1:]:
            ranges.append((page, min(rest, PAGE)))
            rest -= PAGE
        if count == 0:
            return pages[0] + offset, rng.choice((0, 3)), ranges
        if count == 1:
            return pages[0] + offset, pages[1], ranges
        return pages[0] + offset, self._list(nvme, rng, pages[1:]), ranges

    def _list(self, nvme: Driver, rng: random.Random, pages: list[int]) -> int:
        """Stores a list of pages, whose first part begins somewhere in its page."""
        room = rng.choice((1, 2, 3, 100, 512))
        address = start = nvme.allocate() + PAGE - 8 * room
        while len(pages) > room:
            following = nvme.allocate()
            nvme.store(address, struct.pack(f"<{room}Q", *pages[: room - 1], following))
            pages = pages[room - 1 :]
            address, room = following, 512
        nvme.store(address, struct.pack(f"<{len(pages)}Q", *pages))
        return start

    @pytest.mark.parametrize("seed", range(4))
    def test_random(self, nvme: Driver, seed: int) -> None:
        rng = random.Random(seed)
        blocks = bytearray(SIZE)
        queue = nvme.create_pair(size=5)
        for i in range(40):
            if i % 8 == 0:
                nvme.restart()
                queue = nvme.create_pair(size=5)
            count = rng.choice((1, 2, 7, 8, 9, 16, 17, 64, rng.randint(1, 1024)))
            start = rng.randrange(SIZE // BLOCK - count + 1)
            size, place = count * BLOCK, start * BLOCK
            prp1, prp2, ranges = self.prps(nvme, rng, size)
            if rng.random() < 0.5:
                data = rng.randbytes(size)
                done = 0
                for address, length in ranges:
                    nvme.store(address, data[done : done + length])
                    done += length
                assert nvme.run(queue, WRITE, prp1=prp1, prp2=prp2, **extent(start, count)).status == 0
                blocks[place : place + size] = data
            else:
                before = bytearray(nvme.ram)
                assert nvme.run(queue, READ, prp1=prp1, prp2=prp2, **extent(start, count)).status == 0
                done = place
                for address, length in ranges:
                    where = address - RAM_START
                    before[where : where + length] = blocks[done : done + length]
                    done += length
                for queue_page in (queue.submissions - RAM_START, queue.completions - RAM_START):
                    before[queue_page : queue_page + PAGE] = nvme.ram[queue_page : queue_page + PAGE]
                assert nvme.ram[:] == before, "nothing else in RAM is touched"

    def test_memory_pages_of_64_kib(self, loop: Loop) -> None:
        with driver(loop, drive="memory:4M") as nvme:
            nvme.enable(cc=4 << 7 | 6 << 16 | 4 << 20)
            queue = nvme.create_pair()
            first, second = nvme.allocate_queue(1 << 16), nvme.allocate_queue(1 << 16)
            data = random.Random(1).randbytes(96 << 10)
            nvme.store(first + (16 << 10), data[: 48 << 10])
            nvme.store(second, data[48 << 10 :])
            where = {"prp1": first + (16 << 10), "prp2": second}
            assert nvme.run(queue, WRITE, **where, **extent(0, 192)).status == 0
            nvme.store(first, bytes(1 << 16))
            nvme.store(second, bytes(1 << 16))
            assert nvme.run(queue, READ, **where, **extent(0, 192)).status == 0
            assert nvme.load(first + (16 << 10), 48 << 10) + nvme.load(second, 48 << 10) == data


class TestRings:
    @pytest.mark.parametrize("size", [2, 3, 16, 1024])
    def test_wrap_around(self, nvme: Driver, size: int) -> None:
        queue = nvme.create_pair(size=size)
        rng = random.Random(size)
        done = 0
        while done < 3 * size:
            batch = rng.randint(1, min(size - 1, 200))
            cids = [nvme.submit(queue, FLUSH, nsid=1) for _ in range(batch)]
            ended = [nvme.wait(queue) for _ in cids]
            assert sorted(each.cid for each in ended) == cids
            assert ended[-1].head == queue.tail
            done += batch

    def test_one_doorbell_for_many_commands(self, nvme: Driver) -> None:
        queue = nvme.create_pair(size=64)
        for cid in range(63):
            nvme.put(queue, struct.pack("<BBHI", FLUSH, 0, cid, 1).ljust(64, b"\0"))
        assert nvme.run_until_idle() == []
        nvme.ring(queue)
        assert sorted(nvme.wait(queue).cid for _ in range(63)) == list(range(63))

    def test_a_full_completion_queue_is_waited_for(self, nvme: Driver) -> None:
        """Its submission queue is larger; nothing is posted over what the driver has not taken."""
        completions, submissions = nvme.allocate(), nvme.allocate()
        assert nvme.run(nvme.admin, 0x05, prp1=completions, cdw10=3 << 16 | 1, cdw11=3).status == 0
        assert nvme.run(nvme.admin, 0x01, prp1=submissions, cdw10=63 << 16 | 1, cdw11=1 << 16 | 1).status == 0
        queue = QueuePair(1, submissions, completions, 4)
        for cid in range(40):
            nvme.store(submissions + 64 * cid, struct.pack("<BBHI", FLUSH, 0, cid, 1))
        nvme.write(0x1008, 40)
        cids: list[int] = []
        while len(cids) < 40:
            batch: list[int] = []
            run_until(nvme.loop, lambda: nvme.load(completions + 16 * ((queue.head + 2) % 4) + 14, 1) != b"x")
            for _ in range(10):
                nvme.loop.step(0)
            while (completion := nvme.peek(queue)) is not None:
                batch.append(completion.cid)
            assert len(batch) <= 3
            cids += batch
            nvme.acknowledge(queue)
        assert sorted(cids) == list(range(40))

    def test_a_completion_queue_that_nobody_empties_holds_up_its_own_commands_only(
        self, nvme: Driver
    ) -> None:
        completions, submissions = nvme.allocate(), nvme.allocate(64 * 1024)
        assert nvme.run(nvme.admin, 0x05, prp1=completions, cdw10=3 << 16 | 1, cdw11=3).status == 0
        created = nvme.run(nvme.admin, 0x01, prp1=submissions, cdw10=1023 << 16 | 1, cdw11=1 << 16 | 1)
        assert created.status == 0
        nvme.store(submissions, struct.pack("<BBHI", FLUSH, 0, 1, 1).ljust(64, b"\0") * 1000)
        nvme.write(0x1008, 1000)
        other = nvme.create_pair(2)
        assert nvme.run(other, FLUSH, nsid=1).status == 0
        run_until(nvme.loop, lambda: nvme.load(completions + 16 * 2 + 14, 1)[0] & 1)
        queue = QueuePair(1, submissions, completions, 4)
        heads = [each.head for each in (nvme.peek(queue) for _ in range(4)) if each is not None]
        assert heads == [3, 3, 3], "no more are fetched than can be completed"

    def test_hostile_doorbells_cost_the_guest_only(self, nvme: Driver, queue: QueuePair) -> None:
        rng = random.Random(7)
        nvme.store(queue.submissions, rng.randbytes(64 * queue.size))
        for _ in range(500):
            nvme.write(
                0x1000 + 4 * rng.randrange(12), rng.choice((0, 1, 15, 16, 0xFFFF, rng.getrandbits(32)))
            )
            nvme.loop.step(0)
        nvme.restart()
        assert nvme.run(nvme.create_pair(), FLUSH, nsid=1).status == 0


class TestZeroes:
    @pytest.mark.parametrize("flags", [0, DEALLOCATE])
    def test_exactly_these_blocks(self, nvme: Driver, queue: QueuePair, flags: int) -> None:
        for start in (0, 8, 16):
            write(nvme, queue, start, b"d" * PAGE)
        fields = extent(3, 17)
        fields["cdw12"] |= flags
        assert nvme.run(queue, WRITE_ZEROES, **fields).status == 0
        assert read(nvme, queue, 0, 8 * BLOCK) == b"d" * 3 * BLOCK + bytes(5 * BLOCK)
        assert read(nvme, queue, 8, 16 * BLOCK) == bytes(12 * BLOCK) + b"d" * 4 * BLOCK

    def test_65536_blocks(self, loop: Loop, tmp_path: Path) -> None:
        """The data of no other command may be that long."""
        image = tmp_path / "image"
        image.write_bytes(b"d" * (33 << 20))
        with driver(loop, drive=f"file:{image}") as nvme:
            nvme.enable()
            assert nvme.run(nvme.create_pair(), WRITE_ZEROES, **extent(1024, 65536)).status == 0
        content = image.read_bytes()
        assert content == b"d" * (512 << 10) + bytes(32 << 20) + b"d" * (512 << 10)


class TestDatasetManagement:
    def ranges(self, nvme: Driver, *ranges: tuple[int, int]) -> dict[str, int]:
        buffer = nvme.allocate(2 * PAGE) + PAGE - 16
        nvme.store(buffer, b"".join(struct.pack("<IIQ", 0, count, start) for start, count in ranges))
        return {"nsid": 1, "prp1": buffer, "prp2": buffer + 16, "cdw10": len(ranges) - 1}

    def test_deallocates(self, nvme: Driver, queue: QueuePair) -> None:
        for start in (0, 8, 16, 24):
            write(nvme, queue, start, b"d" * PAGE)
        fields = self.ranges(nvme, (8, 8), (100, 0), (24, 1))
        assert nvme.run(queue, DATASET_MANAGEMENT, cdw11=ATTRIBUTE_DEALLOCATE, **fields).status == 0
        assert read(nvme, queue, 0, 2 * PAGE) == b"d" * PAGE + bytes(PAGE)
        assert read(nvme, queue, 16, 2 * PAGE) == b"d" * PAGE + bytes(BLOCK) + b"d" * 7 * BLOCK

    def test_gives_space_back(self, loop: Loop, tmp_path: Path) -> None:
        image = tmp_path / "image"
        image.write_bytes(b"d" * SIZE)
        before = image.stat().st_blocks
        with driver(loop, drive=f"file:{image}") as nvme:
            nvme.enable()
            fields = self.ranges(nvme, (0, SIZE // BLOCK // 2))
            queue = nvme.create_pair()
            assert nvme.run(queue, DATASET_MANAGEMENT, cdw11=ATTRIBUTE_DEALLOCATE, **fields).status == 0
        assert image.stat().st_blocks == before // 2
        assert image.stat().st_size == SIZE

    def test_256_ranges(self, nvme: Driver, queue: QueuePair) -> None:
        write(nvme, queue, 0, b"d" * PAGE)
        fields = self.ranges(nvme, *[(i, 1) for i in range(256)])
        assert nvme.run(queue, DATASET_MANAGEMENT, cdw11=ATTRIBUTE_DEALLOCATE, **fields).status == 0
        assert read(nvme, queue, 0, PAGE) == bytes(PAGE)

    def test_hints_change_nothing(self, nvme: Driver, queue: QueuePair) -> None:
        write(nvme, queue, 0, b"d" * PAGE)
        assert nvme.run(queue, DATASET_MANAGEMENT, cdw11=3, **self.ranges(nvme, (0, 8))).status == 0
        assert read(nvme, queue, 0, PAGE) == b"d" * PAGE

    @pytest.mark.parametrize("bad", [(8192, 1), (8191, 2), (0, 0xFFFFFFFF), ((1 << 64) - 1, 1)])
    def test_blocks_that_do_not_exist(self, nvme: Driver, queue: QueuePair, bad: tuple[int, int]) -> None:
        write(nvme, queue, 0, b"d" * PAGE)
        fields = self.ranges(nvme, (0, 8), bad)
        completion = nvme.run(queue, DATASET_MANAGEMENT, cdw11=ATTRIBUTE_DEALLOCATE, **fields)
        assert completion.status == LBA_OUT_OF_RANGE
        assert read(nvme, queue, 0, PAGE) == b"d" * PAGE, "nothing is deallocated"


def test_a_read_only_image(loop: Loop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with (
        fuse_image(tmp_path / "fuse", is_read_only=True) as image,
        driver(loop, drive=f"file:{image.path}") as nvme,
    ):
        assert "its drive can only be read: the namespace is write-protected" in caplog.text
        image.content[:BLOCK] = b"r" * BLOCK
        nvme.enable()
        queue = nvme.create_pair()
        for opcode in (WRITE, WRITE_ZEROES, DATASET_MANAGEMENT):
            fields = {"prp1": nvme.allocate(), "nsid": 1, "cdw11": ATTRIBUTE_DEALLOCATE & -(opcode == 9)}
            completion = nvme.run(queue, opcode, **fields)
            assert (completion.status, completion.flags) == (WRITE_PROTECTED, MORE | DO_NOT_RETRY)
        assert nvme.run(queue, FLUSH, nsid=1).status == 0
        assert read(nvme, queue, 0, BLOCK) == b"r" * BLOCK


def test_ram_that_can_only_be_copied(nvme: Driver, queue: QueuePair) -> None:
    """The client's file isn't sealed: it has no view."""
    data = random.Random(1).randbytes(PAGE)
    write(nvme, queue, 5, data)
    nvme.use_unsealed_ram()
    assert read(nvme, queue, 5, PAGE) == data


def test_without_bus_mastering_the_controller_fails(nvme: Driver, queue: QueuePair) -> None:
    nvme.function.config_write(4, 2, 2)
    nvme.submit(queue, FLUSH, nsid=1)
    assert nvme.read(0x1C) == 3
    assert nvme.run_until_idle() == []
    nvme.function.config_write(4, 2, 6)
    nvme.restart()
    assert nvme.run(nvme.create_pair(), FLUSH, nsid=1).status == 0


def test_a_read_with_force_unit_access_flushes_first(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the page cache has the blocks."""
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    flushes: list[Drive] = []

    def flush(drive: Drive) -> None:
        flushes.append(drive)

    monkeypatch.setattr(Drive, "flush", flush)
    with driver(loop, drive=f"file:{image}") as nvme:
        nvme.enable()
        queue, buffer = nvme.create_pair(), nvme.allocate()
        assert nvme.run(queue, READ, prp1=buffer, **extent(0, 1)).status == 0
        assert flushes == []
        assert nvme.run(queue, READ, prp1=buffer, nsid=1, cdw12=1 << 30).status == 0
        assert len(flushes) == 1


def test_a_write_that_has_to_be_durable_is_not_tried_at_once(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a filesystem that takes writes without waiting it would be in the page cache only."""
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    tried: list[int] = []

    def try_write(_drive: Drive, offset: int, _buffers: object, _size: int) -> bool:
        tried.append(offset)
        return False

    monkeypatch.setattr(Drive, "try_write", try_write)
    with driver(loop, drive=f"file:{image}") as nvme:
        nvme.enable()
        queue, buffer = nvme.create_pair(), nvme.allocate()
        assert nvme.run(queue, WRITE, prp1=buffer, nsid=1, cdw10=1, cdw12=1 << 30).status == 0
        assert tried == []
        assert nvme.run(queue, WRITE, prp1=buffer, nsid=1, cdw10=2).status == 0
        assert tried == [2 * BLOCK]
