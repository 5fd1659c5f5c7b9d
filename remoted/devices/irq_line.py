# SPDX-License-Identifier: GPL-2.0-or-later
"""irq-line: a PCI function without registers whose INTx line is driven by hand, at the control socket."""

from __future__ import annotations

from remoted.device import PciFunction

__all__ = ["IrqLine"]


class IrqLine(PciFunction):
    """A function without registers: `iohubctl raise` and `iohubctl lower` drive its INTx line. A reset lowers it.

    The identity is one of the vendor number that QEMU's own made-up devices use (0x1234), class 0xff:
    no driver binds to it.
    """

    VENDOR_ID = 0x1234
    DEVICE_ID = 0x10BE
    IS_DRIVABLE = True
