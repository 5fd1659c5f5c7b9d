# SPDX-License-Identifier: GPL-2.0-or-later
"""The model that has a line and nothing else."""

from __future__ import annotations

import logging

from common.loop import Loop
from remoted.device import Host
from remoted.devices.irq_line import IrqLine
from remoted.iohub import IoHub
from remoted.memory import GuestMemory


def test_irq_line_has_no_bars_and_starts_low() -> None:
    loop = Loop()
    pirq = IoHub(loop).pirqs[40]
    function = IrqLine(Host("l", loop, logging.getLogger("l"), GuestMemory(), pirq.set_irq), {})
    function.full_reset()
    for offset in range(0x10, 0x28, 4):
        function.config_write(offset, 4, 0xFFFFFFFF)
        assert function.config_read(offset, 4) == 0
    assert function.config_read(0x3D, 1) == 1
    function.set_intx(True)
    assert pirq.level == 1
    function.full_reset()
    assert pirq.level == 0
    loop.close()
