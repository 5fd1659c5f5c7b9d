# SPDX-License-Identifier: GPL-2.0-or-later
"""--vm soft: the machine of --vm embedded without KVM, its guest a script."""

from __future__ import annotations

import logging

from common.config import VmConfig
from common.loop import Loop
from common.rate import Rate
from common.service import notify
from proxyd.machine.board import Board, check_addresses
from proxyd.vm.soft.machine import TSC_KHZ, SoftMachine
from proxyd.vm.soft.scriptedguest import ScriptedGuest
from proxyd.vm.soft.softirqchip import SoftIrqchip

__all__ = ["Soft"]


class Soft:
    """The daemon with a scripted guest."""

    def __init__(self, program: str, config: VmConfig, loop: Loop) -> None:
        """Raises UsageError."""
        check_addresses(config.devices)
        self._log = logging.getLogger(program)
        self._irqchip = SoftIrqchip(loop)
        self._board = Board(program, config, loop, self._irqchip)
        machine = SoftMachine(loop, self._irqchip.pic, self._board.host, self._board.console)
        self._guest = ScriptedGuest(machine)
        self._rate = Rate(loop.time)

    def run(self) -> int:
        """Runs the guest until the loop is stopped. Returns the exit status."""
        self._log.info("running the scripted guest, without KVM; for another VM: --vm qmp:SOCKET or pid:PID")
        self._board.start("soft", TSC_KHZ)
        notify(f"READY=1\nSTATUS={self.describe()}")
        self._guest.run()
        return 0

    def describe(self) -> str:
        """The state in one line."""
        rate = self._rate.update(self._irqchip.pic.acknowledged)
        return f"{self._board.describe()}, {rate:.0f} interrupts/s"

    def close(self) -> None:
        """Takes the irqfds out of the irqchip and closes everything."""
        self._board.abort()
        self._board.close()
        self._irqchip.close()
