# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted behind a vfio-user-pci that is unplugged, plugged and killed: nothing is left, and all works again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from subprocess import TimeoutExpired

import pytest

from tests.support.consolevfiouser import ConsoleGuest, check_interrupts, start_hammer
from tests.support.qemu import PATIENCE
from tests.support.vfiouserprocess import VfioUserServer
from tests.support.wait import wait_until

SERIAL, EDU = "05.0", "06.0"
ACCELERATORS = ["kvm", "tcg"]
KILLS = 100


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VfioUserServer]:
    server = VfioUserServer(tmp_path_factory.mktemp("lifecycle"), {"com1": "pci-serial", "edu0": "edu"})
    yield server
    server.close()


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_firmware_and_resets_with_lines_high(
    requires_kvm: None, server: VfioUserServer, vfio_user_qemu: str, tmp_path: Path, accelerator: str
) -> None:
    """SeaBIOS sizes the BARs, and programs the PIIX3 and the PICs before the guest does."""
    with ConsoleGuest(tmp_path, server, vfio_user_qemu, accelerator, seabios=True) as guest:
        check_interrupts(guest, 50, held=10)
        for addr in (SERIAL, EDU):
            guest.ok(f"hold {addr}")
            guest.monitor.execute("system_reset")
            guest.console.wait_ready(PATIENCE)
            assert not any(server.status(name)["level"] for name in server.addresses)
            check_interrupts(guest, 50, held=10)
    server.await_nothing_left()


def test_writes_that_are_answered(
    requires_kvm: None, server: VfioUserServer, vfio_user_qemu: str, tmp_path: Path
) -> None:
    """QEMU posts none when it is told so, or when a BAR of the device is mapped."""
    no_posted_writes = {"x-no-posted-writes": True}
    with ConsoleGuest(tmp_path, server, vfio_user_qemu, "kvm", **no_posted_writes) as guest:
        check_interrupts(guest, 100, held=10)
    server.await_nothing_left()


def test_ram_that_is_not_shared(requires_kvm: None, vfio_user_qemu: str, tmp_path: Path) -> None:
    """The operator is told by which option of QEMU DMA becomes possible; interrupts don't need it.

    With a process of its own: the log of the other tests' may have reached its limit.
    """
    option = "memory-backend-memfd"
    with closing(VfioUserServer(tmp_path, {"com1": "pci-serial", "edu0": "edu"})) as server:
        with ConsoleGuest(tmp_path, server, vfio_user_qemu, "kvm", shares_ram=False) as guest:
            check_interrupts(guest, 50, held=10)
            for name in server.addresses:
                assert option in str(server.status(name)["amiss"])
            wait_until(lambda: option in server.log, "the log names the option")
        server.await_nothing_left()
        assert not any(server.status(name)["amiss"] for name in server.addresses)


def test_functions_that_share_a_gsi(requires_kvm: None, vfio_user_qemu: str, tmp_path: Path) -> None:
    """Each EOI reaches both functions, and asserts again only the line that is high."""
    devices = {"com1": "pci-serial", "edu0": "edu", "com2": "pci-serial", "edu1": "edu"}
    with closing(VfioUserServer(tmp_path, devices, slots=(5, 6, 9, 10))) as server:
        with ConsoleGuest(tmp_path, server, vfio_user_qemu, "kvm") as guest:
            check_interrupts(guest, 500, held=50)
            gsis = [record.number("gsi") for record in guest.ok("setup").of_kind("function")]
            assert sorted(gsis) == [10, 10, 11, 11]
            for addr in server.addresses.values():
                guest.ok(f"reroute {addr}")
            check_interrupts(guest, 50, held=10)
        server.await_nothing_left()


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_unplug_and_replug(
    requires_kvm: None, server: VfioUserServer, vfio_user_qemu: str, tmp_path: Path, accelerator: str
) -> None:
    """Also with a line that is high: nothing is left in remoted, and the device works when it is back."""
    with ConsoleGuest(tmp_path, server, vfio_user_qemu, accelerator) as guest:
        for turn in range(5):
            check_interrupts(guest, 10, held=5)
            if turn % 2:
                guest.ok(f"hold {(SERIAL, EDU)[turn // 2 % 2]}")
            guest.unplug("com1", "edu0")
            server.await_nothing_left()
            guest.plug("com1", "edu0")


def test_qemu_is_killed_at_100_random_moments(
    requires_kvm: None, server: VfioUserServer, vfio_user_qemu: str, tmp_path: Path
) -> None:
    """From the start of the process until well into its traffic; the next client finds all as the first did."""
    random = Random(11)

    def raised() -> int:
        return int(server.status("com1")["raised"])

    begin = time.monotonic()
    with start_hammer(server, "com1", vfio_user_qemu):
        before = raised()
        wait_until(lambda: raised() > before + 10, "the firmware raises its line")
        startup = time.monotonic() - begin
    interrupted = 0
    for _ in range(KILLS):
        before = raised()
        with start_hammer(server, "com1", vfio_user_qemu) as qemu, pytest.raises(TimeoutExpired):
            qemu.process.wait(random.uniform(0, 1.5 * startup))
        server.await_nothing_left()
        interrupted += raised() > before
    assert 0 < interrupted < KILLS
    assert "Traceback" not in server.log
    with ConsoleGuest(tmp_path, server, vfio_user_qemu, "kvm") as guest:
        check_interrupts(guest, 20, held=5)
