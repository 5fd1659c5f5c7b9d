# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether QEMU has room for the configured functions, under their ids and at their addresses."""

from __future__ import annotations

from collections.abc import Iterable

from common.errors import UsageError
from common.pci import format_devfn
from proxyd.vm.qmp.function import Function
from proxyd.vm.qmp.qemu import DRIVERS, Inventory

__all__ = ["check_ids", "check_place"]


def check_ids(names: Iterable[str]) -> None:
    """Raises UsageError for an id that can't be one in QEMU (id_wellformed() in QEMU's util/id.c)."""
    for name in names:
        if not name[0].isalpha():
            raise UsageError(f"device {name}: an id in QEMU begins with a letter")


def check_place(function: Function, inventory: Inventory, functions: Iterable[Function]) -> None:
    """Raises UsageError when the function's id or address is another's in QEMU; ``functions`` are all of ours."""
    name, address = function.name, format_devfn(function.devfn)
    driver = inventory.drivers.get(name)
    if driver is None and not inventory.is_flat:
        return  # the port that is free will be taken
    if driver is None:
        occupant = inventory.occupants.get(function.devfn)
        if occupant is not None:
            taken = {devfn >> 3 for devfn in (*inventory.occupants, *(each.devfn for each in functions))}
            free = [format_devfn(slot << 3) for slot in range(32) if slot not in taken]
            hint = f", such as {free[0]}" if free else ""
            raise UsageError(f"device {name}: {address} is taken by {occupant}: choose another addr={hint}")
    elif driver != function.driver:
        remedy = "device_del it first" if driver in DRIVERS.values() else "choose another id="
        raise UsageError(f"device {name}: it has a {driver} of that id: {remedy}")
    elif inventory.is_flat and inventory.devfns.get(name) != function.devfn:
        raise UsageError(
            f"device {name}: it is plugged already, elsewhere than at {address}: device_del it first"
        )
