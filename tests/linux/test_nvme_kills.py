# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux's nvme driver goes on while remoted is killed below it, again and again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from tests.support.keptremoted import KeptRemoted
from tests.support.vfiouserguest import PORT, VfioUserGuest

CPUS = 2
DISK = "/dev/nvme0n1"
KILLS = 5
LONGEST_LIFE = 0.5
"""seconds, once a process is ready"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(32 << 20)
    return path


@pytest.fixture
def remoted(image: Path) -> Iterator[KeptRemoted]:
    device = f"nvme,id=disk0,addr=05.0,transport=vfio-user,drive=file:{image}"
    arguments = ["--name=vm", f"--runtime-dir={image.parent}", f"--device={device}"]
    with KeptRemoted(image.parent, arguments) as remoted:
        yield remoted


def check(guest: VfioUserGuest, is_over: threading.Event) -> int:
    """Writes and verifies blocks until it is over, and once more. Returns how often."""
    count = 0
    while True:
        is_last = is_over.is_set()
        count += 1
        guest.run(f"diskcheck {DISK} 16 both {count}", timeout=120.0)
        if is_last:
            return count


def test_no_command_is_lost(vfio_user_qemu: str, image: Path, remoted: KeptRemoted) -> None:
    """Each block is verified by the guest, and its driver has waited for none of its commands in vain."""
    random = Random(1)
    with VfioUserGuest(vfio_user_qemu, image.parent, {"disk0": PORT}, CPUS) as guest:
        guest.run(f"until test -b {DISK}; do usleep 10000; done")
        with ThreadPoolExecutor(1) as pool:
            is_over = threading.Event()
            done = pool.submit(check, guest, is_over)
            try:
                for _ in range(KILLS):
                    threading.Event().wait(random.uniform(0, LONGEST_LIFE))
                    remoted.kill()
            finally:
                is_over.set()
            assert done.result() > 0
        assert guest.complaints("nvme", "vfio") == []
