# SPDX-License-Identifier: GPL-2.0-or-later
"""The nvme model on a drive that takes its time, or fails."""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.loop import Loop
from tests.support.fuseimage import FALLOCATE, FSYNC, READ, WRITE, FuseImage, fuse_image
from tests.support.nvmedriver import AQA, CC, CC_DEFAULT, CSTS, FATAL, PAGE, READY, Driver, QueuePair, driver
from tests.support.steploop import run_until

NVME_FLUSH, NVME_WRITE, NVME_READ, NVME_WRITE_ZEROES, NVME_DSM = 0x00, 0x01, 0x02, 0x08, 0x09
FORCE_UNIT_ACCESS = 1 << 30
CAPACITY_EXCEEDED, WRITE_FAULT, UNRECOVERED_READ_ERROR = 0x081, 0x280, 0x281
MORE, DO_NOT_RETRY = 0x2000, 0x4000


@pytest.fixture
def image(tmp_path: Path) -> Iterator[FuseImage]:
    with fuse_image(tmp_path / "fuse") as made:
        yield made


@pytest.fixture
def nvme(loop: Loop, image: FuseImage) -> Iterator[Driver]:
    with driver(loop, drive=f"file:{image.path}") as made:
        made.enable()
        try:
            yield made
        finally:
            image.release()


@pytest.fixture
def queue(nvme: Driver) -> QueuePair:
    return nvme.create_pair()


def hold(nvme: Driver, image: FuseImage, queue: QueuePair, opcode: int, command: int, **fields: int) -> int:
    """Submits a command whose request to the filesystem stays unanswered. Returns its identifier."""
    image.held.add(opcode)
    before = len(image.waiting)
    cid = nvme.submit(queue, command, nsid=1, **fields)
    run_until(nvme.loop, lambda: len(image.waiting) > before)
    return cid


def test_other_commands_overtake_one_that_waits(nvme: Driver, image: FuseImage, queue: QueuePair) -> None:
    buffer = nvme.allocate()
    slow = hold(nvme, image, queue, READ, NVME_READ, prp1=buffer)
    for _ in range(3 * queue.size):
        assert nvme.run(queue, NVME_FLUSH, nsid=1).status == 0
    assert nvme.run(nvme.admin, 0x06, prp1=buffer, cdw10=1).status == 0
    image.release()
    assert nvme.wait(queue).cid == slow


def test_a_flood_on_one_queue_leaves_the_others_alone(
    nvme: Driver, image: FuseImage, queue: QueuePair
) -> None:
    buffer = nvme.allocate()
    other = nvme.create_pair(2)
    image.held.add(READ)
    for _ in range(queue.size - 1):
        nvme.submit(queue, NVME_READ, nsid=1, prp1=buffer)
    assert nvme.run(other, NVME_DSM, nsid=1, prp1=buffer).status == 0
    image.release()
    assert sorted(nvme.wait(queue).cid for _ in range(queue.size - 1)) == list(range(queue.size - 1))


def test_admin_commands_need_no_answer_of_the_drive(nvme: Driver, image: FuseImage) -> None:
    """Even if there are more I/O commands than the controller takes at once."""
    queue, buffer = nvme.create_pair(size=256), nvme.allocate()
    image.held.add(READ)
    for _ in range(200):
        nvme.submit(queue, NVME_READ, nsid=1, prp1=buffer)
    for _ in range(20):
        assert nvme.run(nvme.admin, 0x08, cdw10=1).dword0 == 1
    deletions = [nvme.submit(nvme.admin, 0x00, cdw10=1) for _ in range(20)]
    assert nvme.run_until_idle() == []
    image.release()
    ended = [nvme.wait(nvme.admin) for _ in deletions]
    assert [each.status for each in ended] == [0] + [0x101] * 19


def test_a_flush_makes_written_blocks_durable(nvme: Driver, image: FuseImage, queue: QueuePair) -> None:
    buffer = nvme.allocate()
    assert nvme.run(queue, NVME_WRITE, nsid=1, prp1=buffer).status == 0
    assert image.seen == [WRITE]
    assert nvme.run(queue, NVME_FLUSH, nsid=1).status == 0
    assert image.seen == [WRITE, FSYNC]


