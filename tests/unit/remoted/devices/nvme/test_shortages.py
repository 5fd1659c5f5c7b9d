# SPDX-License-Identifier: GPL-2.0-or-later
"""The nvme model without threads, and with a fault in its own code: no command is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from common.loop import Loop
from remoted.devices.nvme.drive import Drive
from tests.support.nvmedriver import Driver, driver

FLUSH, WRITE = 0x00, 0x01
INTERNAL_ERROR, MORE = 0x006, 0x2000


@pytest.fixture
def nvme(loop: Loop, tmp_path: Path) -> Iterator[Driver]:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with driver(loop, drive=f"file:{image}") as made:
        made.enable()
        yield made


def refuse(*_: object) -> NoReturn:
    raise RuntimeError("can't start new thread")


def test_no_thread_is_to_be_had(nvme: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends with an error that the host may retry, and a shutdown does not wait for ever."""
    queue = nvme.create_pair()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    completion = nvme.run(queue, FLUSH, nsid=1)
    assert (completion.status, completion.flags) == (INTERNAL_ERROR, MORE)
    nvme.write(0x14, nvme.read(0x14) | 1 << 14)
    assert nvme.read(0x1C) == 9
    monkeypatch.undo()
    nvme.restart()
    assert nvme.run(nvme.create_pair(), FLUSH, nsid=1).status == 0


def test_with_one_thread_the_commands_wait_for_it(nvme: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, buffer = nvme.create_pair(), nvme.allocate()
    assert nvme.run(queue, FLUSH, nsid=1).status == 0
    monkeypatch.setattr(threading.Thread, "start", refuse)
    cids = [nvme.submit(queue, WRITE, nsid=1, prp1=buffer, cdw10=i) for i in range(10)]
    ended = [nvme.wait(queue) for _ in cids]
    assert sorted((completion.cid, completion.status) for completion in ended) == [(cid, 0) for cid in cids]


@pytest.mark.parametrize("method", ["flush", "read"])
def test_a_fault_of_our_own(
    nvme: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """In a thread, and in the loop."""

    def fail(*_: object) -> NoReturn:
        raise ValueError("a fault")

    queue = nvme.create_pair()
    if method == "flush":
        monkeypatch.setattr(Drive, "flush", fail)
        completion = nvme.run(queue, FLUSH, nsid=1)
    else:
        monkeypatch.setattr(Drive, "try_read", fail)
        completion = nvme.run(queue, 0x02, nsid=1, prp1=nvme.allocate())
    assert (completion.status, completion.flags) == (INTERNAL_ERROR, MORE)
    assert "failed" in caplog.text
    assert "ValueError: a fault" in caplog.text
    monkeypatch.undo()
    assert nvme.run(queue, FLUSH, nsid=1).status == 0


def test_a_fault_when_a_command_is_ended(nvme: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as RAM that has gone since."""
    queue = nvme.create_pair()
    monkeypatch.setattr(Drive, "try_read", lambda *_: False)
    cid = nvme.submit(queue, 0x02, nsid=1, prp1=0x1000)
    completion = nvme.wait(queue)
    assert (completion.cid, completion.status) == (cid, 0x004)
