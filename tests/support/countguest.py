# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock QEMU on KVM with guests/irqcount.S: it tells of every interrupt that it serves, and of its PICs."""

from __future__ import annotations

import re
import select
from collections.abc import Sequence
from typing import Any

from tests.support.monitorclient import Monitor
from tests.support.qemu import GUESTS, PATIENCE, Qemu, boot, pc_machine


class CountGuest(Qemu):
    """One QEMU process, its guest ready to be interrupted."""

    def __init__(self, machine: str = "", args: Sequence[str] = ()) -> None:
        """``machine`` follows on -machine, with its comma."""
        super().__init__(
            [
                *pc_machine(machine),
                *boot(GUESTS / "irqcount.bin"),
                *("-device", "isa-debugcon,iobase=0xe9,chardev=letters", "-mon", "qmp,mode=control"),
                *args,
            ],
            channels=("letters", "qmp"),
        )
        with self._starting() as owned:
            self._letters = self.channels["letters"]
            self._letters.settimeout(PATIENCE)
            self._monitor = owned.enter_context(Monitor(self.channels["qmp"]))
            if self._letters.recv(1) != b"R":
                raise RuntimeError("the guest didn't get ready")

    def served(self) -> int:
        """The IRQ of the next interrupt that the guest serves."""
        return self._letters.recv(1)[0] - ord("a")

    def served_nothing(self) -> bool:
        """Whether no interrupt has been served that wasn't asked for by served()."""
        return not select.select([self._letters], [], [], 0)[0]

    def qmp(self, command: str, **arguments: object) -> Any:
        """The result of a QMP command."""
        return self._monitor.execute(command, **arguments)

    def requested(self) -> int:
        """The PICs' interrupt request registers, bit n for IRQ n: a level-triggered line that is high."""
        return requested(self._monitor)


def requested(monitor: Monitor) -> int:
    """The PICs' interrupt request registers, bit n for IRQ n: a level-triggered line that is high."""
    text = monitor.execute("human-monitor-command", **{"command-line": "info pic"})
    irr = {int(pic): int(value, 16) for pic, value in re.findall(r"pic(\d): irr=([0-9a-f]+)", text)}
    return irr[0] | irr[1] << 8
