# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted behind a vfio-user-pci that is unplugged, plugged and killed: nothing is left, and all works again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from subprocess import TimeoutExpired

import pytest

from tests.support.consolevfiouser import ConsoleGuest, check_interrupts, start_hammer
from tests.support.vfiouserprocess import VfioUserServer
from tests.support.wait import wait_until

SERIAL, EDU = "05.0", "06.0"
KILLS = 100


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VfioUserServer]:
    server = VfioUserServer(tmp_path_factory.mktemp("lifecycle"), {"com1": "pci-serial", "edu0": "edu"})
    yield server
    server.close()


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
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
