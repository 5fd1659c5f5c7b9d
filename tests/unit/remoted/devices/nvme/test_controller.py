# SPDX-License-Identifier: GPL-2.0-or-later
"""The nvme model's registers, interrupts, and life (NVM Express 1.4, 3.1, 7.3, 7.5, 7.6)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from common import pci
from common.errors import UsageError
from common.loop import Loop
from remoted.msi import VectorKind
from tests.support.nvmedriver import (
    ACQ,
    AQA,
    ASQ,
    CAP,
    CC,
    CC_DEFAULT,
    CSTS,
    DOORBELLS,
    FATAL,
    INTMC,
    INTMS,
    PAGE,
    RAM_SIZE,
    RAM_START,
    READY,
    VS,
    Driver,
    driver,
)  # fmt: skip
from tests.support.remotebench import Clock
from tests.support.steploop import run_until

FLUSH, READ = 0x00, 0x02


@pytest.fixture
def nvme(loop: Loop) -> Iterator[Driver]:
    with driver(loop, drive="memory:1M") as made:
        yield made


def test_identity(nvme: Driver) -> None:
    function = nvme.function
    assert function.config_read(pci.PCI_REVISION_ID + 1, 1) == 0x02, "NVM Express"
    assert function.config_read(pci.PCI_REVISION_ID + 2, 2) == 0x0108, "mass storage, non-volatile memory"
    assert function.config_read(pci.PCI_BASE_ADDRESS_0, 1) & 0xF == 0x4, "memory, 64 bits"


def test_registers_after_a_reset(nvme: Driver) -> None:
    cap = nvme.read(CAP, 8)
    assert cap & 0xFFFF == 1023, "MQES"
    assert cap >> 16 & 1 == 1, "contiguous queues"
    assert cap >> 24 & 0xFF >= 20, "TO: ten seconds at least"
    assert cap >> 32 & 0xF == 0, "DSTRD"
    assert cap >> 37 & 0xFF == 1, "the NVM command set"
    assert (cap >> 48 & 0xF, cap >> 52 & 0xF) == (0, 4), "memory pages of 4 to 64 KiB"
    assert (nvme.read(CAP), nvme.read(CAP + 4)) == (cap & 0xFFFFFFFF, cap >> 32)
    assert nvme.read(VS) == 0x00010400
    assert [nvme.read(offset) for offset in range(INTMS, 0x1000, 4)] == [0] * ((0x1000 - INTMS) // 4)
    assert nvme.read(DOORBELLS) == 0


def test_registers_are_written_by_dwords_and_quadwords(nvme: Driver) -> None:
    nvme.write(ASQ, 0x1_2345_6789_ABCD, 8)
    assert nvme.read(ASQ, 8) == 0x1_2345_6789_A000
    nvme.write(ASQ + 4, 0xFFFF0000)
    nvme.write(ACQ, 0xFFFFFFFF)
    nvme.write(ACQ + 4, 7)
    assert (nvme.read(ASQ, 8), nvme.read(ACQ, 8)) == (0xFFFF0000_6789A000, 0x7_FFFFF000)
    nvme.write(AQA, 0xFFFFFFFF)
    assert nvme.read(AQA) == 0x0FFF0FFF
    for size in (1, 2):
        nvme.write(AQA, 0, size)
    assert nvme.read(AQA) == 0x0FFF0FFF
    assert [nvme.read(AQA, size) for size in (1, 2)] == [0xFF, 0x0FFF]
    assert nvme.read(AQA + 1, 1) == 0x0F
    for offset in (CAP, VS, CSTS):
        before = nvme.read(offset)
        nvme.write(offset, 0xFFFFFFFF)
        assert nvme.read(offset) == before


def test_enable_disable_enable(nvme: Driver) -> None:
    nvme.enable()
    assert nvme.read(CSTS) == READY
    queue = nvme.create_pair()
    nvme.disable()
    assert nvme.read(CSTS) == 0
    assert nvme.read(AQA) == 0x001F001F, "a controller reset leaves these"
    assert (nvme.read(ASQ, 8), nvme.read(ACQ, 8)) == (nvme.admin.submissions, nvme.admin.completions)
    nvme.submit(queue, FLUSH, nsid=1)
    for _ in range(3):
        nvme.loop.step(0)
    assert nvme.peek(queue) is None
    nvme.restart()
    assert nvme.run(nvme.create_pair(), FLUSH, nsid=1).status == 0


def test_what_is_fixed_while_it_is_enabled(nvme: Driver) -> None:
    nvme.enable()
    nvme.write(CC, CC_DEFAULT | 1 | 0x3FF0)
    assert nvme.read(CC) == CC_DEFAULT | 1
    assert nvme.run(nvme.admin, 0x06, prp1=nvme.allocate(), cdw10=1).status == 0


@pytest.mark.parametrize(
    ("aqa", "asq", "acq", "cc"),
    [
        (0x001F0000, 0, 0, CC_DEFAULT),
        (0x0000001F, 0, 0, CC_DEFAULT),
        (0x001F001F, 0, 0, CC_DEFAULT | 5 << 7),
        (0x001F001F, 0x1000, 0, CC_DEFAULT | 1 << 7),
        (0x001F001F, 0, 0x1000, CC_DEFAULT | 1 << 7),
        (0x001F001F, 0, 0, CC_DEFAULT | 1 << 4),
        (0x001F001F, 0, 0, CC_DEFAULT | 7 << 4),
        (0x001F001F, 0, 0, CC_DEFAULT | 1 << 11),
    ],
)
def test_it_cannot_be_enabled_so(
    nvme: Driver, caplog: pytest.LogCaptureFixture, aqa: int, asq: int, acq: int, cc: int
) -> None:
    nvme.write(AQA, aqa)
    nvme.write(ASQ, asq, 8)
    nvme.write(ACQ, acq, 8)
    nvme.write(CC, cc | 1)
    assert nvme.read(CSTS) == FATAL
    assert "the controller has failed until its reset: it can't be enabled with" in caplog.text
    nvme.write(CC, 0)
    assert nvme.read(CSTS) == 0
    nvme.enable()
    assert nvme.read(CSTS) == READY


def test_admin_queues_where_there_is_no_ram(nvme: Driver, caplog: pytest.LogCaptureFixture) -> None:
    nvme.write(AQA, 0x001F001F)
    nvme.write(CC, CC_DEFAULT | 1)
    assert nvme.read(CSTS) == READY
    nvme.write(DOORBELLS, 1)
    assert nvme.read(CSTS) == READY | FATAL
    assert "commands can't be fetched: no RAM at 0x0" in caplog.text
    nvme.write(DOORBELLS, 2)
    assert len(caplog.records) == 1
    nvme.restart()
    assert nvme.read(CSTS) == READY


def test_a_completion_queue_where_there_is_no_ram(nvme: Driver, caplog: pytest.LogCaptureFixture) -> None:
    nvme.enable()
    submissions = nvme.allocate()
    assert nvme.run(nvme.admin, 0x05, prp1=0x1000, cdw10=3 << 16 | 1, cdw11=3).status == 0
    assert nvme.run(nvme.admin, 0x01, prp1=submissions, cdw10=3 << 16 | 1, cdw11=1 << 16 | 1).status == 0
    nvme.store(submissions, struct.pack("<BBHI", FLUSH, 0, 1, 1))
    nvme.write(DOORBELLS + 8, 1)
    run_until(nvme.loop, lambda: nvme.read(CSTS) & FATAL)
    assert "a completion can't be posted: no RAM at 0x1000" in caplog.text


def test_a_controller_that_has_failed_lets_the_loop_sleep(nvme: Driver) -> None:
    """Although completions of the same batch of commands wait, and there is room for them."""
    nvme.enable()
    completions, submissions = nvme.allocate(2 * PAGE), RAM_START + RAM_SIZE - PAGE
    shape = 127 << 16 | 1
    assert nvme.run(nvme.admin, 0x05, prp1=completions, cdw10=shape, cdw11=3).status == 0
    assert nvme.run(nvme.admin, 0x01, prp1=submissions, cdw10=shape, cdw11=1 << 16 | 1).status == 0
    nvme.write(DOORBELLS + 8, PAGE // 64 + 8)
    for _ in range(1000):
        nvme.loop.step()
        if nvme.read(CSTS) & FATAL and nvme.loop.until_next_timer() is None:
            break
    assert nvme.read(CSTS) & FATAL
    assert nvme.loop.until_next_timer() is None
    nvme.restart()
    assert nvme.run(nvme.create_pair(), FLUSH, nsid=1).status == 0


class TestLine:
    """Without MSI-X: the line is high while an entry that has not been taken is in a completion queue."""

    def test_until_the_head_is_moved(self, nvme: Driver) -> None:
        nvme.enable()
        assert not nvme.bench.line
        nvme.submit(nvme.admin, 0x0A, cdw10=6)
        nvme.submit(nvme.admin, 0x0A, cdw10=6)
        run_until(nvme.loop, lambda: nvme.bench.line)
        for expected in (True, False):
            assert nvme.peek(nvme.admin) is not None
            nvme.acknowledge(nvme.admin)
            assert nvme.bench.line is expected

    def test_queues_share_it(self, nvme: Driver) -> None:
        nvme.enable()
        first, second = nvme.create_pair(1), nvme.create_pair(2)
        nvme.submit(first, FLUSH, nsid=1)
        nvme.submit(second, FLUSH, nsid=1)
        for _ in range(3):
            nvme.loop.step(0)
        for queue, expected in ((first, True), (second, False)):
            assert nvme.peek(queue) is not None
            nvme.acknowledge(queue)
            assert nvme.bench.line is expected

    def test_a_queue_that_is_deleted_with_unread_entries_lowers_it(self, nvme: Driver) -> None:
        nvme.enable()
        nvme.submit(nvme.create_pair(vector=1), FLUSH, nsid=1)
        run_until(nvme.loop, lambda: nvme.bench.line)
        assert nvme.run(nvme.admin, 0x00, cdw10=1).status == 0
        assert nvme.bench.line
        assert nvme.run(nvme.admin, 0x04, cdw10=1).status == 0
        assert not nvme.bench.line

    def test_masks(self, nvme: Driver) -> None:
        nvme.enable()
        nvme.write(INTMS, 1)
        assert (nvme.read(INTMS), nvme.read(INTMC)) == (1, 1)
        nvme.submit(nvme.admin, 0x0A, cdw10=6)
        for _ in range(3):
            nvme.loop.step(0)
        assert not nvme.bench.line
        nvme.write(INTMC, 2)
        assert not nvme.bench.line
        nvme.write(INTMC, 1)
        assert nvme.bench.line
        nvme.write(INTMS, 0)
        assert nvme.bench.line
        nvme.write(INTMS, 1)
        assert not nvme.bench.line
        nvme.write(INTMC, 0xFFFFFFFF)
        assert nvme.bench.line
        nvme.write(INTMS, 2)
        nvme.disable()
        assert not nvme.bench.line
        assert nvme.read(INTMS) == 0

    def test_a_queue_without_interrupts(self, nvme: Driver) -> None:
        nvme.enable()
        completions, submissions = nvme.allocate(), nvme.allocate()
        assert nvme.run(nvme.admin, 0x05, prp1=completions, cdw10=3 << 16 | 1, cdw11=1).status == 0
        assert nvme.run(nvme.admin, 0x01, prp1=submissions, cdw10=3 << 16 | 1, cdw11=1 << 16 | 1).status == 0
        before = list(nvme.bench.lines)
        nvme.store(submissions, struct.pack("<BBHI", FLUSH, 0, 1, 1))
        nvme.write(DOORBELLS + 8, 1)
        run_until(nvme.loop, lambda: nvme.load(completions + 14, 1) == b"\1")
        nvme.write(INTMS, 1)
        nvme.write(INTMC, 1)
        assert nvme.bench.lines == before

    @pytest.mark.parametrize("is_function_reset", [False, True])
    def test_a_reset_lowers_it(self, nvme: Driver, is_function_reset: bool) -> None:
        nvme.enable()
        nvme.submit(nvme.admin, 0x0A, cdw10=6)
        run_until(nvme.loop, lambda: nvme.bench.line)
        if is_function_reset:
            nvme.function.full_reset()
        else:
            nvme.write(CC, 0)
        assert not nvme.bench.line


class TestMessages:
    @pytest.fixture
    def nvme(self, loop: Loop) -> Iterator[Driver]:
        with driver(loop, True, drive="memory:1M") as made:
            made.use_msix()
            made.enable()
            yield made

    def test_a_message_for_each_batch_to_the_queues_vector(self, nvme: Driver) -> None:
        first, second = nvme.create_pair(1, vector=3), nvme.create_pair(2, vector=1)
        nvme.messages.clear()
        for cid in range(10):
            nvme.put(first, struct.pack("<BBHI", FLUSH, 0, cid, 1).ljust(64, b"\0"))
        nvme.ring(first)
        run_until(nvme.loop, lambda: nvme.load(first.completions + 16 * 9 + 14, 1) == b"\1")
        assert nvme.messages == [(VectorKind.MSIX, 3)]
        assert nvme.run(second, FLUSH, nsid=1).status == 0
        nvme.submit(first, FLUSH, nsid=1)
        run_until(nvme.loop, lambda: len(nvme.messages) == 3)
        assert [vector for _, vector in nvme.messages] == [3, 1, 3], "whatever of the first batch is unread"
        assert not nvme.bench.line

    def test_admin_commands_have_vector_0(self, nvme: Driver) -> None:
        nvme.messages.clear()
        nvme.run(nvme.admin, 0x0A, cdw10=6)
        assert nvme.messages == [(VectorKind.MSIX, 0)]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({}, "drive= is missing: file:PATH or memory:SIZE"),
            ({"drive": "disk.img"}, "drive=disk.img: must be file:PATH or memory:SIZE"),
            ({"drive": "file:"}, "drive=file:: must be file:PATH or memory:SIZE"),
            ({"drive": "memory:"}, "drive=memory:: must be file:PATH or memory:SIZE"),
            (
                {"drive": "memory:0"},
                "drive=memory:0: must be a number of bytes, or one with K, M, G or T, such as 64M",
            ),
            ({"drive": "memory:-1"}, "drive=memory:-1: must be a number of bytes"),
            ({"drive": "memory:9999999T"}, "drive=memory:9999999T: is too large"),
            ({"drive": "memory:511"}, "drive=memory:511: is smaller than a block of 512 bytes"),
            ({"drive": "memory:4095", "block-size": "4096"}, "is smaller than a block of 4096 bytes"),
            ({"drive": "memory:1M", "block-size": "1024"}, "block-size=1024: must be 512 or 4096"),
            ({"drive": "memory:1M", "queues": "0"}, "queues=0: must be at least 1"),
            ({"drive": "memory:1M", "queues": "65"}, "queues=65: must be at most 64"),
            ({"drive": "memory:1M", "serial": "x" * 21}, "must be at most 20 printable characters of ASCII"),
            ({"drive": "memory:1M", "serial": "é"}, "must be at most 20 printable characters of ASCII"),
        ],
    )
    def test_refused(self, loop: Loop, options: dict[str, str], complaint: str) -> None:
        with pytest.raises(UsageError) as refusal:
            Driver(loop, **options)
        assert complaint in str(refusal.value)
        assert "\n" not in str(refusal.value)

    def test_a_size_that_is_no_multiple_of_the_block(
        self, loop: Loop, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        with driver(loop, drive="memory:1025") as nvme:
            assert "the last 1 bytes of the drive are left out: they are no whole block" in caplog.text
            nvme.enable()
            buffer = nvme.allocate()
            assert nvme.run(nvme.admin, 0x06, nsid=1, prp1=buffer).status == 0
            assert int.from_bytes(nvme.load(buffer, 8), "little") == 2

    def test_the_devices_id_is_the_serial_number(self, nvme: Driver) -> None:
        nvme.enable()
        buffer = nvme.allocate()
        assert nvme.run(nvme.admin, 0x06, prp1=buffer, cdw10=1).status == 0
        assert nvme.load(buffer + 4, 20) == b"dev0".ljust(20)


def test_nothing_is_posted_after_the_end(nvme: Driver, caplog: pytest.LogCaptureFixture) -> None:
    nvme.enable()
    queue = nvme.create_pair()
    nvme.submit(queue, FLUSH, nsid=1)
    nvme.function.close()
    nvme.lose_ram()
    nvme.loop.step(0)
    assert nvme.read(CSTS) == READY
    assert caplog.records == []


def test_a_guest_that_keeps_its_queues_full_does_not_keep_the_loop(nvme: Driver) -> None:
    """Between two passes of the loop only some of its commands are executed."""
    nvme.enable(size=1024)
    queue = nvme.create_pair(size=1024)
    target = nvme.allocate(128 * PAGE)
    pages = nvme.allocate()
    nvme.store(pages, struct.pack("<127Q", *[target + PAGE * (i + 1) for i in range(127)]))
    entry = struct.pack("<BBHIQQQQ6I", 0x02, 0, 0, 1, 0, 0, target, pages, 0, 0, 1023, 0, 0, 0)
    for _ in range(200):
        nvme.put(queue, entry)
    nvme.ring(queue)
    passes = 0
    while nvme.load(queue.completions + 16 * 199 + 14, 1) != b"\1":
        nvme.loop.step(0)
        passes += 1
    assert passes > 4


def test_slow_commands_end_a_pass_before_a_batch_is_over() -> None:
    clock = Clock()
    with closing(Loop(clock)) as loop, driver(loop, drive="memory:1M") as nvme:
        nvme.enable()
        queue, target = nvme.create_pair(), nvme.allocate()
        for cid in range(8):
            nvme.put(queue, struct.pack("<BBHIQQQQ6I", READ, 0, cid, 1, 0, 0, target, 0, 0, 0, 7, 0, 0, 0))
        clock.step = 0.0004
        nvme.ring(queue)
        assert nvme.function.counters["reads"] == 2
        clock.step = 0.0
        assert [nvme.wait(queue).cid for _ in range(8)] == list(range(8))
