# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps the configured functions of one slot plugged in a running QEMU.

All functions of a slot are plugged and unplugged together: ACPI ejects whole slots, and a guest scans the other
functions when function 0 arrives (QEMU refuses any that is added later). So function 0 is plugged last, and to
replace one function is to replace all of its slot.

A device_del takes effect when the guest ejects the slot, which may be after this daemon has ended. So each request
is noted in QEMU (proxyd.vm.qmp.qemu.note_request()), for the daemon's successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence

from common.backoff import Backoff
from common.config import DeviceConfig
from common.errors import PeerGone, ProtocolError
from common.messages import Event
from common.pci import format_devfn
from common.peer import PeerCredentials
from proxyd.vm.qmp.deviceadd import NotReached, add_by_fd, add_by_path
from proxyd.vm.qmp.function import Function
from proxyd.vm.qmp.handover import Handover, connect, examine
from proxyd.vm.qmp.monitor import CommandError, Monitor
from proxyd.vm.qmp.ports import NoPort, Place, choose_place, find_place
from proxyd.vm.qmp.qemu import (
    VFIO_USER_DRIVER,
    Inventory,
    drop_note,
    note_request,
    shows_msix,
    take_inventory,
)

__all__ = ["CONSENT_SECONDS", "Slot", "Turn"]

CONSENT_SECONDS = 5.0
"""a guest that takes longer to eject a device is reported; QEMU then takes another device_del, too"""
_LAST_CONSENT_SECONDS = 60.0
_EXAMINATION_SECONDS = 5.0
"""how long a device's answers may take altogether; QEMU would stand still for as long"""
_LAST_RETRY_SECONDS = 1.0
_LAST_REPLACEMENT_SECONDS = 5.0
"""the same for what loses its link within a second each time: every replacement is a hot-plug for the guest"""
_LASTING_SECONDS = 1.0


