# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux plugs and unplugs devices over vfio-user while it runs.

With msix=off: QEMU 11.1 aborts at the unplug of a device that shows MSI-X (vfio_user_instance_finalize(),
hw/vfio-user/pci.c, takes the PBA's memory region out of a container that it has left before).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from common.ctl.children import Child
from tests.support.fds import settled_fds
from tests.support.vfiouserguest import PORT, VfioUserGuest, serving

DISK = "/dev/nvme0n1"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hotplug")


@pytest.fixture(scope="module")
def remoted(directory: Path) -> Iterator[Child]:
    with serving(directory, "nvme,id=disk0,addr=05.0,drive=memory:16M,msix=off") as remoted:
        yield remoted


@pytest.fixture(scope="module")
def guest(vfio_user_qemu: str, directory: Path, remoted: Child) -> Iterator[VfioUserGuest]:
    with VfioUserGuest(vfio_user_qemu, directory, {}, cpus=2) as guest:
        yield guest


def usage(pid: int) -> tuple[int, int]:
    """How many fds a process has, and how many maps of memfds, such as the guest's RAM."""
    return settled_fds(pid), Path(f"/proc/{pid}/maps").read_text().count("/memfd:")


def await_disk(guest: VfioUserGuest) -> None:
    guest.run(f"until test -b {DISK}; do usleep 10000; done")


def test_a_disk_is_plugged_and_unplugged_twenty_times(guest: VfioUserGuest, remoted: Child) -> None:
    before = usage(remoted.process.pid)
    for count in range(20):
        guest.plug("disk0", PORT)
        await_disk(guest)
        guest.run(f"diskcheck {DISK} 1 {'verify' if count else 'both'}")
        assert "PCI-MSI-" in guest.run("grep nvme0q1 /proc/interrupts")
        guest.unplug("disk0")
        guest.run(f"! test -e {DISK}")
    assert guest.complaints("nvme", "pci ") == []
    assert usage(remoted.process.pid) == before


def test_a_disk_comes_and_goes_with_proxyd(guest: VfioUserGuest, remoted: Child, directory: Path) -> None:
    arguments = [
        "--name=vm",
        f"--runtime-dir={directory}",
        f"--vm=qmp:{directory}/qmp.sock",
        "--unplug-on-exit",
    ]
    device = "--device=id=disk0,addr=05.0,transport=vfio-user"
    before = usage(remoted.process.pid)
    for count in range(3):
        proxyd = Child("proxyd", [*arguments, device], directory)
        try:
            await_disk(guest)
            guest.run(f"diskcheck {DISK} 1 {'verify' if count else 'both'} 2")
        finally:
            assert proxyd.end() == 0
        guest.run(f"! test -e {DISK}")
    assert usage(remoted.process.pid) == before
