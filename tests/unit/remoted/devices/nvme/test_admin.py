# SPDX-License-Identifier: GPL-2.0-or-later
"""Admin commands of the nvme model, by the NVM Express Base Specification 1.4."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.loop import Loop
from tests.support.fuseimage import fuse_image
from tests.support.nvmedriver import DOORBELLS, PAGE, Completion, Driver, driver

DELETE_SQ, CREATE_SQ, GET_LOG, DELETE_CQ, CREATE_CQ, IDENTIFY = 0x00, 0x01, 0x02, 0x04, 0x05, 0x06
ABORT, SET_FEATURES, GET_FEATURES, ASYNC_EVENT = 0x08, 0x09, 0x0A, 0x0C
INVALID_OPCODE, INVALID_FIELD, INVALID_NAMESPACE, SEQUENCE_ERROR = 0x001, 0x002, 0x00B, 0x00C
ABORT_REQUESTED, PRP_OFFSET_INVALID, DATA_TRANSFER_ERROR = 0x007, 0x013, 0x004
CQ_INVALID, INVALID_QUEUE_ID, INVALID_QUEUE_SIZE, TOO_MANY_EVENTS = 0x100, 0x101, 0x102, 0x105
INVALID_VECTOR, INVALID_LOG_PAGE, INVALID_QUEUE_DELETION = 0x108, 0x109, 0x10C
NOT_SAVEABLE, NOT_NAMESPACE_SPECIFIC = 0x10D, 0x10F
MORE, DO_NOT_RETRY = 0x2000, 0x4000
ALL = 0xFFFFFFFF


@pytest.fixture
def nvme(loop: Loop) -> Iterator[Driver]:
    with driver(loop, drive="memory:1M", serial="S123") as made:
        made.enable()
        yield made


def identify(nvme: Driver, cns: int, nsid: int = 0) -> bytes:
    buffer = nvme.allocate()
    assert nvme.run(nvme.admin, IDENTIFY, nsid=nsid, prp1=buffer, cdw10=cns).status == 0
    return nvme.load(buffer, PAGE)


def log_page(nvme: Driver, page: int, size: int = 512, offset: int = 0, *, retain: bool = False) -> bytes:
    buffer = nvme.allocate(size)
    cdw10 = (size // 4 - 1) << 16 | retain << 15 | page
    assert nvme.run(nvme.admin, GET_LOG, nsid=ALL, prp1=buffer, cdw10=cdw10, cdw12=offset).status == 0
    return nvme.load(buffer, size)


def get_feature(nvme: Driver, feature: int, *, select: int = 0, cdw11: int = 0, nsid: int = 0) -> int:
    completion = nvme.run(nvme.admin, GET_FEATURES, cdw10=select << 8 | feature, cdw11=cdw11, nsid=nsid)
    assert completion.status == 0
    return completion.dword0


def set_feature(nvme: Driver, feature: int, value: int, *, nsid: int = 0) -> Completion:
    return nvme.run(nvme.admin, SET_FEATURES, cdw10=feature, cdw11=value, nsid=nsid)


class TestIdentify:
    def test_controller(self, nvme: Driver) -> None:
        data = identify(nvme, 1)
        assert struct.unpack_from("<HH", data) == (0x1B36, 0x1AF4)
        assert data[4:24] == b"S123".ljust(20)
        assert data[24:64] == b"iohub nvme".ljust(40)
        assert 4096 << data[77] == 512 << 10, "MDTS"
        assert struct.unpack_from("<I", data, 80)[0] == 0x10400, "VER"
        assert data[111] == 1, "an I/O controller"
        assert data[260] & 0x0F == 3, "one firmware slot, read-only"
        warning, critical = struct.unpack_from("<HH", data, 266)
        assert 0 < warning < critical
        assert (data[512], data[513]) == (0x66, 0x44)
        assert struct.unpack_from("<I", data, 516)[0] == 1, "one namespace"
        assert struct.unpack_from("<H", data, 520)[0] == 0b11100, "Write Zeroes, Dataset Management, Select"
        assert data[525] & 1, "a volatile write cache"
        assert struct.unpack_from("<I", data, 536)[0] == 0, "no SGLs"
        name = data[768:1024].rstrip(b"\0").decode()
        assert name.startswith("nqn.2014-08.org.nvmexpress:uuid:")
        assert len(name) == 68

    def test_namespace(self, nvme: Driver) -> None:
        data = identify(nvme, 0, nsid=1)
        assert struct.unpack_from("<QQQ", data) == (2048, 2048, 2048)
        assert (data[25], data[26]) == (0, 0), "one format"
        assert data[33] == 0b1001, "deallocated blocks read as zeros, and Write Zeroes can deallocate"
        assert struct.unpack_from("<I", data, 128)[0] == 9 << 16

    def test_blocks_of_4096_bytes(self, loop: Loop) -> None:
        with driver(loop, drive="memory:1M", **{"block-size": "4096"}) as nvme:
            nvme.enable()
            data = identify(nvme, 0, nsid=1)
            assert struct.unpack_from("<Q", data)[0] == 256
            assert struct.unpack_from("<I", data, 128)[0] == 12 << 16

    def test_active_namespaces(self, nvme: Driver) -> None:
        assert identify(nvme, 2) == struct.pack("<I", 1).ljust(PAGE, b"\0")
        assert identify(nvme, 2, nsid=1) == bytes(PAGE)

    def test_descriptors_tell_namespaces_apart(self, nvme: Driver, loop: Loop) -> None:
        data = identify(nvme, 3, nsid=1)
        assert data[:4] == bytes((3, 16, 0, 0)), "a UUID"
        assert data[20:] == bytes(PAGE - 20)
        with driver(loop, drive="memory:1M", serial="S124") as other:
            other.enable()
            assert identify(other, 3, nsid=1)[4:20] != data[4:20]

    @pytest.mark.parametrize(
        ("cns", "nsid", "status"),
        [
            (0, 0, INVALID_NAMESPACE),
            (0, 2, INVALID_NAMESPACE),
            (0, ALL, INVALID_NAMESPACE),
            (2, ALL, INVALID_NAMESPACE),
            (2, ALL - 1, INVALID_NAMESPACE),
            (3, 0, INVALID_NAMESPACE),
            (3, ALL, INVALID_NAMESPACE),
            (4, 0, INVALID_FIELD),
            (0x10, 0, INVALID_FIELD),
            (0xFF, 0, INVALID_FIELD),
        ],
    )
    def test_refused(self, nvme: Driver, cns: int, nsid: int, status: int) -> None:
        completion = nvme.run(nvme.admin, IDENTIFY, nsid=nsid, prp1=nvme.allocate(), cdw10=cns)
        assert (completion.status, completion.flags) == (status, MORE | DO_NOT_RETRY)

    def test_data_at_an_offset(self, nvme: Driver) -> None:
        first, second = nvme.allocate(), nvme.allocate()
        completion = nvme.run(nvme.admin, IDENTIFY, prp1=first + 0xF00, prp2=second, cdw10=1)
        assert completion.status == 0
        data = nvme.load(first + 0xF00, 0x100) + nvme.load(second, 0xF00)
        assert data == identify(nvme, 1)
        assert nvme.load(second + 0xF00, 0x100) == bytes(0x100)

    def test_data_where_there_is_no_ram(self, nvme: Driver) -> None:
        completion = nvme.run(nvme.admin, IDENTIFY, prp1=0x1000, cdw10=1)
        assert (completion.status, completion.flags) == (DATA_TRANSFER_ERROR, MORE)


class TestQueues:
    @pytest.mark.parametrize(
        ("cdw10", "cdw11", "offset", "status"),
        [
            (15 << 16 | 0, 3, 0, INVALID_QUEUE_ID),
            (15 << 16 | 5, 3, 0, INVALID_QUEUE_ID),
            (15 << 16 | 0xFFFF, 3, 0, INVALID_QUEUE_ID),
            (0 << 16 | 1, 3, 0, INVALID_QUEUE_SIZE),
            (1024 << 16 | 1, 3, 0, INVALID_QUEUE_SIZE),
            (0xFFFF << 16 | 1, 3, 0, INVALID_QUEUE_SIZE),
            (15 << 16 | 1, 2, 0, INVALID_FIELD),
            (15 << 16 | 1, 3, 64, PRP_OFFSET_INVALID),
            (15 << 16 | 1, 5 << 16 | 3, 0, INVALID_VECTOR),
            (15 << 16 | 1, 0xFFFF << 16 | 3, 0, INVALID_VECTOR),
            (1023 << 16 | 4, 4 << 16 | 3, 0, 0),
        ],
    )
    def test_create_completion_queue(
        self, nvme: Driver, cdw10: int, cdw11: int, offset: int, status: int
    ) -> None:
        prp1 = nvme.allocate() + offset
        assert nvme.run(nvme.admin, CREATE_CQ, prp1=prp1, cdw10=cdw10, cdw11=cdw11).status == status

    @pytest.mark.parametrize(
        ("cdw10", "cdw11", "offset", "status"),
        [
            (15 << 16 | 0, 1 << 16 | 1, 0, INVALID_QUEUE_ID),
            (15 << 16 | 5, 1 << 16 | 1, 0, INVALID_QUEUE_ID),
            (0 << 16 | 2, 1 << 16 | 1, 0, INVALID_QUEUE_SIZE),
            (1024 << 16 | 2, 1 << 16 | 1, 0, INVALID_QUEUE_SIZE),
            (15 << 16 | 2, 1 << 16 | 0, 0, INVALID_FIELD),
            (15 << 16 | 2, 1 << 16 | 1, 64, PRP_OFFSET_INVALID),
            (15 << 16 | 2, 0 << 16 | 1, 0, INVALID_QUEUE_ID),
            (15 << 16 | 2, 5 << 16 | 1, 0, INVALID_QUEUE_ID),
            (15 << 16 | 2, 2 << 16 | 1, 0, CQ_INVALID),
            (15 << 16 | 1, 1 << 16 | 1, 0, INVALID_QUEUE_ID),
            (15 << 16 | 2, 1 << 16 | 1, 0, 0),
        ],
    )
    def test_create_submission_queue(
        self, nvme: Driver, cdw10: int, cdw11: int, offset: int, status: int
    ) -> None:
        nvme.create_pair(1)
        prp1 = nvme.allocate() + offset
        assert nvme.run(nvme.admin, CREATE_SQ, prp1=prp1, cdw10=cdw10, cdw11=cdw11).status == status

    def test_entries_of_another_size(self, loop: Loop) -> None:
        with driver(loop, drive="memory:1M") as nvme:
            nvme.enable(cc=0)
            created = nvme.run(nvme.admin, CREATE_CQ, prp1=nvme.allocate(), cdw10=15 << 16 | 1, cdw11=3)
            assert created.status == INVALID_QUEUE_SIZE

    def test_delete(self, nvme: Driver) -> None:
        pair = nvme.create_pair(3)
        assert nvme.run(nvme.admin, DELETE_CQ, cdw10=3).status == INVALID_QUEUE_DELETION
        assert nvme.run(nvme.admin, DELETE_SQ, cdw10=3).status == 0
        assert nvme.run(nvme.admin, DELETE_SQ, cdw10=3).status == INVALID_QUEUE_ID
        assert nvme.run(nvme.admin, DELETE_CQ, cdw10=3).status == 0
        assert nvme.run(nvme.admin, DELETE_CQ, cdw10=3).status == INVALID_QUEUE_ID
        nvme.submit(pair, 0)
        assert nvme.run_until_idle() == []
        again = nvme.create_pair(3)
        assert nvme.run(again, 0, nsid=1).status == 0

    @pytest.mark.parametrize("opcode", [DELETE_SQ, DELETE_CQ])
    @pytest.mark.parametrize("number", [0, 1, 65, 0xFFFF])
    def test_delete_what_is_not_there(self, nvme: Driver, opcode: int, number: int) -> None:
        assert nvme.run(nvme.admin, opcode, cdw10=number).status == INVALID_QUEUE_ID

    def test_two_submission_queues_share_a_completion_queue(self, nvme: Driver) -> None:
        first = nvme.create_pair(1)
        submissions = nvme.allocate()
        created = nvme.run(nvme.admin, CREATE_SQ, prp1=submissions, cdw10=3 << 16 | 2, cdw11=1 << 16 | 1)
        assert created.status == 0
        nvme.store(submissions, struct.pack("<BBHI", 0, 0, 77, 1))
        nvme.write(DOORBELLS + 16, 1)
        completion = nvme.wait(first)
        assert (completion.queue, completion.cid, completion.head) == (2, 77, 1)
        assert nvme.run(nvme.admin, DELETE_SQ, cdw10=1).status == 0
        assert nvme.run(nvme.admin, DELETE_CQ, cdw10=1).status == INVALID_QUEUE_DELETION

    def test_64_pairs(self, loop: Loop) -> None:
        with driver(loop, drive="memory:1M", queues="64") as nvme:
            nvme.enable()
            assert set_feature(nvme, 7, 0xFFFE << 16 | 0xFFFE).dword0 == 63 << 16 | 63
            pairs = [nvme.create_pair(number, vector=number) for number in range(1, 65)]
            assert all(nvme.run(pair, 0, nsid=1).status == 0 for pair in pairs)


class TestFeatures:
    DEFAULTS = ((1, 7), (2, 0), (4, 343), (5, 0), (6, 1), (7, 3 << 16 | 3), (8, 0), (9, 0), (10, 0), (11, 0))

    @pytest.mark.parametrize(("feature", "value"), DEFAULTS)
    def test_defaults(self, nvme: Driver, feature: int, value: int) -> None:
        assert [get_feature(nvme, feature, select=select, nsid=ALL) for select in (0, 1, 2)] == [value] * 3

    @pytest.mark.parametrize(
        ("feature", "value"),
        [(1, 0x01020304), (4, 300), (5, 0x1234), (6, 0), (8, 0x1234), (9, 1 << 16 | 2), (10, 1), (11, 0xFF)],
    )
    def test_set_get_reset(self, nvme: Driver, feature: int, value: int) -> None:
        nsid = ALL if feature == 5 else 0
        cdw11 = value & 0xFFFF if feature == 9 else 0
        default = get_feature(nvme, feature, nsid=nsid, cdw11=cdw11)
        assert default != value
        assert set_feature(nvme, feature, value, nsid=nsid).status == 0
        assert get_feature(nvme, feature, nsid=nsid, cdw11=cdw11) == value
        assert get_feature(nvme, feature, nsid=nsid, cdw11=cdw11, select=1) == default
        nvme.disable()
        nvme.enable()
        assert get_feature(nvme, feature, nsid=nsid, cdw11=cdw11) == default

    def test_supported_capabilities(self, nvme: Driver) -> None:
        assert get_feature(nvme, 6, select=3) == 0b100
        assert get_feature(nvme, 5, select=3, nsid=1) == 0b110

    @pytest.mark.parametrize(
        ("cdw10", "cdw11", "nsid", "status"),
        [
            (0x00, 0, 0, INVALID_FIELD),
            (0x03, 0, 0, INVALID_FIELD),
            (0x0C, 0, 0, INVALID_FIELD),
            (0xFF, 0, 0, INVALID_FIELD),
            (1 << 31 | 1, 0, 0, NOT_SAVEABLE),
            (0x01, 0, 1, NOT_NAMESPACE_SPECIFIC),
            (0x01, 0, 2, INVALID_NAMESPACE),
            (0x02, 1, 0, INVALID_FIELD),
            (0x04, 0x2 << 20, 0, INVALID_FIELD),
            (0x04, 0x1 << 16, 0, INVALID_FIELD),
            (0x05, 0, 0, INVALID_NAMESPACE),
            (0x05, 1 << 16, 1, INVALID_FIELD),
            (0x07, 0xFFFF, 0, INVALID_FIELD),
            (0x07, 0xFFFF << 16, 0, INVALID_FIELD),
            (0x09, 5, 0, INVALID_FIELD),
        ],
    )
    def test_set_is_refused(self, nvme: Driver, cdw10: int, cdw11: int, nsid: int, status: int) -> None:
        completion = nvme.run(nvme.admin, SET_FEATURES, cdw10=cdw10, cdw11=cdw11, nsid=nsid)
        assert (completion.status, completion.flags) == (status, MORE | DO_NOT_RETRY)

    @pytest.mark.parametrize(
        ("cdw10", "cdw11", "nsid", "status"),
        [
            (0x0C, 0, 0, INVALID_FIELD),
            (4 << 8 | 1, 0, 0, INVALID_FIELD),
            (0x05, 0, 0, INVALID_NAMESPACE),
            (0x09, 5, 0, INVALID_FIELD),
            (0x04, 0xF << 16, 0, INVALID_FIELD),
        ],
    )
    def test_get_is_refused(self, nvme: Driver, cdw10: int, cdw11: int, nsid: int, status: int) -> None:
        completion = nvme.run(nvme.admin, GET_FEATURES, cdw10=cdw10, cdw11=cdw11, nsid=nsid)
        assert completion.status == status

    def test_the_number_of_queues_is_set_before_there_are_any(self, nvme: Driver) -> None:
        nvme.create_pair()
        assert set_feature(nvme, 7, 1 << 16 | 1).status == SEQUENCE_ERROR


class TestLogs:
    def test_errors(self, nvme: Driver) -> None:
        assert log_page(nvme, 1, 1024) == bytes(1024)
        queue = nvme.create_pair(2)
        cids = []
        for i in range(20):
            completion = nvme.run(queue, 0x02, nsid=1, prp1=nvme.allocate(), cdw10=5000 + i)
            assert (completion.status, completion.flags) == (0x80, MORE | DO_NOT_RETRY)
            cids.append(completion.cid)
        page = log_page(nvme, 1, 1024)
        for i in range(16):
            entry = struct.unpack_from("<QHHHHQI", page, 64 * i)
            assert entry == (20 - i, 2, cids[19 - i], (0x80 | 0x6000) << 1, 40, 5019 - i, 1)

    def test_smart(self, nvme: Driver) -> None:
        queue = nvme.create_pair()
        buffer = nvme.allocate()
        for _ in range(3):
            nvme.run(queue, 0x01, nsid=1, prp1=buffer, cdw12=7)
        nvme.run(queue, 0x02, nsid=1, prp1=buffer, cdw12=7)
        page = log_page(nvme, 2)
        assert page[0] == 0, "no warning"
        temperature = struct.unpack_from("<H", page, 1)[0]
        assert 273 < temperature < 343
        assert tuple(page[3:6]) == (100, 10, 0)
        counters = [int.from_bytes(page[i : i + 16], "little") for i in range(32, 192, 16)]
        assert counters[:4] == [1, 1, 1, 3], "thousands of 512 bytes, rounded up, and commands: read, written"
        assert counters[8:] == [0, 0]

    def test_a_warning_of_the_temperature(self, nvme: Driver) -> None:
        set_feature(nvme, 4, 300)
        assert log_page(nvme, 2)[0] == 0b10, "too warm"
        set_feature(nvme, 4, 400)
        assert log_page(nvme, 2)[0] == 0
        set_feature(nvme, 4, 1 << 20 | 390)
        assert log_page(nvme, 2)[0] == 0b10, "too cold"

    def test_a_warning_that_the_namespace_is_read_only(self, loop: Loop, tmp_path: Path) -> None:
        with (
            fuse_image(tmp_path / "fuse", is_read_only=True) as image,
            driver(loop, drive=f"file:{image.path}") as nvme,
        ):
            nvme.enable()
            assert log_page(nvme, 2)[0] == 0b1000
            assert identify(nvme, 0, nsid=1)[99] == 1, "write-protected"

    def test_firmware_slots(self, nvme: Driver) -> None:
        page = log_page(nvme, 3)
        assert page[0] == 1
        assert page[8:16] == identify(nvme, 1)[64:72]

    def test_command_effects_name_every_command(self, nvme: Driver) -> None:
        page = log_page(nvme, 5, 4096)
        supported = [i for i in range(512) if page[4 * i] & 1]
        admin = [opcode for opcode in range(256) if is_known(nvme, opcode)]
        assert [opcode for opcode in supported if opcode < 256] == admin
        assert [opcode - 256 for opcode in supported if opcode >= 256] == [0, 1, 2, 8, 9]

    def test_a_part(self, nvme: Driver) -> None:
        whole = log_page(nvme, 5, 4096)
        assert log_page(nvme, 5, 64, offset=1024) == whole[1024:1088]
        assert log_page(nvme, 5, 64, offset=4064) == whole[4064:] + bytes(32)

    @pytest.mark.parametrize(
        ("cdw10", "cdw11", "cdw12", "cdw13", "nsid", "status"),
        [
            (127 << 16 | 0, 0, 0, 0, ALL, INVALID_LOG_PAGE),
            (127 << 16 | 6, 0, 0, 0, ALL, INVALID_LOG_PAGE),
            (127 << 16 | 2, 0, 2, 0, ALL, INVALID_FIELD),
            (127 << 16 | 2, 0, 516, 0, ALL, INVALID_FIELD),
            (127 << 16 | 2, 0, 0, 1, ALL, INVALID_FIELD),
            (127 << 16 | 2, 0, 0, 0, 1, INVALID_FIELD),
            (0 << 16 | 2, 2, 0, 0, ALL, INVALID_FIELD),
            (0xFFFF << 16 | 2, 0xFFFF, 0, 0, ALL, INVALID_FIELD),
        ],
    )
    def test_refused(
        self, nvme: Driver, cdw10: int, cdw11: int, cdw12: int, cdw13: int, nsid: int, status: int
    ) -> None:
        dwords = {"cdw10": cdw10, "cdw11": cdw11, "cdw12": cdw12, "cdw13": cdw13}
        completion = nvme.run(nvme.admin, GET_LOG, nsid=nsid, prp1=nvme.allocate(), **dwords)
        assert completion.status == status


class TestEvents:
    def test_requests_wait_beside_other_commands(self, nvme: Driver) -> None:
        cids = [nvme.submit(nvme.admin, ASYNC_EVENT) for _ in range(4)]
        assert nvme.run_until_idle() == []
        for _ in range(2 * nvme.admin.size):
            assert get_feature(nvme, 6) == 1
        one_more = nvme.run(nvme.admin, ASYNC_EVENT)
        assert one_more.status == TOO_MANY_EVENTS
        set_feature(nvme, 11, 0x02)
        nvme.submit(nvme.admin, SET_FEATURES, cdw10=4, cdw11=300)
        ended = [nvme.wait(nvme.admin) for _ in range(2)]
        (event,) = (each for each in ended if each.cid in cids)
        assert (event.cid, event.dword0) == (cids[0], 0x02_01_01), (
            "the SMART log page, a temperature threshold"
        )

    def test_a_type_is_reported_again_when_its_log_page_was_read(self, nvme: Driver) -> None:
        nvme.submit(nvme.admin, ASYNC_EVENT)
        nvme.write(DOORBELLS + 8 * 9, 1)
        assert nvme.wait(nvme.admin).dword0 == 0x01_00_00, "a doorbell of no queue"
        cid = nvme.submit(nvme.admin, ASYNC_EVENT)
        nvme.write(DOORBELLS + 8 * 9, 1)
        assert nvme.run_until_idle() == []
        log_page(nvme, 1, retain=True)
        nvme.write(DOORBELLS + 8 * 9, 1)
        assert nvme.run_until_idle() == []
        log_page(nvme, 2)
        nvme.write(DOORBELLS + 8 * 9, 1)
        assert nvme.run_until_idle() == []
        log_page(nvme, 1)
        nvme.write(DOORBELLS + 4, 4000)
        event = nvme.wait(nvme.admin)
        assert (event.cid, event.dword0) == (cid, 0x01_01_00), "a doorbell with an impossible value"

    def test_a_head_beyond_the_tail(self, nvme: Driver) -> None:
        queue = nvme.create_pair()
        assert nvme.run(queue, 0x00, nsid=1).status == 0
        nvme.submit(nvme.admin, ASYNC_EVENT)
        nvme.write(DOORBELLS + 8 * queue.number + 4, queue.head + 1)
        assert nvme.wait(nvme.admin).dword0 == 0x01_01_00
        for _ in range(2 * queue.size):
            assert nvme.run(queue, 0x00, nsid=1).status == 0

    def test_an_event_waits_for_a_request(self, nvme: Driver) -> None:
        for _ in range(100):
            nvme.write(DOORBELLS, 4000)
        cid = nvme.submit(nvme.admin, ASYNC_EVENT)
        event = nvme.wait(nvme.admin)
        assert (event.cid, event.dword0) == (cid, 0x01_01_00)

    def test_a_reset_forgets_requests(self, nvme: Driver) -> None:
        for _ in range(4):
            nvme.submit(nvme.admin, ASYNC_EVENT)
        nvme.disable()
        nvme.enable()
        for _ in range(4):
            nvme.submit(nvme.admin, ASYNC_EVENT)
        assert nvme.run_until_idle() == []


class TestAbort:
    def test_of_an_event_request(self, nvme: Driver) -> None:
        cids = [nvme.submit(nvme.admin, ASYNC_EVENT) for _ in range(2)]
        abort = nvme.submit(nvme.admin, ABORT, cdw10=cids[1] << 16)
        aborted, completion = nvme.wait(nvme.admin), nvme.wait(nvme.admin)
        assert (aborted.cid, aborted.status) == (cids[1], ABORT_REQUESTED)
        assert (completion.cid, completion.status, completion.dword0) == (abort, 0, 0)
        assert nvme.run(nvme.admin, ABORT, cdw10=cids[1] << 16).dword0 == 1

    @pytest.mark.parametrize("cdw10", [0, 1, 0xFFFFFFFF, 7 << 16 | 1])
    def test_of_what_is_not_there(self, nvme: Driver, cdw10: int) -> None:
        completion = nvme.run(nvme.admin, ABORT, cdw10=cdw10)
        assert (completion.status, completion.dword0) == (0, 1)


def is_known(nvme: Driver, opcode: int) -> bool:
    """Whether an admin command of this opcode gets further than that."""
    cid = nvme.submit(nvme.admin, opcode, cdw10=0xFFFF_FFFF)
    if opcode == ASYNC_EVENT:
        return nvme.run_until_idle() == []
    completion = nvme.wait(nvme.admin)
    assert completion.cid == cid
    return completion.status != INVALID_OPCODE


@pytest.mark.parametrize("flags", [0x01, 0x02, 0x40, 0x80, 0xC0])
def test_fused_commands_and_sgls(nvme: Driver, flags: int) -> None:
    completion = nvme.run(nvme.admin, IDENTIFY, prp1=nvme.allocate(), cdw10=1, flags=flags)
    assert completion.status == INVALID_FIELD
