# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU as a process of a test: its command line, what boots a guest in it, and its end."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.checkout import ROOT

QEMU = "qemu-system-x86_64"
PATIENCE = 60.0
"""seconds; SeaBIOS on an emulating KVM takes one or two, on a busy machine more"""
GUESTS = Path(__file__).parent.parent / "guests"
FIRMWARE_SIZE = 1 << 16

_LOAD_ADDRESS = 0x100000


def make(target: str) -> None:
    """Makes a target of the checkout, by one process at a time."""
    with (ROOT / "Makefile").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "--silent", "--no-print-directory", target], cwd=ROOT, check=True)


@functools.cache
def newer_qemu() -> str | None:
    """A QEMU that has vfio-user-pci (10.1 or later): the system's, or else the one that ``make qemu`` brings."""
    for program in (QEMU, str(ROOT / "build" / "qemu" / QEMU)):
        if shutil.which(program):
            listing = subprocess.run(
                [program, "-device", "vfio-user-pci,help"], capture_output=True, check=False
            )
            if listing.stdout:
                return program
    return None


@functools.cache
def build_guests() -> None:
    """Brings all guest images up to date with their sources, once a session and by one process at a time."""
    make("guest")


def guest_image() -> Path:
    """The image of the guest with the console."""
    build_guests()
    return ROOT / "proxyd" / "vm" / "embedded" / "guest.bin"


def pc_machine(options: str = "", accelerator: str = "kvm") -> list[str]:
    """A ``pc`` with 64 MiB and nothing but its chipset; ``options`` of -machine, with their comma."""
    return ["-machine", f"pc,accel={accelerator}{options}", "-m", "64", "-nodefaults", "-display", "none"]


def boot(image: Path, seabios: bool = False) -> list[str]:
    """Starts a multiboot image that is loaded at 1 MiB: by SeaBIOS, or in a tenth of its time."""
    if seabios:
        return ["-kernel", str(image)]
    build_guests()
    loader = f"loader,file={image},addr={_LOAD_ADDRESS:#x},force-raw=on"
    return ["-bios", str(GUESTS / "firmware.bin"), "-device", loader]


class Qemu:
    """One process, which is killed at the end; then what it owns is closed."""

    def __init__(
        self,
        args: Sequence[str],
        pass_fds: Sequence[int] = (),
        cwd: Path | None = None,
        channels: Sequence[str] = (),
        program: str = QEMU,
    ) -> None:
        """Starts it, with a chardev for each id in ``channels``, which ``self.channels`` has the other end of."""
        self.channels: dict[str, socket.socket] = {}
        command, fds = [program], list(pass_fds)
        with ExitStack() as owned, ExitStack() as theirs:
            for name in channels:
                ours, end = socket.socketpair()
                self.channels[name] = owned.enter_context(ours)
                fds.append(theirs.enter_context(end).fileno())
                command += ["-chardev", f"socket,id={name},fd={end.fileno()}"]
            self.process = subprocess.Popen([*command, *args], pass_fds=fds, cwd=cwd)
            self._owned = owned.pop_all()
        self.pid = self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills it; once more does nothing."""
        self.process.kill()
        self.process.wait()
        self._owned.close()

    @contextmanager
    def _starting(self) -> Iterator[ExitStack]:
        """What is put on the stack is closed with the process; an error ends the process at once."""
        try:
            yield self._owned
        except BaseException:
            self.close()
            raise

    def fds(self) -> dict[int, str]:
        """What it has open: number and what it is."""
        directory = Path(f"/proc/{self.pid}/fd")
        return {int(entry.name): os.readlink(entry) for entry in directory.iterdir()}
