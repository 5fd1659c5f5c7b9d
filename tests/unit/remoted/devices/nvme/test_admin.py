# SPDX-License-Identifier: GPL-2.0-or-later
"""Identify and the commands that make and end queues, by the NVM Express Base Specification 1.4."""

from __future__ import annotations

import struct

import pytest

from common.loop import Loop
from tests.support.nvmeadmin import (
    ALL,
    CQ_INVALID,
    CREATE_CQ,
    CREATE_SQ,
    DATA_TRANSFER_ERROR,
    DELETE_CQ,
    DELETE_SQ,
    DO_NOT_RETRY,
    IDENTIFY,
    INVALID_FIELD,
    INVALID_NAMESPACE,
    INVALID_QUEUE_DELETION,
    INVALID_QUEUE_ID,
    INVALID_QUEUE_SIZE,
    INVALID_VECTOR,
    MORE,
    PRP_OFFSET_INVALID,
    identify,
    set_feature,
)
from tests.support.nvmedriver import DOORBELLS, PAGE, Driver, driver


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


@pytest.mark.parametrize("flags", [0x01, 0x02, 0x40, 0x80, 0xC0])
def test_fused_commands_and_sgls(nvme: Driver, flags: int) -> None:
    completion = nvme.run(nvme.admin, IDENTIFY, prp1=nvme.allocate(), cdw10=1, flags=flags)
    assert completion.status == INVALID_FIELD
