# SPDX-License-Identifier: GPL-2.0-or-later
"""What is seen of a function before QEMU's proxy gets its link."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from common.errors import ProtocolError
from common.pci import parse_devfn
from proxyd.vm.qmp.handover import connect, examine
from remoted.device import Bar, BarKind, PciFunction
from tests.support.remote import RemoteThread


class Wide(PciFunction):
    """BARs that a guest will find different behind QEMU's proxy, and some that it won't."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x0DD1
    BARS: ClassVar = {
        0: Bar(BarKind.MEM64, 1 << 32),
        2: Bar(BarKind.MEM64, 1 << 16),
        4: Bar(BarKind.IO, 8),
        5: Bar(BarKind.IO, 16),
    }


class PinD(PciFunction):
    VENDOR_ID, DEVICE_ID, INTERRUPT_PIN = 0x1234, 0x0DD2, 4


def look(directory: Path, model: type[PciFunction]) -> tuple[int, int, tuple[str, ...], tuple[str, ...]]:
    """Vendor, device, remarks and defects."""
    remote = RemoteThread(directory)
    remote.add(model, "dev0", parse_devfn("05.0"))
    remote.start()
    try:
        client = connect(remote.path("dev0"))
        try:
            return examine(client)[1:]
        finally:
            client.close()
    finally:
        remote.close()


def test_tells_what_a_guest_finds_different(tmp_path: Path) -> None:
    assert look(tmp_path, Wide) == (
        0x1234,
        0x0DD1,
        ("BAR 2 works below 4 GiB only", "BAR 4 takes 16 I/O ports instead of 8"),
        ("BAR 0 works nowhere behind QEMU's proxy: it has 4 GiB or more",),
    )


def test_refuses_a_pin_that_is_misrouted(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="interrupt pin 4"):
        look(tmp_path, PinD)
