# SPDX-License-Identifier: GPL-2.0-or-later
"""The PCI addresses of a VM's devices: those that are given, and free slots for all others."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import UsageError
from common.options import Keys
from common.pci import PCI_DEVFN_MAX, format_devfn, parse_devfn

__all__ = ["assign_addresses"]

_FIRST_FREE_DEVFN = 0x02 << 3
"""00 is the host bridge and 01 the ISA bridge on the boards that QEMU and proxyd make"""
_FUNCTIONS_OF_A_SLOT = 8


def assign_addresses(devices: Mapping[str, Keys]) -> dict[str, int]:
    """Each device's devfn: those that are given first, then free slots in the order of the devices.

    ``devices`` has the keys of each by its id. Raises UsageError for an address that is not valid or given twice,
    and when no slot is free.
    """
    owners: dict[int, str] = {}
    for device_id, keys in devices.items():
        if "addr" not in keys:
            continue
        where = f"{keys['addr'].where}: addr"
        try:
            devfn = parse_devfn(keys["addr"].text)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        if devfn in owners:
            raise UsageError(f"{where}: {format_devfn(devfn)} is taken by device {owners[devfn]!r}")
        owners[devfn] = device_id
    taken = {devfn // _FUNCTIONS_OF_A_SLOT for devfn in owners}
    free = (
        devfn
        for devfn in range(_FIRST_FREE_DEVFN, PCI_DEVFN_MAX, _FUNCTIONS_OF_A_SLOT)
        if devfn // _FUNCTIONS_OF_A_SLOT not in taken
    )
    for device_id, keys in devices.items():
        if "addr" not in keys:
            devfn = next(free, -1)
            if devfn < 0:
                raise UsageError(f"{keys['id'].where}: addr: needed, as no slot is free from 02.0 upward")
            owners[devfn] = device_id
    return {device_id: devfn for devfn, device_id in owners.items()}
