# SPDX-License-Identifier: GPL-2.0-or-later
"""The embedded VM as an object: what is released when it can't be made, and when it is closed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from common.config import DeviceConfig, VmConfig
from common.errors import UsageError
from common.loop import Loop
from proxyd.vm import embedded
from proxyd.vm.embedded import KICK_SIGNAL, Embedded
from proxyd.vm.multiboot import Image
from tests.support.fds import count_fds

pytestmark = pytest.mark.usefixtures("requires_kvm")


def config_in(directory: Path) -> VmConfig:
    device = DeviceConfig("edu0", None, 0x28, None, None, None, {})
    return VmConfig("vm", directory, "embedded", (device,))


def test_a_console_that_is_in_use(tmp_path: Path) -> None:
    loop = Loop()
    first = Embedded("iohub-proxyd", config_in(tmp_path), loop)
    before = count_fds()
    with pytest.raises(UsageError, match=r"proxyd\.console is in use by a live daemon"):
        Embedded("iohub-proxyd", config_in(tmp_path), loop)
    assert count_fds() == before
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
    assert count_fds() == before
    assert not list(tmp_path.iterdir())


def test_close_before_run(tmp_path: Path) -> None:
    before = count_fds()
    loop = Loop()
    Embedded("iohub-proxyd", config_in(tmp_path), loop).close()
    loop.close()
    assert count_fds() == before
    assert not list(tmp_path.iterdir())


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
    assert count_fds() == before
    assert signal.getsignal(KICK_SIGNAL) is signal.SIG_DFL
