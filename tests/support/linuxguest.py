# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest under TCG, which carries out the tests' shell commands: ``make linux-guest`` brings it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.checkout import ROOT
from tests.support.qemu import PATIENCE, QEMU, Qemu, make

__all__ = [
    "CommandFailed",
    "KernelPanic",
    "LinuxGuest",
    "QemuEnded",
    "build",
    "busybox",
    "check_ext4",
    "read_ext4",
]

_FOLDER = ROOT / "build" / "linux-guest"
_PACKAGES = _FOLDER / "packages"
_INITRAMFS = _FOLDER / "initramfs"
_BOOT_SECONDS = 90.0
"""3 to 5 on an idle machine"""
_KERNEL_OPTIONS = "console=ttyS0 quiet oops=panic mitigations=off"
_SEPARATOR = b"\x1e"
"""what tests/linux/guest/init prints before a command's exit status"""
_LINE_MAX = 4000
"""characters; the guest's terminal takes no longer lines (N_TTY_BUF_SIZE, drivers/tty/n_tty.c)"""


class CommandFailed(AssertionError):
    """A command that ended with another status than 0."""


def build() -> bool:
    """Brings the initramfs up to date with its sources. Returns False where ``make linux-guest`` was not run."""
    if not _PACKAGES.exists():
        return False
    make(str(_INITRAMFS.relative_to(ROOT)))
    return True


class QemuEnded(AssertionError):
    """QEMU has ended; ``status`` is as subprocess.Popen has it."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(f"{text} (status {status})")
        self.status = status


class KernelPanic(AssertionError):
    """The guest's kernel has panicked, as it does at each oops."""


class LinuxGuest(Qemu):
    """A QEMU process whose guest has started and waits for commands."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        program: str = QEMU,
        machine: str = "q35",
        cpus: int = 1,
        channels: Sequence[str] = (),
        kernel_options: str = "",
    ) -> None:
        """``args`` follow on the command line. The guest has 256 MiB, which other processes can map."""
        (kernel,) = (_PACKAGES / "boot").glob("vmlinuz-*")
        super().__init__(
            [
                *("-machine", f"{machine},accel=tcg,memory-backend=ram", "-m", "256", "-smp", str(cpus)),
                *("-object", "memory-backend-memfd,id=ram,size=256M,share=on"),
                *("-nodefaults", "-display", "none", "-serial", "chardev:console"),
                *(
                    "-kernel",
                    str(kernel),
                    "-initrd",
                    str(_INITRAMFS),
                    "-append",
                    f"{_KERNEL_OPTIONS} {kernel_options}",
                ),
                *args,
            ],
            pass_fds,
            channels=("console", *channels),
            program=program,
        )
        self._received = b""
        with self._starting():
            self.wait_ready()

    def wait_ready(self) -> None:
        """Waits until the guest has started; also after a reset."""
        self._answer("a start", _BOOT_SECONDS, b"ready")

    def run(self, command: str, timeout: float = PATIENCE) -> str:
        """Carries out a shell command. Returns what it printed on stdout and stderr, without the last newline.

        Raises CommandFailed for an exit status that isn't 0, AssertionError when the command doesn't end within
        ``timeout`` seconds, and KernelPanic.
        """
        line = command.encode() + b"\n"
        assert line.count(b"\n") == 1, command
        assert len(line) < _LINE_MAX, command
        self.channels["console"].sendall(line)
        printed, status = self._answer(command, timeout)
        if status != "0":
            raise CommandFailed(f"{command}: status {status}: {printed}")
        return printed

    def _answer(self, command: str, timeout: float, end: bytes = b"") -> tuple[str, str]:
        """What was printed up to the next status, or to that of this name, and the status."""
        deadline = time.monotonic() + timeout
        while True:
            printed, separator, rest = self._received.partition(_SEPARATOR + end)
            status, newline, left = rest.partition(b"\n")
            if separator and newline:
                self._received = left
                return printed.decode(errors="replace").removesuffix("\n"), status.decode()
            self._receive(command, deadline)

    def _receive(self, command: str, deadline: float) -> None:
        console = self.channels["console"]
        console.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            received = console.recv(65536)
        except TimeoutError:
            raise AssertionError(f"{command}: no end in time; so far: {self._text()}") from None
        if not received:
            raise QemuEnded(f"{command}: QEMU has ended; last: {self._text()}", self.process.wait())
        self._received += received
        if b"Kernel panic" in self._received:
            raise KernelPanic(f"{command}: {self._text()}")

    def _text(self) -> str:
        return self._received[-2000:].decode(errors="replace")


def check_ext4(image: Path) -> None:
    """Checks a filesystem in an image. Raises CalledProcessError for any fault in it."""
    _run_packaged("sbin/e2fsck", "-f", "-n", image)


def read_ext4(image: Path, path: str) -> bytes:
    """The contents of a file in a filesystem in an image."""
    return _run_packaged("sbin/debugfs", "-R", f"cat {path}", image)


def busybox() -> bytes:
    """The guest's /bin/busybox."""
    return _packaged("bin/busybox").read_bytes()


def _run_packaged(program: str, *arguments: str | Path) -> bytes:
    """Runs a program of the packages on the host, by its own loader. Returns what it printed on stdout."""
    libraries = [_PACKAGES / "lib" / "x86_64-linux-gnu", _PACKAGES / "usr" / "lib" / "x86_64-linux-gnu"]
    loader = [str(_packaged("lib64/ld-linux-x86-64.so.2")), "--library-path", ":".join(map(str, libraries))]
    return subprocess.run([*loader, _packaged(program), *arguments], check=True, capture_output=True).stdout


def _packaged(path: str) -> Path:
    """A file of the packages: below / or below /usr, as Debian's release has it."""
    return next(each for each in (_PACKAGES / path, _PACKAGES / "usr" / path) if each.exists())
