# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux's nvme driver on nvme over vfio-user, with an interrupt and a queue for each CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.linuxguest import busybox, check_ext4, read_ext4
from tests.support.vfiouserguest import PORT, VfioUserGuest, serving
from tests.support.wait import wait_until

CPUS = 4
DISK = "/dev/nvme0n1"
MEBIBYTES = 256
IMAGE_SIZE = 320 << 20


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nvme") / "disk.img"
    with path.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    return path


@pytest.fixture(scope="module")
def guest(vfio_user_qemu: str, image: Path) -> Iterator[VfioUserGuest]:
    device = f"nvme,id=disk0,addr=05.0,drive=file:{image}"
    with (
        serving(image.parent, device),
        VfioUserGuest(vfio_user_qemu, image.parent, {"disk0": PORT}, CPUS) as guest,
    ):
        await_disk(guest)
        yield guest


def interrupts(guest: VfioUserGuest) -> dict[str, int]:
    """The counts of all CPUs, by queue."""
    lines = guest.run("grep nvme0q /proc/interrupts").splitlines()
    return {line.split()[-1]: sum(map(int, line.split()[1 : 1 + CPUS])) for line in lines}


def await_disk(guest: VfioUserGuest) -> None:
    """Waits until the guest has found its disk."""
    guest.run(f"until test -b {DISK}; do usleep 10000; done")


def await_work(guest: VfioUserGuest) -> None:
    """Waits until each I/O queue has completed more commands."""
    before = interrupts(guest)
    del before["nvme0q0"]
    wait_until(
        lambda: all(interrupts(guest)[queue] > count + 20 for queue, count in before.items()),
        "all queues are at work",
    )


def pci_address(guest: VfioUserGuest) -> str:
    return guest.run("basename $(realpath /sys/block/nvme0n1/device/device)")


def test_the_driver_finds_it_and_complains_of_nothing(guest: VfioUserGuest) -> None:
    assert guest.run("cat /sys/block/nvme0n1/size") == str(IMAGE_SIZE // 512)
    assert guest.run("cat /sys/class/nvme/nvme0/serial").strip() == "disk0"
    assert "4/0/0 default/read/poll queues" in guest.run("dmesg | grep 'nvme nvme0'")
    assert "PCIe" in guest.run(f"cat /sys/bus/pci/devices/{pci_address(guest)}/current_link_speed")
    assert guest.complaints("nvme", "pcieport", "pci ", pci_address(guest)) == []


def test_what_was_written_is_read_by_all_queues(guest: VfioUserGuest) -> None:
    before = interrupts(guest)
    guest.run(f"diskcheck {DISK} {MEBIBYTES} both", timeout=120.0)
    after = interrupts(guest)
    for queue in range(1, CPUS + 1):
        assert after[f"nvme0q{queue}"] - before[f"nvme0q{queue}"] > 1000


def test_a_filesystem_made_in_the_guest_is_whole_on_the_host(guest: VfioUserGuest, image: Path) -> None:
    guest.run(f"mkfs.ext4 -q {DISK} && mount -t ext4 {DISK} /mnt")
    guest.run(
        "mkdir /mnt/folder && cp /bin/busybox /mnt/folder/copy && seq 100000 > /mnt/numbers && umount /mnt"
    )
    check_ext4(image)
    assert read_ext4(image, "/folder/copy") == busybox()
    assert read_ext4(image, "/numbers").splitlines() == [b"%d" % number for number in range(1, 100001)]


def test_the_disk_is_removed_and_found_again(guest: VfioUserGuest) -> None:
    guest.run(f"diskcheck {DISK} 4 write 7")
    guest.run(f"echo 1 > /sys/bus/pci/devices/{pci_address(guest)}/remove && ! test -e {DISK}")
    guest.run("echo 1 > /sys/bus/pci/rescan")
    await_disk(guest)
    guest.run(f"diskcheck {DISK} 4 verify 7")


def test_writes_go_on_over_resets_of_the_controller(guest: VfioUserGuest) -> None:
    check = f"diskcheck {DISK} 16 both 8"
    guest.run(f"(until test -e /tmp/enough; do {check} || exit 1; done) & writer=$!")
    for _ in range(5):
        await_work(guest)
        guest.run("echo 1 > /sys/class/nvme/nvme0/reset_controller")
    guest.run("touch /tmp/enough; wait $writer")


def test_the_guest_is_reset_in_the_middle_of_its_writes(guest: VfioUserGuest) -> None:
    guest.run(f"(while diskcheck {DISK} 16 write 9; do :; done) > /dev/null &")
    await_work(guest)
    guest.monitor.execute("system_reset")
    guest.wait_ready()
    await_disk(guest)
    guest.run(f"diskcheck {DISK} 16 both 10")
    assert guest.complaints("nvme", "pci ") == []
