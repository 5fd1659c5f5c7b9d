# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface for device authors: everything that a device imports from iohub.

Nothing else in ``common`` and ``remoted`` is meant for them, and any of it may change.
"""

from __future__ import annotations

from common.errors import UsageError
from common.fields import buffer, register, set_to_reset_values
from common.journal import RateLimited
from common.loop import EventLoop, Timer
from common.pci import Bar, BarKind
from remoted.capabilities import (
    Capability,
    DeviceSerialNumber,
    ExtendedVendorSpecific,
    PciExpress,
    PowerManagement,
    VendorSpecific,
)
from remoted.function import PciFunction
from remoted.host import Host, PeriodicTimer
from remoted.memory import DmaError, GuestMemory
from remoted.msi import Msi, Msix
from remoted.options import Option

__all__ = [
    "Bar",
    "BarKind",
    "Capability",
    "DeviceSerialNumber",
    "DmaError",
    "EventLoop",
    "ExtendedVendorSpecific",
    "GuestMemory",
    "Host",
    "Msi",
    "Msix",
    "Option",
    "PciExpress",
    "PciFunction",
    "PeriodicTimer",
    "PowerManagement",
    "RateLimited",
    "Timer",
    "UsageError",
    "VendorSpecific",
    "buffer",
    "register",
    "set_to_reset_values",
]