class Turn:
    """Lets one slot at a time do what takes more than one command: an asynchronous context manager."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._is_over = False

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        if self._is_over:
            self._lock.release()
            await asyncio.Event().wait()

    async def __aexit__(self, *_exception: object) -> None:
        self._lock.release()

    async def end(self) -> None:
        """Waits until it is released, and grants it no more: later callers wait until they are cancelled."""
        self._is_over = True
        async with self._lock:
            pass


class Slot:
    """The functions of one slot, to be kept plugged."""

    def __init__(self, functions: Sequence[Function]) -> None:
        self.functions = sorted(functions, key=lambda function: -function.devfn)
        """function 0 last"""
        self.settled = asyncio.Event()
        """whether everything was tried once"""
        self._changed = asyncio.Event()
        self._backoff = Backoff()
        self._is_flat = True
        """whether the present QEMU's root bus takes the functions"""
        for function in self.functions:
            function.on_change = self._changed.set

    @property
    def devices(self) -> list[DeviceConfig]:
        """What its functions are configured as, by address."""
        return [function.config for function in reversed(self.functions)]

    @property
    def plugged(self) -> list[Function]:
        """Those that QEMU has a proxy of."""
        return [function for function in self.functions if function.is_plugged]

    @property
    def is_stuck(self) -> bool:
        """Whether QEMU would abort if it were unplugged: all functions of a slot go together."""
        return any(function.is_stuck for function in self.plugged)

    async def run(
        self,
        monitor: Monitor,
        inventory: Inventory,
        servers: Mapping[str, PeerCredentials | None],
        turn: Turn,
    ) -> None:
        """Plugs what is missing, adopts what is there, replaces what has lost its link, until it is cancelled.

        ``servers`` are the processes that serve a client at the device's socket, by the ids of the functions
        that are plugged; None where nobody is served. What loses its link as soon as it is plugged is replaced
        less and less often. It is best cancelled after the end of ``turn``: nothing is half done then. Raises
        PeerGone and ProtocolError when the monitor is out of order; close() comes after it, however it ends.
        """
        self._is_flat = inventory.is_flat
        async with turn:
            await self._reconcile(monitor, inventory, servers)
        loop = asyncio.get_running_loop()
        since = -math.inf
        while not any(function.is_out for function in self.functions):
            await asyncio.gather(*(function.follow() for function in self.plugged))
            if any(not function.is_sound for function in self.plugged) or self._is_open():
                self.settled.set()
                lasted = loop.time() - since
                await self._remove(monitor)
                if lasted < _LASTING_SECONDS:
                    await self._pause(_LAST_REPLACEMENT_SECONDS)
                else:
                    self._backoff.reset()
            if not await self._plug(monitor, turn):
                break
            since = loop.time()
            self.settled.set()
            await self._until(lambda: not all(function.is_sound for function in self.functions))
        self.settled.set()
        await asyncio.Event().wait()

    async def leave(self, monitor: Monitor) -> None:
        """Unplugs the slot for good, however long the guest takes. Raises PeerGone and ProtocolError."""
        line = f"the guest hasn't ejected it in {CONSENT_SECONDS:g} s: it stays until the guest does"
        await self._eject(monitor, lambda function: function.warn(line, Event.NOT_EJECTED))

    async def unplug(self, monitor: Monitor, seconds: float) -> list[Function]:
        """Asks the guest to eject the slot. Returns the functions that it still has after so many seconds.

        A slot that is_stuck is left alone.
        """
        if self.is_stuck:
            for function in self.plugged:
                function.warn_stuck()
            return self.plugged
        await self._request_unplug(monitor)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._until(lambda: not self.plugged)
        for function in self.functions:
            if not function.is_plugged:
                await self._drop_note(monitor, function)
        return self.plugged

    def on_deleted(self, function: Function) -> None:
        """QEMU has unplugged one of the functions."""
        function.is_gone = True
        if function.is_plugged:
            function.unplugged()
            self._changed.set()

    def close(self) -> None:
        """Ends run()'s work: the monitor is lost. A later run() with the same QEMU knows what was before."""
        self.settled.clear()
        for function in self.functions:
            function.detach()

    def forget(self) -> None:
        """The next run() is with another QEMU."""
        for function in self.functions:
            function.forget()

    async def _reconcile(
        self, monitor: Monitor, inventory: Inventory, servers: Mapping[str, PeerCredentials | None]
    ) -> None:
        """Takes over what is plugged already, and takes back what an unfinished plugging has left in QEMU."""
        for function in self.functions:
            function.is_noted = function.name in inventory.asked
            function.is_asked |= function.is_noted
            if function.name not in inventory.drivers or function.is_gone:
                if function.is_out or (function.was_plugged and not function.is_asked):
                    function.leave_out()
                else:
                    function.reason = "not plugged yet"
                await self._drop_note(monitor, function)
                with contextlib.suppress(CommandError):
                    await monitor.execute("closefd", fdname=function.fdname)
                continue
            function.is_out = False
            await self._look_for_msix(monitor, function)
            server = None if function.is_broken else servers.get(function.name)
            if server is None:
                function.is_plugged = True
                function.warn_unlinked(f"found plugged without a link to {function.path}")
            else:
                function.log.info(
                    "found plugged at %s, served by %s",
                    format_devfn(function.devfn),
                    server,
                    event=Event.ADOPTED,
                )
                function.adopt(server)

    def _is_open(self) -> bool:
        """Whether function 0 is plugged before others: these would be refused."""
        return self.functions[-1].is_plugged and len(self.plugged) < len(self.functions)

    async def _plug(self, monitor: Monitor, turn: Turn) -> bool:
        """Plugs all functions that aren't; False if QEMU refuses one. Waits for their devices."""
        missing = [function for function in self.functions if not function.is_plugged]
        while True:
            await self._connect(missing)
            async with turn:
                try:
                    for function in missing:
                        if not function.is_plugged and function.is_ready:
                            await self._add(monitor, function)
                    return True
                except NotReached as error:
                    self._tell_waiting(function, error)
                except (CommandError, NoPort) as error:
                    function.warn(f"QEMU refuses to plug it: {error}", Event.NOT_PLUGGED)
                    return False
                except (PeerGone, asyncio.CancelledError):
                    function.break_link()
                    raise
                finally:
                    for other in missing:
                        if not other.is_plugged:
                            other.release()
            await self._pause(_LAST_REPLACEMENT_SECONDS)

    async def _connect(self, functions: Sequence[Function]) -> None:
        """Gets a link for each, or whoever will serve QEMU's, however long that takes."""
        while True:
            for function in functions:
                if function.is_ready or function.is_plugged:
                    continue
                try:
                    if function.find_server is None:
                        function.handover = await _open(function.path)
                    else:
                        function.server = await function.find_server()
                except (PeerGone, ProtocolError) as error:
                    self._tell_waiting(function, error)
                    break
            else:
                return
            await self._pause(_LAST_RETRY_SECONDS)

    def _tell_waiting(self, function: Function, error: Exception) -> None:
        reason = f"not plugged yet: {error}"
        if reason != function.reason:
            function.warn(reason, Event.NOT_PLUGGED)
        self.settled.set()

    async def _pause(self, most: float) -> None:
        """Waits before the next attempt, longer each time."""
        await asyncio.sleep(self._backoff.next(most))

    async def _add(self, monitor: Monitor, function: Function) -> None:
        """Raises NotReached if QEMU doesn't reach the device, CommandError if it refuses it, NoPort."""
        await self._drop_note(monitor, function)
        sibling = next((other.name for other in self.plugged), None)
        place = await choose_place(monitor, function.devfn, sibling, is_flat=self._is_flat)
        arguments = {
            "driver": function.driver,
            "id": function.name,
            "bus": place.bus,
            "addr": place.addr,
            "multifunction": len(self.functions) > 1,
        }
        if function.handover is None:
            await add_by_path(monitor, arguments, os.path.abspath(function.path))
        else:
            await add_by_fd(monitor, arguments, function.fdname, function.handover.client.fileno())
        if not await self._is_at(monitor, function, place):
            raise CommandError(f"QEMU took device_add, but has no function at {place}", "")
        handover = function.handover
        await self._look_for_msix(monitor, function)
        function.plugged()
        if handover is None:
            function.log.info("plugged at %s, served by %s", place, function.remote, event=Event.PLUGGED)
            return
        ids = handover.vendor, handover.device
        function.log.info("plugged at %s: %04x:%04x", place, *ids, event=Event.PLUGGED)
        for remark in handover.remarks:
            function.log.info("behind QEMU's proxy %s", remark)
        for defect in handover.defects:
            function.log.warning("%s", defect, event=Event.PROXY_DEFECT)

    async def _look_for_msix(self, monitor: Monitor, function: Function) -> None:
        if function.driver == VFIO_USER_DRIVER:
            function.is_stuck = False
            with contextlib.suppress(CommandError):  # it is gone already
                function.is_stuck = await shows_msix(monitor, function.name)

    async def _is_at(self, monitor: Monitor, function: Function, place: Place) -> bool:
        if self._is_flat:
            return (await take_inventory(monitor)).devfns.get(function.name) == place.devfn
        return await find_place(monitor, function.name) == place

    async def _remove(self, monitor: Monitor) -> None:
        """Unplugs all of the slot, which is to be plugged again, however long the guest takes."""
        await self._eject(monitor, lambda function: function.warn_not_ejected(CONSENT_SECONDS))
        for function in self.functions:
            function.reconnects += 1

    async def _eject(self, monitor: Monitor, warn: Callable[[Function], None]) -> None:
        """Asks the guest to eject the slot, less and less often, until it has; warns once of what it still has."""
        seconds = CONSENT_SECONDS
        while waiting := await self.unplug(monitor, seconds):
            if self.is_stuck:
                await self._until(lambda: not self.plugged)
            elif seconds == CONSENT_SECONDS:
                for function in waiting:
                    warn(function)
            seconds = min(2 * seconds, _LAST_CONSENT_SECONDS)

    async def _request_unplug(self, monitor: Monitor) -> None:
        asked = self.plugged
        for function in asked:
            function.is_asked = True  # of all, before the first: they go together
            if not function.is_noted:
                function.is_noted = await note_request(monitor, function.name)
        for function in asked:
            try:
                await monitor.execute("device_del", id=function.name)
            except CommandError as error:
                if error.error_class == "DeviceNotFound":
                    self.on_deleted(function)
                else:  # among others: the guest has been asked already
                    function.log.info("device_del: %s", error, event=Event.EJECT_REQUEST_REFUSED)

    async def _drop_note(self, monitor: Monitor, function: Function) -> None:
        if function.is_noted:
            function.is_noted = False
            await drop_note(monitor, function.name)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()


async def _open(path: str) -> Handover:
    """A link whose other end was looked at. Raises PeerGone and ProtocolError."""
    client = connect(path)
    examining = asyncio.ensure_future(asyncio.to_thread(examine, client))

    def close(examined: asyncio.Future[Handover]) -> None:
        client.close()
        if not examined.cancelled():
            examined.exception()  # asyncio would log an exception that was never retrieved

    try:
        await asyncio.wait({examining}, timeout=_EXAMINATION_SECONDS)
        if not examining.done():
            raise PeerGone(f"its answers take more than {_EXAMINATION_SECONDS:g} s")
        return examining.result()
    except BaseException:
        client.shutdown()  # which ends the thread
        examining.add_done_callback(close)
        raise