def test_the_completion_of_a_flush_waits_for_the_medium(
    nvme: Driver, image: FuseImage, queue: QueuePair
) -> None:
    hold(nvme, image, queue, FSYNC, NVME_FLUSH)
    assert nvme.run(queue, NVME_DSM, nsid=1, prp1=nvme.allocate()).cid == 1
    assert nvme.peek(queue) is None
    image.release()
    assert nvme.wait(queue).cid == 0


def test_force_unit_access(nvme: Driver, image: FuseImage, queue: QueuePair) -> None:
    buffer = nvme.allocate()
    assert nvme.run(queue, NVME_WRITE, nsid=1, prp1=buffer, cdw12=FORCE_UNIT_ACCESS).status == 0
    assert image.seen == [WRITE, FSYNC]
    assert nvme.run(queue, NVME_WRITE_ZEROES, nsid=1, cdw12=FORCE_UNIT_ACCESS | 1 << 25).status == 0
    assert image.seen == [WRITE, FSYNC, FALLOCATE, FSYNC]
    assert nvme.run(queue, NVME_READ, nsid=1, prp1=buffer, cdw12=FORCE_UNIT_ACCESS).status == 0
    assert image.seen == [WRITE, FSYNC, FALLOCATE, FSYNC, FSYNC, READ]


def test_without_a_volatile_write_cache_each_write_is_durable(
    nvme: Driver, image: FuseImage, queue: QueuePair
) -> None:
    buffer = nvme.allocate()
    assert nvme.run(queue, NVME_WRITE, nsid=1, prp1=buffer).status == 0
    assert nvme.run(nvme.admin, 0x09, cdw10=0x06, cdw11=0).status == 0
    assert image.seen == [WRITE, FSYNC], "what the cache held is flushed"
    assert nvme.run(queue, NVME_WRITE, nsid=1, prp1=buffer).status == 0
    assert image.seen == [WRITE, FSYNC, WRITE, FSYNC]


@pytest.mark.parametrize(
    ("opcode", "code", "command", "fields", "status"),
    [
        (WRITE, errno.EIO, NVME_WRITE, {}, WRITE_FAULT),
        (WRITE, errno.ENOSPC, NVME_WRITE, {}, CAPACITY_EXCEEDED),
        (READ, errno.EIO, NVME_READ, {}, UNRECOVERED_READ_ERROR),
        (FSYNC, errno.EIO, NVME_FLUSH, {}, WRITE_FAULT),
        (FSYNC, errno.ENOSPC, NVME_FLUSH, {}, CAPACITY_EXCEEDED),
        (WRITE, errno.ENOSPC, NVME_WRITE_ZEROES, {}, CAPACITY_EXCEEDED),
        (FALLOCATE, errno.EIO, NVME_WRITE_ZEROES, {"cdw12": 1 << 25}, WRITE_FAULT),
        (FALLOCATE, errno.EIO, NVME_DSM, {"cdw11": 4}, WRITE_FAULT),
    ],
)
def test_an_error_of_the_image_ends_the_command(
    nvme: Driver,
    image: FuseImage,
    queue: QueuePair,
    caplog: pytest.LogCaptureFixture,
    opcode: int,
    code: int,
    command: int,
    fields: dict[str, int],
    status: int,
) -> None:
    image.errors[opcode] = code
    buffer = nvme.allocate()
    nvme.store(buffer, struct.pack("<IIQ", 0, 8, 0))
    with caplog.at_level(logging.WARNING):
        completion = nvme.run(queue, command, nsid=1, prp1=buffer, **fields)
    assert (completion.status, completion.flags) == (status, MORE), "the host may retry it"
    (text,) = nvme.function.amiss.texts()
    (record,) = caplog.records
    assert text == record.getMessage()
    assert text.startswith("the drive has failed: ")
    assert text.endswith(f": {os.strerror(code)}")
    log_page = nvme.allocate()
    assert nvme.run(nvme.admin, 0x02, prp1=log_page, cdw10=15 << 16 | 1).status == 0
    assert int.from_bytes(nvme.load(log_page, 8), "little") == 1
    assert int.from_bytes(nvme.load(log_page + 12, 2), "little") >> 1 == status | MORE
    image.errors.clear()
    assert nvme.run(queue, command, nsid=1, prp1=buffer, **fields).status == 0
    nvme.function.full_reset()
    assert nvme.function.amiss.texts() == []


