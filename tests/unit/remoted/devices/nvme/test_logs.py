# SPDX-License-Identifier: GPL-2.0-or-later
"""Log pages of the nvme model, by NVM Express 1.4, 5.14."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from common.loop import Loop
from tests.support.fuseimage import fuse_image
from tests.support.nvmeadmin import (
    ALL,
    ASYNC_EVENT,
    DO_NOT_RETRY,
    GET_LOG,
    INVALID_FIELD,
    INVALID_LOG_PAGE,
    INVALID_OPCODE,
    MORE,
    identify,
    log_page,
    set_feature,
)
from tests.support.nvmedriver import Driver, driver


def is_known(nvme: Driver, opcode: int) -> bool:
    """Whether an admin command of this opcode gets further than that."""
    cid = nvme.submit(nvme.admin, opcode, cdw10=0xFFFF_FFFF)
    if opcode == ASYNC_EVENT:
        return nvme.run_until_idle() == []
    completion = nvme.wait(nvme.admin)
    assert completion.cid == cid
    return completion.status != INVALID_OPCODE


class TestLogs:
    def test_errors(self, nvme: Driver) -> None:
        assert log_page(nvme, 1, 1024) == bytes(1024)
        queue = nvme.create_pair(2)
        cids = []
        for i in range(20):
            completion = nvme.run(queue, 0x02, nsid=1, prp1=nvme.allocate(), cdw10=5000 + i)
            assert (completion.status, completion.flags) == (0x80, MORE | DO_NOT_RETRY)
            cids.append(completion.cid)
        media_errors, entries = struct.unpack_from("<Q8xQ8x", log_page(nvme, 2), 160)
        assert (media_errors, entries) == (0, 20)
        page = log_page(nvme, 1, 2048)
        assert page[1024:] == bytes(1024), "16 are kept"
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
        (temperature,) = struct.unpack_from("<H", log_page(nvme, 2), 1)
        for distance in (0, 10):
            set_feature(nvme, 4, temperature - distance)
            assert log_page(nvme, 2)[0] == 0b10, "too warm"
            set_feature(nvme, 4, temperature + 1)
            assert log_page(nvme, 2)[0] == 0
            set_feature(nvme, 4, 1 << 20 | temperature + distance)
            assert log_page(nvme, 2)[0] == 0b10, "too cold"
            set_feature(nvme, 4, 1 << 20 | temperature - 1)

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
        changes_data = [i - 256 for i in range(256, 512) if page[4 * i] & 2]
        assert changes_data == [1, 8, 9], "Write, Write Zeroes, Dataset Management"

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
