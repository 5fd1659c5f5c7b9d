# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux's nvme driver with nothing but the INTx line, which it acknowledges by a queue's head."""

from __future__ import annotations

from pathlib import Path

from tests.support.vfiouserguest import VfioUserGuest, serving

DISK = "/dev/nvme0n1"


def test_without_messages(vfio_user_qemu: str, tmp_path: Path) -> None:
    """All queues share the line. No command waits for an interrupt in vain: the driver would say so."""
    with (
        serving(tmp_path, "nvme,id=disk0,addr=05.0,drive=memory:32M"),
        VfioUserGuest(vfio_user_qemu, tmp_path, {"disk0": {"addr": "05.0"}}, 2, "pci=nomsi") as guest,
    ):
        guest.run(f"until test -b {DISK}; do usleep 10000; done")
        assert "fasteoi" in guest.run("grep nvme0q0 /proc/interrupts")
        guest.run(f"diskcheck {DISK} 16 both")
        assert guest.complaints("nvme") == []
