# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that submit anything to the nvme model: each command ends, with a status of the specification."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.loop import Loop
from tests.support.nvmedriver import CSTS, PAGE, RAM_SIZE, RAM_START, READY, Driver, driver

INTERNAL_ERROR = 0x006
ASYNC_EVENT = 0x0C
QUEUE = 4
COMMANDS = 800
ZONE = 1 << 20
"""offset in RAM from which on anything may be overwritten"""
NUMBERS = (0, 1, 2, 3, 5, 7, 8, 15, 16, 63, 127, 255, 256, 1023, 1024, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)
ADDRESSES = (0, 1, 3, 4, 8, 512, PAGE - 8, PAGE - 4, PAGE, PAGE + 8)


@pytest.fixture(params=["file", "memory"])
def nvme(loop: Loop, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Driver]:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    drive = "memory:1M" if request.param == "memory" else f"file:{tmp_path}/image"
    with driver(loop, drive=drive) as made:
        made.enable(size=64)
        yield made


def number(rng: random.Random) -> int:
    """A dword that is often one of those at which something changes."""
    low, high = rng.choice(NUMBERS), rng.choice((0, 0, *NUMBERS))
    return rng.getrandbits(32) if rng.random() < 0.2 else high << 16 | low


def address(rng: random.Random) -> int:
    if rng.random() < 0.1:
        return rng.getrandbits(64)
    if rng.random() < 0.1:
        return rng.choice((0, RAM_START - PAGE, RAM_START + RAM_SIZE)) + rng.choice(ADDRESSES)
    return RAM_START + rng.randrange(ZONE // PAGE, RAM_SIZE // PAGE) * PAGE + rng.choice(ADDRESSES)


def entry(rng: random.Random, cid: int, opcodes: tuple[int, ...]) -> bytes:
    opcode = rng.choice(opcodes) if rng.random() < 0.95 else rng.randrange(256)
    flags = 0 if rng.random() < 0.95 else rng.randrange(256)
    nsid = rng.choice((0, 1, 1, 1, 2, 0xFFFFFFFE, 0xFFFFFFFF))
    dwords = [number(rng) for _ in range(6)]
    return struct.pack("<BBHIQQQQ6I", opcode, flags, cid, nsid, 0, 0, address(rng), address(rng), *dwords)


def fill(nvme: Driver, rng: random.Random) -> None:
    """Addresses of pages everywhere but where the queues are: any place may be taken for a PRP list."""
    count = (RAM_SIZE - ZONE) // 8
    pages = [RAM_START + rng.randrange(ZONE // PAGE, RAM_SIZE // PAGE) * PAGE for _ in range(count)]
    nvme.store(RAM_START + ZONE, struct.pack(f"<{count}Q", *pages))


@pytest.mark.parametrize("seed", range(2))
def test_random_commands(nvme: Driver, caplog: pytest.LogCaptureFixture, seed: int) -> None:
    rng = random.Random(seed)
    queue = nvme.create_pair(QUEUE, size=32)
    fill(nvme, rng)
    requests: list[int] = []
    statuses = set()
    for cid in range(COMMANDS):
        is_admin = rng.random() < 0.5
        target = nvme.admin if is_admin else queue
        made = entry(rng, cid, tuple(range(0x0D)) if is_admin else (0, 1, 2, 4, 5, 8, 9))
        opcode, cdw10 = made[0], int.from_bytes(made[40:44], "little")
        if is_admin and opcode in (0x00, 0x04) and cdw10 & 0xFFFF == QUEUE:
            continue  # it would take away the queue that the test uses
        nvme.put(target, made)
        nvme.ring(target)
        if is_admin and opcode == ASYNC_EVENT and not made[1] and len(requests) < 4:
            requests.append(cid)
            continue
        while (ended := nvme.wait(target)).cid != cid:
            requests.remove(ended.cid)
        statuses.add(ended.status)
    assert INTERNAL_ERROR not in statuses
    assert len(statuses) > 7
    assert nvme.read(CSTS) == READY
    assert nvme.function.errors == 0
    assert not [each for each in caplog.records if each.exc_info]


def test_random_accesses(nvme: Driver, caplog: pytest.LogCaptureFixture) -> None:
    """To all registers and doorbells, with queues anywhere; a function reset mends everything."""
    rng = random.Random(1)
    fill(nvme, rng)
    for _ in range(COMMANDS):
        size = rng.choice((1, 2, 4, 4, 4, 8))
        offset = rng.choice((rng.randrange(0x48), 0x1000 + 4 * rng.randrange(12), rng.randrange(0x4000 - 8)))
        value = rng.choice((number(rng), address(rng), rng.getrandbits(64))) & ((1 << 8 * size) - 1)
        if rng.random() < 0.3:
            nvme.read(offset, size)
        else:
            nvme.write(offset, value, size)
        nvme.loop.step(0)
    assert nvme.function.errors == 0
    assert not [each for each in caplog.records if each.exc_info]
    nvme.function.full_reset()
    nvme.bench.place_bars()
    nvme.attach_again()
    nvme.enable()
    assert nvme.run(nvme.create_pair(), 0x00, nsid=1).status == 0
