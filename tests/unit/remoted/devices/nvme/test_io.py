# SPDX-License-Identifier: GPL-2.0-or-later
"""NVM commands of the nvme model, on a real image and in memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.loop import Loop
from tests.support.nvmedriver import PAGE, Driver, QueuePair, driver

FLUSH, WRITE, READ, WRITE_ZEROES, DATASET_MANAGEMENT = 0x00, 0x01, 0x02, 0x08, 0x09
SIZE = 4 << 20


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


def test_what_was_written_is_read(nvme: Driver, queue: QueuePair) -> None:
    data = random.Random(1).randbytes(PAGE)
    source, target = nvme.allocate(), nvme.allocate()
    nvme.store(source, data)
    assert nvme.run(queue, WRITE, nsid=1, prp1=source, cdw10=16, cdw12=7).status == 0
    assert nvme.run(queue, FLUSH, nsid=1).status == 0
    assert nvme.run(queue, READ, nsid=1, prp1=target, cdw10=16, cdw12=7).status == 0
    assert nvme.load(target, PAGE) == data
    assert nvme.run(queue, READ, nsid=1, prp1=target, cdw10=0, cdw12=7).status == 0
    assert nvme.load(target, PAGE) == bytes(PAGE)
