# SPDX-License-Identifier: GPL-2.0-or-later
"""A stopped QEMU whose devices are driven by the qtest protocol (docs/devel/qtest.rst), with a QMP monitor.

Virtual time stands still while the machine is stopped. The guest CPU halts at its first instruction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from tests.support.monitorclient import Monitor
from tests.support.qemu import FIRMWARE_SIZE, PATIENCE, Qemu

_HALT = bytes.fromhex("fa f4 eb fd")  # cli; hlt; jmp to the hlt


class Qtest(Qemu):
    """One QEMU process. ``irqs`` collects the level changes of the IOAPIC's inputs: (pin, level)."""

    def __init__(self, directory: Path, args: Sequence[str]) -> None:
        """Starts a ``pc`` machine without default devices; its firmware goes into the directory."""
        bios = directory / "bios"
        bios.write_bytes((bytes(FIRMWARE_SIZE - 16) + _HALT).ljust(FIRMWARE_SIZE, b"\0"))
        self.irqs: list[tuple[int, bool]] = []
        super().__init__(
            [
                *("-S", "-nodefaults", "-display", "none", "-machine", "pc", "-accel", "tcg"),
                *("-qtest", "chardev:qtest", "-qtest-log", "/dev/null", "-bios", str(bios)),
                *("-mon", "qmp,mode=control", *args),
            ],
            channels=("qtest", "qmp"),
        )
        with self._starting() as owned:
            self._qtest = self.channels["qtest"]
            self._qtest.settimeout(PATIENCE)
            self._qtest_lines = owned.enter_context(self._qtest.makefile("r"))
            self.monitor = owned.enter_context(Monitor(self.channels["qmp"]))
            self.command("irq_intercept_in ioapic")

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
        self.monitor.execute("cont")
        while not all((pin, True) in self.irqs[seen:] for pin in pins):
            self._read_line()
        self.monitor.execute("stop")

    def _read_line(self) -> str | None:
        """The next line of an answer, or None after a report of an interrupt."""
        words = self._qtest_lines.readline().split()
        if words[0] == "IRQ":
            self.irqs.append((int(words[2]), words[1] == "raise"))
            return None
        return " ".join(words)


_SUFFIX = {1: "b", 2: "w", 4: "l"}