def test_an_image_that_has_become_smaller(nvme: Driver, image: FuseImage, queue: QueuePair) -> None:
    del image.content[PAGE:]
    buffer = nvme.allocate()
    assert nvme.run(queue, NVME_READ, nsid=1, prp1=buffer, cdw12=7).status == 0
    assert nvme.run(queue, NVME_READ, nsid=1, prp1=buffer, cdw10=4, cdw12=7).status == UNRECOVERED_READ_ERROR


class TestReset:
    def test_a_controller_reset_is_over_when_the_drive_is_done(
        self, nvme: Driver, image: FuseImage, queue: QueuePair
    ) -> None:
        source = nvme.allocate()
        nvme.store(source, b"old" * 170)
        hold(nvme, image, queue, WRITE, NVME_WRITE, prp1=source)
        nvme.write(CC, CC_DEFAULT)
        assert nvme.read(CSTS) & READY
        image.release()
        run_until(nvme.loop, lambda: not nvme.read(CSTS) & READY)
        nvme.enable()
        queue = nvme.create_pair()
        nvme.store(source, b"new" * 170)
        assert nvme.run(queue, NVME_WRITE, nsid=1, prp1=source).status == 0
        assert image.content[:3] == b"new"

    @pytest.mark.parametrize("is_admin_queue_bad", [False, True])
    def test_a_host_that_enables_it_again_before_it_is_over(
        self, nvme: Driver, image: FuseImage, queue: QueuePair, is_admin_queue_bad: bool
    ) -> None:
        hold(nvme, image, queue, WRITE, NVME_WRITE, prp1=nvme.allocate())
        nvme.write(CC, CC_DEFAULT)
        if is_admin_queue_bad:
            nvme.write(AQA, 0)
        nvme.write(CC, CC_DEFAULT | 1)
        nvme.admin.head, nvme.admin.tail, nvme.admin.phase = 0, 0, 1
        nvme.store(nvme.admin.completions, bytes(16 * nvme.admin.size))
        image.release()
        run_until(nvme.loop, lambda: not nvme.function._engine.stale)
        if is_admin_queue_bad:
            assert nvme.read(CSTS) & FATAL
        else:
            assert nvme.read(CSTS) == READY
            assert nvme.run(nvme.create_pair(), NVME_FLUSH, nsid=1).status == 0

    def test_what_has_not_begun_is_not_done(self, nvme: Driver, image: FuseImage) -> None:
        queue, buffer = nvme.create_pair(size=64), nvme.allocate()
        image.held.add(WRITE)
        for i in range(40):
            nvme.submit(queue, NVME_WRITE, nsid=1, prp1=buffer, cdw10=i)
        run_until(nvme.loop, lambda: image.waiting)
        nvme.write(CC, CC_DEFAULT)
        image.release()
        run_until(nvme.loop, lambda: not nvme.read(CSTS) & READY)
        assert len(image.seen) <= 4, "one for each thread"

    def test_after_a_function_reset_it_is_enabled_when_the_drive_is_done(
        self, nvme: Driver, image: FuseImage, queue: QueuePair
    ) -> None:
        hold(nvme, image, queue, WRITE, NVME_WRITE, prp1=nvme.allocate())
        nvme.function.full_reset()
        nvme.bench.place_bars()
        nvme.function.config_write(4, 2, 6)
        assert nvme.read(CSTS) == 0
        nvme.write(AQA, 1 << 16 | 1)
        nvme.write(CC, CC_DEFAULT | 1)
        nvme.loop.step(0)
        assert nvme.read(CSTS) == 0
        image.release()
        run_until(nvme.loop, lambda: nvme.read(CSTS) & READY)

    @pytest.mark.parametrize("is_function_reset", [False, True])
    def test_what_is_read_late_is_dropped(
        self, nvme: Driver, image: FuseImage, queue: QueuePair, is_function_reset: bool
    ) -> None:
        image.content[:512] = b"x" * 512
        target = nvme.allocate()
        hold(nvme, image, queue, READ, NVME_READ, prp1=target)
        before = bytes(nvme.ram)
        if is_function_reset:
            nvme.function.full_reset()
        else:
            nvme.write(CC, CC_DEFAULT)
        image.release()
        run_until(nvme.loop, lambda: nvme.function._engine._workers.is_idle)
        for _ in range(3):
            nvme.loop.step(0)
        assert bytes(nvme.ram) == before, "neither data nor a completion"

    def test_a_second_reset_meanwhile(self, nvme: Driver, image: FuseImage, queue: QueuePair) -> None:
        hold(nvme, image, queue, READ, NVME_READ, prp1=nvme.allocate())
        nvme.write(CC, CC_DEFAULT)
        nvme.function.full_reset()
        nvme.bench.place_bars()
        nvme.attach()
        image.release()
        nvme.enable()
        assert nvme.run(nvme.create_pair(), NVME_FLUSH, nsid=1).status == 0


