# SPDX-License-Identifier: GPL-2.0-or-later
"""SeaBIOS's nvme driver on nvme over vfio-user."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.support.qemu import GUESTS, PATIENCE, Qemu, build_guests
from tests.support.vfiouserguest import serving

READ = 64 * 512
"""bytes that the boot sector reads"""


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_the_firmware_boots_from_the_disk(vfio_user_qemu: str, tmp_path: Path, machine: str) -> None:
    build_guests()
    content = random.Random(1).randbytes(READ)
    image = tmp_path / "disk.img"
    image.write_bytes((GUESTS / "bootdisk.bin").read_bytes() + content + bytes(1 << 20))
    socket = {"type": "unix", "path": f"{tmp_path}/disk0.sock"}
    device = {"driver": "vfio-user-pci", "socket": socket, "addr": "05.0", "bootindex": 0}
    args = [
        *(
            "-machine",
            f"{machine},accel=tcg,memory-backend=ram",
            "-m",
            "64",
            "-nodefaults",
            "-display",
            "none",
        ),
        *("-object", "memory-backend-memfd,id=ram,size=64M,share=on", "-serial", "chardev:com1"),
        *("-device", json.dumps(device)),
    ]
    with (
        serving(tmp_path, f"nvme,id=disk0,addr=05.0,drive=file:{image}"),
        Qemu(args, program=vfio_user_qemu, channels=("com1",)) as qemu,
    ):
        com1 = qemu.channels["com1"]
        com1.settimeout(PATIENCE)
        received = b""
        while len(received) < 1 + READ and (data := com1.recv(65536)):
            received += data
            assert not received.startswith(b"BE\x01"), received[:3]
    assert received == b"B" + content
