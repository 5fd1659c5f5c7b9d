# SPDX-License-Identifier: GPL-2.0-or-later
"""The embedded VM as an object: what is released when it can't be made, and when it is closed."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from common import pci
from common.config import DeviceConfig, VmConfig
from common.errors import UsageError
from common.loop import Loop
from proxyd.vm.embedded import embedded
from proxyd.vm.embedded.embedded import KICK_SIGNAL, Embedded, Machine
from proxyd.vm.embedded.multiboot import Image
from remoted.devices.edu import Edu
from remoted.devices.edu_dma import (
    BUFFER_START,
    COMMAND_FROM_DEVICE,
    COMMAND_RUN,
    REG_COMMAND,
    REG_COUNT,
    REG_DESTINATION,
    REG_SOURCE,
)
from tests.support.fds import await_fds, count_fds
from tests.support.remote import RemoteThread
from tests.support.wait import wait_until

pytestmark = pytest.mark.usefixtures("requires_kvm")

EDU = pci.parse_devfn("05.0")
BAR = 0xE000_0000
SOURCE, TARGET = 0x80_0000, 0x90_0123


def config_in(directory: Path) -> VmConfig:
    device = DeviceConfig("edu0", None, EDU, None, None, None, {})
    return VmConfig("vm", str(directory), "embedded", (device,))


def test_a_console_that_is_in_use(tmp_path: Path) -> None:
    loop = Loop()
    before = count_fds()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "proxyd.console"))
        other.listen()
        with pytest.raises(UsageError, match=rf"proxyd\.console is in use by \S+\[{os.getpid()}\]$"):
            Embedded("iohub-proxyd", config_in(tmp_path), loop)
    await_fds(before)
    assert os.listdir(tmp_path) == ["proxyd.console"]
    loop.close()


def test_a_second_daemon_touches_nothing_of_the_first(tmp_path: Path) -> None:
    loop = Loop()
    first = Embedded("iohub-proxyd", config_in(tmp_path), loop)
    before = count_fds()
    with pytest.raises(UsageError, match=rf"\[{os.getpid()}\] runs in {tmp_path} already: stop it"):
        Embedded("iohub-proxyd", config_in(tmp_path), loop)
    await_fds(before)
    assert {"proxyd.console", "proxyd.varlink"} <= set(os.listdir(tmp_path))
    first.close()
    loop.close()


def test_a_guest_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image(b"", 0x100000, embedded.RAM_SIZE + 1, 0x100000)
    monkeypatch.setattr(embedded, "parse_image", lambda _file, _name: image)
    before = count_fds()
    loop = Loop()
    with pytest.raises(UsageError, match="bytes of RAM"):
        Embedded("iohub-proxyd", config_in(tmp_path), loop)
    loop.close()
    await_fds(before)
    assert not list(tmp_path.iterdir())


def test_close_before_run(tmp_path: Path) -> None:
    before = count_fds()
    loop = Loop()
    Embedded("iohub-proxyd", config_in(tmp_path), loop).close()
    loop.close()
    await_fds(before)
    assert not list(tmp_path.iterdir())


def test_no_thread_for_the_vcpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = count_fds()
    loop = Loop()
    vm = Embedded("iohub-proxyd", config_in(tmp_path), loop)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(UsageError, match=r"^no thread for the guest's CPU: can't start new thread$"):
            vm.run()
    vm.close()
    loop.close()
    await_fds(before)


def test_close_of_a_guest_that_has_died(tmp_path: Path) -> None:
    """Its code is where nothing is, and so are its exception handlers; the vCPU's thread ends by itself."""
    before = count_fds()
    loop = Loop()
    vm = Embedded("iohub-proxyd", config_in(tmp_path), loop)
    vcpu = vm._machine._vcpu
    sregs = vcpu.get_sregs()
    sregs.idt.limit = 0
    vcpu._start(sregs, 0xFFFF_FFF0, 0)
    assert vm.run() == 1
    vm.close()
    loop.close()
    await_fds(before)
    assert signal.getsignal(KICK_SIGNAL) is signal.SIG_DFL


def test_a_device_reaches_the_guests_ram(tmp_path: Path) -> None:
    """Through edu's DMA engine, there and back; also after its remote was started again."""
    before = count_fds()
    loop = Loop()
    vm = Embedded("iohub-proxyd", config_in(tmp_path), loop)
    machine = vm._machine
    [proxy] = vm._board._proxies
    try:
        for text in (b"out of RAM and back", b"once more"):
            remote = RemoteThread(tmp_path)
            remote.add(Edu, "edu0", EDU)
            remote.start()
            proxy.connect()
            proxy.attach()
            config_write(machine, pci.PCI_BASE_ADDRESS_0, BAR)
            config_write(machine, pci.PCI_COMMAND, pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER)
            machine._ram[SOURCE : SOURCE + len(text)] = text
            transfer(machine, SOURCE, BUFFER_START, len(text), COMMAND_RUN)
            transfer(machine, BUFFER_START, TARGET, len(text), COMMAND_RUN | COMMAND_FROM_DEVICE)
            assert machine._ram[TARGET : TARGET + len(text)] == text
            remote.close()
            proxy.check_link()
            proxy.reap()
    finally:
        vm.close()
        loop.close()
    await_fds(before)


def config_write(machine: Machine, offset: int, value: int) -> None:
    machine.port_out(0xCF8, 4, 1 << 31 | EDU << 8 | offset)
    machine.port_out(0xCFC, 4, value)


def transfer(machine: Machine, source: int, destination: int, count: int, command: int) -> None:
    """Programs the engine and waits for its end."""
    registers = (
        (REG_SOURCE, source),
        (REG_DESTINATION, destination),
        (REG_COUNT, count),
        (REG_COMMAND, command),
    )
    for register, value in registers:
        machine._host.mmio_write(BAR + register, 4, value)
    wait_until(
        lambda: not machine._host.mmio_read(BAR + REG_COMMAND, 4) & COMMAND_RUN, "the transfer is over"
    )
