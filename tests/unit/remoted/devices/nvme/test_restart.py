# SPDX-License-Identifier: GPL-2.0-or-later
"""A controller that outlives its process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import pci
from tests.support.checkout import ROOT
from tests.support.fuseimage import WRITE, fuse_image
from tests.support.nvmedriver import CC, CC_DEFAULT, CSTS, PAGE
from tests.support.nvmelives import Machine
from tests.support.steploop import run_until

FLUSH, WRITE_BLOCKS = 0x00, 0x01
SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def machine(image: Path) -> Iterator[Machine]:
    machine = Machine(f"file:{image}")
    machine.enable()
    yield machine
    machine.close()


def test_the_controller_goes_on(machine: Machine) -> None:
    """Queues, features, requests for events, registers, masks."""
    queue = machine.create_pair(number=2, size=7, vector=2)
    buffer = machine.allocate()
    assert machine.run(machine.admin, 0x09, cdw10=0x0B, cdw11=0xFF).status == 0
    event = machine.submit(machine.admin, 0x0C)
    machine.write(0x0C, 0xF0)
    for _ in range(5):
        assert machine.run(queue, FLUSH, nsid=1).status == 0
    registers = [machine.read(offset) for offset in range(0, 0x40, 4)]
    machine.start_again()
    assert [machine.read(offset) for offset in range(0, 0x40, 4)] == registers
    for _ in range(10):
        assert machine.run(queue, FLUSH, nsid=1).status == 0
    assert machine.run(machine.admin, 0x0A, cdw10=0x0B).dword0 == 0xFF
    machine.write(0x1000 + 8 * 9, 1)
    completion = machine.wait(machine.admin)
    assert (completion.cid, completion.dword0) == (event, 0x01_00_00)
    assert machine.run(machine.admin, 0x00, cdw10=2).status == 0
    assert machine.run(machine.admin, 0x06, prp1=buffer, cdw10=1).status == 0


def test_what_is_under_way_is_done_by_the_next_process(tmp_path: Path) -> None:
    with fuse_image(tmp_path / "fuse") as image:
        machine = Machine(f"file:{image.path}")
        machine.enable()
        queue = machine.create_pair()
        source = machine.allocate()
        machine.store(source, b"w" * PAGE)
        image.held.add(WRITE)
        write = machine.submit(queue, WRITE_BLOCKS, nsid=1, prp1=source, cdw12=7)
        run_until(machine.loop, lambda: image.waiting)
        delete = machine.submit(machine.admin, 0x00, cdw10=1)
        machine.loop.step(0)
        machine.put(queue, bytes(64))  # the guest may use the command's slot again
        image.release()
        machine.start_again()
        assert machine.wait(queue).cid == write
        assert machine.wait(machine.admin).cid == delete
        assert image.content[: PAGE + 1] == b"w" * PAGE + b"\0"
        machine.close()


@pytest.mark.parametrize("is_shutdown", [False, True])
def test_a_reset_or_shutdown_is_ended_by_the_next_process(tmp_path: Path, is_shutdown: bool) -> None:
    with fuse_image(tmp_path / "fuse") as image:
        machine = Machine(f"file:{image.path}")
        machine.enable()
        queue = machine.create_pair()
        image.held.add(WRITE)
        machine.submit(queue, WRITE_BLOCKS, nsid=1, prp1=machine.allocate())
        run_until(machine.loop, lambda: image.waiting)
        machine.write(CC, CC_DEFAULT | (1 << 14 | 1 if is_shutdown else 0))
        assert machine.read(CSTS) == (5 if is_shutdown else 1)
        image.release()
        machine.start_again()
        ended: Callable[[], bool] = lambda: machine.read(CSTS) == (9 if is_shutdown else 0)  # noqa: E731
        run_until(machine.loop, ended)
        machine.close()


def test_bus_mastering_is_kept(machine: Machine) -> None:
    machine.start_again()
    assert machine.function.config_read(pci.PCI_COMMAND, 2) & pci.PCI_COMMAND_MASTER


def test_kills_at_lines_of_its_code(image: Path) -> None:
    """Each command is completed exactly once, also if the guest has seen some completions before the kill."""
    arguments = [sys.executable, "-m", "tests.support.nvmekills", str(image), "1", "29"]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60.0, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert int(ended.stdout.removesuffix(" lines\n")) > 500
