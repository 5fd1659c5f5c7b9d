# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock QEMU on KVM that runs the guest, with its console on an inherited socket."""

from __future__ import annotations

import functools
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from common.guestconsole import GuestConsole

_GUEST = Path(__file__).parents[2] / "proxyd" / "vm" / "guest"
BOOT_TIMEOUT = 60.0  # SeaBIOS on an emulating KVM takes a second or two, on a busy machine more


@functools.cache
def guest_image() -> Path:
    """The guest's image, built from its source as it is now."""
    subprocess.run(["make", "--no-print-directory", "-C", str(_GUEST)], check=True, stdout=subprocess.DEVNULL)
    return _GUEST.parent / "guest.bin"


def guest_symbol(name: str) -> int:
    """The address of a function of the guest."""
    guest_image()
    listing = subprocess.run(
        ["nm", str(_GUEST / "guest.elf")], check=True, capture_output=True, text=True
    ).stdout
    return next(int(line.split()[0], 16) for line in listing.splitlines() if line.split()[-1] == name)


class QemuGuest:
    """One QEMU process with a ``pc`` machine; ``console`` speaks to the guest, which is ready."""

    def __init__(self, args: Sequence[str], pass_fds: Sequence[int] = (), machine: str = "") -> None:
        """``args`` follow on the command line, ``machine`` on the machine's options (with its comma)."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *("qemu-system-x86_64", "-machine", f"pc,accel=kvm{machine}", "-m", "64", "-nodefaults"),
                    *("-display", "none", "-name", "guest,debug-threads=on", "-kernel", str(guest_image())),
                    *("-chardev", f"socket,id=console,fd={theirs.fileno()}", "-serial", "chardev:console"),
                    *args,
                ],
                pass_fds=[theirs.fileno(), *pass_fds],
            )
        self.console = GuestConsole(ours)
        self.socket = ours
        try:
            self.console.wait_ready(BOOT_TIMEOUT)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills QEMU and closes the console."""
        self._process.kill()
        self._process.wait()
        self.console.close()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._process.pid

    def vcpu_switches(self) -> int:
        """How often the vCPU's thread has left a CPU, by its own will or not (proc(5), status)."""
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            if (task / "comm").read_text().startswith("CPU 0"):
                lines = (task / "status").read_text().splitlines()
                return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
        raise RuntimeError("QEMU has no vCPU thread")
