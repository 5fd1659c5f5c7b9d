# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU and nvme exclude each other from an image."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from common.errors import UsageError
from remoted.devices.nvme.drive import open_drive
from tests.support.qemu import PATIENCE, QEMU, Qemu


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


def disk(image: Path, options: str = "") -> list[str]:
    return [
        *("-machine", "pc,accel=tcg", "-nodefaults", "-display", "none", "-S"),
        *("-blockdev", f"raw,node-name=disk,file.driver=file,file.filename={image}{options}"),
        *("-device", "virtio-blk-pci,drive=disk"),
    ]


def await_start(monitor: socket.socket) -> None:
    """Waits until QEMU has opened its images: its monitor answers a command."""
    monitor.settimeout(PATIENCE)
    monitor.sendall(json.dumps({"execute": "qmp_capabilities"}).encode())
    with monitor.makefile() as lines:
        assert "QMP" in json.loads(lines.readline())
        assert "return" in json.loads(lines.readline())


@pytest.mark.parametrize("options", ["", ",read-only=on"])
def test_qemu_has_it(image: Path, options: str) -> None:
    with Qemu([*disk(image, options), "-mon", "chardev=mon,mode=control"], channels=("mon",)) as qemu:
        await_start(qemu.channels["mon"])
        with pytest.raises(UsageError, match="is in use by another process"):
            open_drive(f"file:{image}", None)
    open_drive(f"file:{image}", None).close()


@pytest.mark.parametrize("options", ["", ",read-only=on"])
def test_nvme_has_it(image: Path, options: str) -> None:
    drive = open_drive(f"file:{image}", None)
    try:
        ended = subprocess.run(
            [QEMU, *disk(image, options)], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert ended.returncode == 1
        assert "lock" in ended.stderr
    finally:
        drive.close()