class TestDeletion:
    def test_of_a_queue_waits_for_its_commands(
        self, nvme: Driver, image: FuseImage, queue: QueuePair
    ) -> None:
        slow = hold(nvme, image, queue, READ, NVME_READ, prp1=nvme.allocate())
        delete = nvme.submit(nvme.admin, 0x00, cdw10=1)
        late = nvme.submit(queue, NVME_FLUSH, nsid=1)
        again = nvme.submit(nvme.admin, 0x00, cdw10=1)
        assert nvme.run_until_idle() == []
        image.release()
        assert nvme.wait(queue).cid == slow
        first, second = nvme.wait(nvme.admin), nvme.wait(nvme.admin)
        assert (first.cid, first.status) == (delete, 0)
        assert (second.cid, second.status) == (again, 0x101)
        assert late == slow + 1
        assert nvme.run(nvme.admin, 0x04, cdw10=1).status == 0
        assert nvme.peek(queue) is None, "nothing completes that was submitted after the deletion"

    def test_the_completion_queue_stays_meanwhile(
        self, nvme: Driver, image: FuseImage, queue: QueuePair
    ) -> None:
        hold(nvme, image, queue, READ, NVME_READ, prp1=nvme.allocate())
        nvme.submit(nvme.admin, 0x00, cdw10=1)
        assert nvme.run(nvme.admin, 0x04, cdw10=1).status == 0x10C


class TestShutdown:
    NORMAL, OCCURRING, COMPLETE, MASK = 1 << 14, 1 << 2, 2 << 2, 3 << 2

    def test_flushes(self, nvme: Driver, image: FuseImage, queue: QueuePair) -> None:
        image.held.add(FSYNC)
        nvme.write(CC, CC_DEFAULT | 1 | self.NORMAL)
        assert nvme.read(CSTS) & self.MASK == self.OCCURRING
        run_until(nvme.loop, lambda: image.waiting)
        image.release()
        run_until(nvme.loop, lambda: nvme.read(CSTS) & self.MASK == self.COMPLETE)
        nvme.disable()
        assert nvme.read(CSTS) == 0

    def test_flushes_after_what_is_under_way(self, nvme: Driver, image: FuseImage, queue: QueuePair) -> None:
        hold(nvme, image, queue, WRITE, NVME_WRITE, prp1=nvme.allocate())
        nvme.write(CC, CC_DEFAULT | 1 | self.NORMAL)
        for _ in range(3):
            nvme.loop.step(0)
        assert image.seen == [WRITE]
        image.release()
        run_until(nvme.loop, lambda: nvme.read(CSTS) & self.MASK == self.COMPLETE)
        assert image.seen == [WRITE, FSYNC]

    def test_is_complete_even_if_the_drive_fails(self, nvme: Driver, image: FuseImage) -> None:
        image.errors[FSYNC] = errno.EIO
        nvme.write(CC, CC_DEFAULT | 1 | self.NORMAL)
        run_until(nvme.loop, lambda: nvme.read(CSTS) & self.MASK == self.COMPLETE)


def test_the_image_is_closed_after_the_last_job(loop: Loop, image: FuseImage) -> None:
    with driver(loop, drive=f"file:{image.path}") as nvme:
        nvme.enable()
        queue = nvme.create_pair()
        hold(nvme, image, queue, READ, NVME_READ, prp1=nvme.allocate())
        drive = nvme.function._drive
        nvme.function.close()
        assert not drive.is_closed
        image.release()
        run_until(loop, lambda: drive.is_closed)
