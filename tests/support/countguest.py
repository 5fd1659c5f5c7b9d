# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock QEMU on KVM with guests/irqcount.S: it tells of every interrupt that it serves, and of its PICs."""

from __future__ import annotations

import functools
import json
import os
import re
import select
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ROOT = Path(__file__).parents[2]
PATIENCE = 60.0


@functools.cache
def guest_image() -> Path:
    """The guest's image, built from its source as it is now."""
    image = "tests/guests/irqcount.bin"
    subprocess.run(["make", "--silent", "--no-print-directory", image], cwd=_ROOT, check=True)
    return _ROOT / image


class CountGuest:
    """One QEMU process, its guest ready to be interrupted."""

    def __init__(self, machine: str = "", args: Sequence[str] = (), wrapper: Sequence[str] = ()) -> None:
        """``machine`` follows on -machine, with its comma; ``wrapper`` is a command that executes QEMU."""
        self._letters, letters = socket.socketpair()
        self._qmp, qmp = socket.socketpair()
        with letters, qmp:
            self.process = subprocess.Popen(
                [
                    *(*wrapper, "qemu-system-x86_64", "-machine", f"pc,accel=kvm{machine}", "-m", "64"),
                    *("-nodefaults", "-display", "none", "-kernel", str(guest_image())),
                    *("-chardev", f"socket,id=letters,fd={letters.fileno()}"),
                    *("-device", "isa-debugcon,iobase=0xe9,chardev=letters"),
                    *("-chardev", f"socket,id=qmp,fd={qmp.fileno()}", "-mon", "chardev=qmp,mode=control"),
                    *args,
                ],
                pass_fds=[letters.fileno(), qmp.fileno()],
                stderr=subprocess.DEVNULL,
            )
        self.pid = self.process.pid
        self._qmp_lines = self._qmp.makefile("r")
        try:
            self._letters.settimeout(PATIENCE)
            self._qmp.settimeout(PATIENCE)
            self._qmp_lines.readline()
            self.qmp("qmp_capabilities")
            if self._letters.recv(1) != b"R":
                raise RuntimeError("the guest didn't get ready")
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
        """Kills QEMU."""
        self.process.kill()
        self.process.wait()
        self._qmp_lines.close()
        self._qmp.close()
        self._letters.close()

    def served(self) -> int:
        """The IRQ of the next interrupt that the guest serves."""
        return self._letters.recv(1)[0] - ord("a")

    def served_nothing(self) -> bool:
        """Whether no interrupt has been served that wasn't asked for by served()."""
        return not select.select([self._letters], [], [], 0)[0]

    def qmp(self, command: str, **arguments: object) -> Any:
        """The result of a QMP command."""
        request = {"execute": command, "arguments": arguments}
        self._qmp.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = json.loads(self._qmp_lines.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def requested(self) -> int:
        """The PICs' interrupt request registers, bit n for IRQ n: a level-triggered line that is high."""
        text = self.qmp("human-monitor-command", **{"command-line": "info pic"})
        irr = {int(pic): int(value, 16) for pic, value in re.findall(r"pic(\d): irr=([0-9a-f]+)", text)}
        return irr[0] | irr[1] << 8

    def fds(self) -> dict[int, str]:
        """What QEMU has open: number and what it is."""
        directory = Path(f"/proc/{self.pid}/fd")
        return {int(entry.name): os.readlink(entry) for entry in directory.iterdir()}
