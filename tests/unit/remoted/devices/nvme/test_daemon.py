# SPDX-License-Identifier: GPL-2.0-or-later
"""nvme in a remoted of its own, over vfio-user."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from common import pci
from common.ctl.children import Child, ChildFailed
from common.loop import Loop
from remoted.devices.nvme.controller import Nvme
from tests.support.devices import FunctionBench
from tests.support.fuseimage import fuse_image
from tests.support.nvmedriver import PAGE, RAM_SIZE, RAM_START, Driver
from tests.support.vfiouserclient import CONFIG_REGION, MSIX, VfioUserClient

FLUSH, WRITE, READ = 0x00, 0x01, 0x02


class Remote:
    """What a driver does to registers, by messages."""

    def __init__(self, client: VfioUserClient) -> None:
        self.client = client
        self.function: Any = None

    def read(self, offset: int, size: int, bar: int = 0) -> int:
        return self.client.read(bar, offset, size)

    def write(self, offset: int, size: int, value: int, bar: int = 0) -> None:
        self.client.write(bar, offset, value, size, posted=True)


class RemoteDriver(Driver):
    """A driver over a vfio-user link. Interrupts wake its loop."""

    def __init__(self, client: VfioUserClient, stack: ExitStack) -> None:
        self._client = client
        self._stack = stack
        super().__init__(stack.enter_context(_loop()))

    def make_bench(self) -> FunctionBench[Nvme]:
        return cast(FunctionBench[Nvme], Remote(self._client))

    def attach(self) -> None:
        client = self._client
        command = pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER
        client.write(CONFIG_REGION, pci.PCI_COMMAND, command, 2)
        client.dma_map(RAM_START, RAM_SIZE, self._fd)
        self.interrupt = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stack.callback(os.close, self.interrupt)
        client.attach(MSIX, 0, [self.interrupt])
        offset = client.read(CONFIG_REGION, pci.PCI_CAPABILITY_LIST, 1)
        while client.read(CONFIG_REGION, offset, 1) != pci.PCI_CAP_ID_MSIX:
            offset = client.read(CONFIG_REGION, offset + 1, 1)
        client.write(CONFIG_REGION, offset + 2, 0x8000, 2)
        self.loop.add(self.interrupt, self._on_interrupt)

    def _on_interrupt(self, _events: int) -> None:
        os.eventfd_read(self.interrupt)

    def close(self) -> None:
        self.ram.close()
        os.close(self._fd)


class _loop:
    """A loop, closed at the end."""

    def __enter__(self) -> Loop:
        self.loop = Loop()
        return self.loop

    def __exit__(self, *_: object) -> None:
        self.loop.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, directory: Path, drive: str) -> tuple[Child, RemoteDriver]:
    device = f"nvme,id=disk0,addr=05.0,transport=vfio-user,drive={drive}"
    arguments = ["--name=vm1", f"--runtime-dir={directory}", f"--device={device}"]
    child = Child("remoted", arguments, directory)
    stack.callback(child.kill)
    client = stack.enter_context(VfioUserClient.connect(str(directory / "disk0.sock")))
    client.version()
    driver = RemoteDriver(client, stack)
    stack.callback(driver.close)
    return child, driver


def test_what_was_flushed_outlives_a_kill(stack: ExitStack, tmp_path: Path) -> None:
    """The image's server keeps what was synchronized apart from what was only written."""
    with fuse_image(tmp_path / "fuse") as image:
        child, nvme = start(stack, tmp_path, f"file:{image.path}")
        nvme.enable()
        queue = nvme.create_pair()
        flushed, written = nvme.allocate(), nvme.allocate()
        data = random.Random(1).randbytes(PAGE)
        nvme.store(flushed, data)
        nvme.store(written, b"w" * PAGE)
        assert nvme.run(queue, WRITE, nsid=1, prp1=flushed, cdw10=8, cdw12=7).status == 0
        assert image.durable == bytes(len(image.content))
        assert nvme.run(queue, FLUSH, nsid=1).status == 0
        os.kill(child.process.pid, signal.SIGKILL)
        assert image.durable[8 * 512 : 16 * 512] == data
        child.process.wait()


def test_it_starts_again_on_its_image_after_a_kill(stack: ExitStack, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    child, nvme = start(stack, tmp_path, f"file:{image}")
    nvme.enable()
    queue = nvme.create_pair()
    source = nvme.allocate()
    for i in range(100):
        nvme.store(source, i.to_bytes(4, "little") * 128)
        assert nvme.run(queue, WRITE, nsid=1, prp1=source, cdw10=i).status == 0
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait()
    _, nvme = start(stack, tmp_path, f"file:{image}")
    nvme.enable()
    target = nvme.allocate()
    queue = nvme.create_pair()
    for i in range(100):
        assert nvme.run(queue, READ, nsid=1, prp1=target, cdw10=i).status == 0
        assert nvme.load(target, 512) == i.to_bytes(4, "little") * 128


def test_an_image_in_use_is_refused_in_one_line(stack: ExitStack, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    start(stack, tmp_path, f"file:{image}")
    second = tmp_path / "second"
    second.mkdir()
    with pytest.raises(ChildFailed) as refusal:
        start(stack, second, f"file:{image}")
    complaint = f"device disk0: drive=file:{image}: is in use by another process"
    assert complaint in str(refusal.value)
    assert len((second / "remoted.log").read_text().splitlines()) == 1
