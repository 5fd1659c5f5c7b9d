# SPDX-License-Identifier: GPL-2.0-or-later
"""All slots of the configuration, which may change while a QEMU is attached.

Functions come and go by whole slots, as PCI hot-plug has it: if one function of a slot differs, all of the slot is
unplugged, with the guest's consent, and plugged anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence

from common.config import DeviceConfig
from common.errors import UsageError
from common.messages import Event
from common.peer import PeerCredentials
from proxyd.vm.qmp.function import Function
from proxyd.vm.qmp.monitor import Monitor
from proxyd.vm.qmp.places import check_ids, check_place
from proxyd.vm.qmp.qemu import Inventory, take_inventory
from proxyd.vm.qmp.slot import Slot, Turn
from proxyd.vm.qmp.stepper import cancel

__all__ = ["Slots"]


class Slots:
    """The slots and their functions; those that are being unplugged for good among them."""

    def __init__(
        self,
        devices: Sequence[DeviceConfig],
        make: Callable[[DeviceConfig], Function],
        on_settled: Callable[[], None],
    ) -> None:
        """``make()`` makes a device's function. ``on_settled()`` is called when all was tried once in a QEMU.

        Raises UsageError for an id that QEMU wouldn't take.
        """
        check_ids(device.id for device in devices)
        self.functions: list[Function] = []
        """of all slots; the list itself stays the same"""
        self._make = make
        self._on_settled = on_settled
        self._wanted = _by_slot(devices)
        self._slots: dict[int, Slot] = {}
        self._changed = asyncio.Event()
        self._add_missing()

    def __iter__(self) -> Iterator[Slot]:
        return iter(list(self._slots.values()))

    def change(self, devices: Sequence[DeviceConfig]) -> None:
        """Makes the devices those that are plugged: at once, or as the guest consents to the others' ejection.

        Raises UsageError as __init__() does.
        """
        check_ids(device.id for device in devices)
        self._wanted = _by_slot(devices)
        self._changed.set()

    def settle_detached(self) -> None:
        """Does what change() has asked for where no QEMU has any of the functions."""
        self._changed.clear()
        for number in self._unwanted():
            self._drop(number)
        self._add_missing()

    async def serve(
        self,
        monitor: Monitor,
        inventory: Inventory,
        servers: Mapping[str, PeerCredentials | None],
        turn: Turn,
    ) -> None:
        """Lets each slot run, until it is cancelled. Raises what Slot.run() raises.

        ``inventory`` and ``servers`` are as of the start.
        """
        tasks = {
            number: asyncio.create_task(slot.run(monitor, inventory, servers, turn))
            for number, slot in self._slots.items()
        }
        leaving: set[int] = set()
        if self._unwanted():  # the monitor was lost meanwhile
            self._changed.set()
        changed = asyncio.create_task(self._changed.wait())
        announcing = asyncio.create_task(self._announce())
        try:
            while True:
                done, _ = await asyncio.wait({changed, *tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
                for number in [number for number, task in tasks.items() if task in done]:
                    tasks.pop(number).result()
                    leaving.discard(number)
                    self._drop(number)
                if changed in done:
                    self._changed.clear()
                    changed = asyncio.create_task(self._changed.wait())
                    for number in self._unwanted():
                        if number not in leaving:
                            async with turn:  # nothing of it is half done then
                                await cancel(tasks[number])
                            leaving.add(number)
                            tasks[number] = asyncio.create_task(self._slots[number].leave(monitor))
                for number in self._add_missing():
                    slot = self._slots[number]
                    if await self._has_place(slot, monitor):
                        tasks[number] = asyncio.create_task(slot.run(monitor, inventory, {}, turn))
        finally:
            await cancel(announcing, changed, *tasks.values())

    async def _has_place(self, slot: Slot, monitor: Monitor) -> bool:
        inventory = await take_inventory(monitor)
        for function in slot.functions:
            try:
                check_place(function, inventory, self.functions)
            except UsageError as error:
                reason = str(error).removeprefix(f"device {function.name}: ")
                function.warn(f"not plugged: {reason}", Event.NOT_PLUGGED)
                slot.settled.set()
                return False
        return True

    async def _announce(self) -> None:
        for slot in self:
            await slot.settled.wait()
        self._on_settled()

    def _unwanted(self) -> list[int]:
        """The numbers of slots that aren't just as they should be."""
        return [number for number, slot in self._slots.items() if self._wanted.get(number) != slot.devices]

    def _drop(self, number: int) -> None:
        slot = self._slots.pop(number)
        for function in slot.functions:
            function.release()
            self.functions.remove(function)

    def _add_missing(self) -> list[int]:
        """Makes the slots that are wanted and not there. Returns their numbers."""
        taken = {function.name for function in self.functions}
        numbers = [
            number
            for number, devices in sorted(self._wanted.items())
            if number not in self._slots and not any(device.id in taken for device in devices)
        ]
        for number in numbers:
            functions = [self._make(device) for device in self._wanted[number]]
            self._slots[number] = Slot(functions)
            self.functions += functions
        return numbers


def _by_slot(devices: Sequence[DeviceConfig]) -> dict[int, list[DeviceConfig]]:
    slots: dict[int, list[DeviceConfig]] = {}
    for device in sorted(devices, key=lambda device: device.devfn):
        slots.setdefault(device.devfn >> 3, []).append(device)
    return slots
