# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux's nvme driver on drives that are full, broken, read-only, or have blocks of 4096 bytes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.filesystems import small_filesystem
from tests.support.fuseimage import READ, FuseImage, fuse_image
from tests.support.linuxguest import CommandFailed
from tests.support.vfiouserguest import VfioUserGuest, serving

MEBIBYTE = 1 << 20


class Bench(NamedTuple):
    """A guest, and what its disks are made of."""

    guest: VfioUserGuest
    full: Path
    """an image, on a filesystem with less room than it needs"""
    ballast: Path
    """a file there, which can be removed"""
    broken: FuseImage

    def disk(self, name: str) -> str:
        """The guest's name of a disk."""
        found = self.guest.run(f"basename $(dirname $(grep -lw {name} /sys/class/nvme/nvme*/serial))")
        return f"/dev/{found}n1"


@pytest.fixture(scope="module")
def bench(vfio_user_qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("drives")
    with ExitStack() as stack:
        folder = stack.enter_context(small_filesystem(directory / "small", 8 * MEBIBYTE))
        broken = stack.enter_context(fuse_image(directory / "broken"))
        locked = stack.enter_context(fuse_image(directory / "locked", is_read_only=True))
        locked.content[:8] = b"readable"
        full, ballast = folder / "image", folder / "ballast"
        with full.open("wb") as file:
            file.truncate(16 * MEBIBYTE)
        ballast.write_bytes(bytes(5 * MEBIBYTE))
        drives = {
            "full": f"file:{full}",
            "broken": f"file:{broken.path}",
            "locked": f"file:{locked.path}",
            "large": "memory:16M,block-size=4096",
        }
        devices = [f"nvme,id={name},drive={drive}" for name, drive in drives.items()]
        stack.enter_context(serving(directory, *devices))
        places = {name: {"addr": f"{5 + i:02x}.0"} for i, name in enumerate(drives)}
        guest = stack.enter_context(VfioUserGuest(vfio_user_qemu, directory, places))
        guest.run(f"until [ $(ls /dev/nvme*n1 2>/dev/null | wc -l) = {len(drives)} ]; do usleep 10000; done")
        yield Bench(guest, full, ballast, broken)


def test_a_full_filesystem(bench: Bench) -> None:
    """The writer is told, and can go on once there is room."""
    disk = bench.disk("full")
    write = f"dd if=/dev/zero of={disk} bs=64k count=64 oflag=direct 2>&1"
    with pytest.raises(CommandFailed, match="No space left on device"):
        bench.guest.run(write)
    bench.ballast.unlink()
    bench.guest.run(write)


def test_discarded_blocks_are_given_back(bench: Bench) -> None:
    disk = bench.disk("full")
    bench.ballast.unlink(missing_ok=True)
    bench.guest.run(f"dd if=/bin/busybox of={disk} bs=64k count=8 oflag=direct")
    assert bench.full.stat().st_blocks >= 1024
    bench.guest.run(f"blkdiscard {disk}")
    assert bench.full.stat().st_blocks == 0
    assert (
        bench.guest.run(f"dd if={disk} bs=64k count=8 iflag=direct 2> /dev/null | tr -d '\\0' | wc -c") == "0"
    )


def test_a_disk_that_cannot_be_read(bench: Bench) -> None:
    """The reader is told ENODATA, as of any bad medium. Other disks go on, and this one when it can be read."""
    disk = bench.disk("broken")
    bench.broken.errors[READ] = errno.EIO
    with pytest.raises(CommandFailed, match="No data available"):
        bench.guest.run(f"dd if={disk} of=/dev/null bs=4k count=1 iflag=direct 2>&1")
    bench.guest.run(f"dd if={bench.disk('large')} of=/dev/null bs=4k count=1 iflag=direct")
    bench.broken.errors.clear()
    bench.guest.run(f"dd if={disk} of=/dev/null bs=4k count=1 iflag=direct")


def test_a_read_only_image(bench: Bench) -> None:
    disk = bench.disk("locked")
    assert bench.guest.run(f"cat /sys/block/{disk.removeprefix('/dev/')}/ro") == "1"
    assert bench.guest.run(f"head -c 8 {disk}") == "readable"
    with pytest.raises(CommandFailed):
        bench.guest.run(f"echo text > {disk}")


def test_blocks_of_4096_bytes(bench: Bench) -> None:
    disk = bench.disk("large")
    queue = f"/sys/block/{disk.removeprefix('/dev/')}/queue"
    assert bench.guest.run(f"cat {queue}/logical_block_size") == "4096"
    bench.guest.run(f"diskcheck {disk} 8 both")
