# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock QEMU that runs the guest, with its console on an inherited socket."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from common.ctl.guestconsole import GuestConsole
from tests.support.qemu import PATIENCE, QEMU, Qemu, boot, guest_image, pc_machine


def guest_symbol(name: str) -> int:
    """The address of a function of the guest."""
    elf = guest_image().parent / "guest" / "guest.elf"
    listing = subprocess.run(["nm", str(elf)], check=True, capture_output=True, text=True).stdout
    return next(int(line.split()[0], 16) for line in listing.splitlines() if line.split()[-1] == name)


class QemuGuest(Qemu):
    """One QEMU process with a ``pc`` machine; ``console`` speaks to the guest, which is ready."""

    def __init__(
        self,
        args: Sequence[str],
        pass_fds: Sequence[int] = (),
        machine: str = "",
        seabios: bool = False,
        program: str = QEMU,
        accelerator: str = "kvm",
    ) -> None:
        """``args`` follow on the command line, ``machine`` on the machine's options (with its comma)."""
        super().__init__(
            [
                *pc_machine(machine, accelerator),
                *boot(guest_image(), seabios),
                *("-name", "guest,debug-threads=on", "-serial", "chardev:console"),
                *args,
            ],
            pass_fds,
            channels=("console",),
            program=program,
        )
        with self._starting() as owned:
            self.console = owned.enter_context(GuestConsole(self.channels["console"]))
            self.console.wait_ready(PATIENCE)

    def vcpu_switches(self) -> int:
        """How often the vCPU's thread has left a CPU, by its own will or not (proc(5), status)."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            if (task / "comm").read_text().startswith("CPU 0"):
                lines = (task / "status").read_text().splitlines()
                return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
        raise RuntimeError("QEMU has no vCPU thread")
