# SPDX-License-Identifier: GPL-2.0-or-later
"""A stopped QEMU whose devices are driven by the qtest protocol (docs/devel/qtest.rst), with a QMP monitor.

Virtual time stands still while the machine is stopped. The guest CPU halts at its first instruction.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

QEMU = "qemu-system-x86_64"
TIMEOUT = 20.0

_HALT = bytes.fromhex("fa f4 eb fd".replace(" ", ""))  # cli; hlt; jmp to the hlt
_BIOS_SIZE = 1 << 16


class Qtest:
    """One QEMU process. ``irqs`` collects the level changes of the IOAPIC's inputs: (pin, level)."""

    def __init__(self, directory: Path, args: Sequence[str]) -> None:
        """Starts a ``pc`` machine without default devices; sockets and files go into the directory."""
        bios = directory / "bios"
        bios.write_bytes((bytes(_BIOS_SIZE - 16) + _HALT).ljust(_BIOS_SIZE, b"\0"))
        self.irqs: list[tuple[int, bool]] = []
        with _listen(directory / "qtest") as qtest, _listen(directory / "qmp") as qmp:
            self._process = subprocess.Popen(
                [
                    *(QEMU, "-S", "-nodefaults", "-display", "none", "-machine", "pc", "-accel", "tcg"),
                    *("-qtest", f"unix:{directory}/qtest", "-qtest-log", "/dev/null", "-bios", str(bios)),
                    *("-qmp", f"unix:{directory}/qmp", *args),
                ]
            )
            try:
                self._qtest = _accept(qtest)
                self._qmp = _accept(qmp)
                self._qtest_lines = self._qtest.makefile("r")
                self._qmp_lines = self._qmp.makefile("r")
                self._qmp_lines.readline()
                self.qmp("qmp_capabilities")
                self.command("irq_intercept_in ioapic")
            except BaseException:
                self._process.kill()
                self._process.wait()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for closable in (self._qtest_lines, self._qmp_lines, self._qtest, self._qmp):
            closable.close()

    def command(self, text: str) -> str:
        """Sends one line and returns what follows the OK."""
        self._qtest.sendall(text.encode() + b"\n")
        while True:
            line = self._read_line()
            if line is not None:
                status, _, rest = line.partition(" ")
                if status != "OK":
                    raise RuntimeError(f"{text}: {line}")
                return rest

    def inp(self, port: int, size: int) -> int:
        """A port read of 1, 2 or 4 bytes."""
        return int(self.command(f"in{_SUFFIX[size]} {port:#x}"), 16)

    def out(self, port: int, size: int, value: int) -> None:
        """A port write of 1, 2 or 4 bytes."""
        self.command(f"out{_SUFFIX[size]} {port:#x} {value:#x}")

    def run_until_irqs(self, pins: Collection[int]) -> None:
        """Lets virtual time pass until each of these IOAPIC inputs has gone high."""
        seen = len(self.irqs)
        self.qmp("cont")
        while not all((pin, True) in self.irqs[seen:] for pin in pins):
            self._read_line()
        self.qmp("stop")

    def qmp(self, command: str) -> Any:
        """Executes one QMP command and returns its result."""
        message = {"execute": command}
        self._qmp.sendall(json.dumps(message).encode())
        while True:
            answer = json.loads(self._qmp_lines.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")

    def _read_line(self) -> str | None:
        """The next line of an answer, or None after a report of an interrupt."""
        words = self._qtest_lines.readline().split()
        if words[0] == "IRQ":
            self.irqs.append((int(words[2]), words[1] == "raise"))
            return None
        return " ".join(words)


_SUFFIX = {1: "b", 2: "w", 4: "l"}


def _listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    sock.settimeout(TIMEOUT)
    return sock


def _accept(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.settimeout(TIMEOUT)
    return sock
