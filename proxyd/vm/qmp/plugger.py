# SPDX-License-Identifier: GPL-2.0-or-later
"""``--vm qmp:SOCKET``: devices for a stock QEMU, plugged while it runs.

QEMU's own x-pci-proxy-dev stands for each device in the guest; it gets the connected link as an fd through the
monitor and speaks to the device directly from then on. This daemon finds QEMU, sees to it that the proxies can
work there, plugs them, and watches over them.

One thread, two loops: asyncio's, which the QMP library needs, is the one that waits; the daemon's own, which
serves the control socket and watches the links, is stepped from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

from common.config import VmConfig
from common.control import ControlServer
from common.errors import IohubError, PeerGone, ProtocolError, UsageError
from common.journal import RateLimited, device_log, printable
from common.loop import Loop
from common.pci import format_devfn
from common.service import notify
from proxyd.control import ProxydService
from proxyd.vm.qmp import qemu
from proxyd.vm.qmp.monitor import Monitor, MonitorAbsent
from proxyd.vm.qmp.qemu import PROXY_DRIVER, Inventory
from proxyd.vm.qmp.slot import CONSENT_SECONDS, Function, Slot, Turn
from proxyd.vm.qmp.uevents import KvmEvents

__all__ = ["QemuPlugger"]

_LEAVE_SECONDS = 20.0
"""how long the end of the daemon may wait for QEMU: for a command under way, and for the guest's consent"""
_RETRY_SECONDS = 1.0
"""the pause before a monitor that has just failed is tried again"""


class QemuPlugger:
    """The daemon beside one stock QEMU at a time."""

    def __init__(self, program: str, config: VmConfig, loop: Loop) -> None:
        """Raises UsageError."""
        self._socket = config.vm.partition(":")[2]
        self._unplug_on_exit = config.unplug_on_exit
        self._log = log = logging.getLogger(program)
        self._event_log = RateLimited(log)
        self._loop = loop
        self._functions = {
            device.id: Function(
                device, config.socket_path(device), self._loop, device_log(log.name, device.id)
            )
            for device in config.devices
        }
        _check_ids(self._functions)
        self._stop = asyncio.Event()
        self._kvm_event = asyncio.Event()
        self._uevents = KvmEvents()
        self._loop.add(self._uevents.fileno(), self._on_uevent)
        self._interface = ProxydService(
            config.name, config.vm, "kvm", None, list(self._functions.values())
        )
        self._interface.reason = "looking for QEMU"
        path = str(config.runtime_dir / "proxyd.varlink")
        self._control = ControlServer(self._loop, path, self._interface, log)
        self._slots: list[Slot] = []
        self._is_running = True

    def run(self) -> int:
        """Serves until the loop is stopped. Raises UsageError for a QEMU that can't be served."""
        asyncio.run(self._main())
        return 0

    def close(self) -> None:
        """Closes everything; what is plugged stays so."""
        for function in self._functions.values():
            function.release()
        self._control.close()
        self._loop.remove(self._uevents.fileno())
        self._uevents.close()

    async def _main(self) -> None:
        functions = sorted(self._functions.values(), key=_slot_number)
        self._slots = [Slot(list(of_slot)) for _, of_slot in groupby(functions, _slot_number)]
        # asyncio's own has few threads: a device could wait for those that hang.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max(1, len(self._slots))))
        stepper = _Stepper(self._loop, self._stop)
        serving = asyncio.create_task(self._serve())
        stopped = asyncio.create_task(self._stop.wait())
        ends: set[asyncio.Future[Any]] = {serving, stepper.failed}
        try:
            await asyncio.wait({*ends, stopped}, return_when=asyncio.FIRST_COMPLETED)
            done, _ = await asyncio.wait(ends, timeout=_LEAVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                self._log.warning("not done with QEMU within %g s: what is plugged stays so", _LEAVE_SECONDS)
            for task in done:
                task.result()
        finally:
            stepper.close()
            await _cancel(serving, stopped)

    async def _serve(self) -> None:
        """One QEMU after the other, until told to stop."""
        while (monitor := await self._find()) is not None:
            try:
                await self._attend(monitor)
                self._interface.reason = f"detached from {monitor.name}"
                self._event_log.info("%s", self._interface.reason)
            except (PeerGone, ProtocolError) as error:
                self._interface.reason = f"lost {monitor.name}: {error}"
                self._event_log.warning("%s", self._interface.reason)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_SECONDS):
                        await self._stop.wait()
            finally:
                for slot in self._slots:
                    slot.close()
                await monitor.close()
            if self._stop.is_set():
                return

    async def _find(self) -> Monitor | None:
        """QEMU's monitor, however long that takes; None when told to stop meanwhile."""
        finding = asyncio.create_task(self._connect())
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({finding, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return finding.result() if finding.done() else None
        finally:
            await _cancel(finding, stopped)

    async def _connect(self) -> Monitor:
        while True:
            self._kvm_event.clear()
            try:
                return await Monitor.connect(self._socket, self._on_event, self._on_silence)
            except MonitorAbsent as error:
                self._tell_absence(f"no QEMU ({error}): waiting for one")
                await self._kvm_event.wait()
            except PeerGone as error:
                self._tell_absence(f"{error}: trying again")
                await asyncio.sleep(_RETRY_SECONDS)

    def _tell_absence(self, line: str) -> None:
        """Says once why there is no QEMU."""
        if line != self._interface.reason:
            self._interface.reason = line
            self._log.info("%s", line)
            notify("READY=1\nSTATUS=Waiting for QEMU")

    def _on_silence(self, line: str) -> None:
        self._interface.reason = line
        self._log.warning("%s", line)
        notify("READY=1\nSTATUS=Waiting for QEMU's monitor")

    async def _attend(self, monitor: Monitor) -> None:
        """Serves one QEMU until it goes, or until told to stop.

        Raises UsageError, and PeerGone and ProtocolError when the monitor is out of order.
        """
        inventory = await self._check(monitor)
        self._interface.attached, self._interface.reason = monitor.name, None
        self._log.info("attached to %s", monitor.name)
        ends = [asyncio.create_task(monitor.wait_closed()), asyncio.create_task(self._stop.wait())]
        turn = Turn()
        slots = [asyncio.create_task(slot.run(monitor, inventory, turn)) for slot in self._slots]
        announcing = asyncio.create_task(self._announce())
        try:
            done, _ = await asyncio.wait({*ends, *slots}, return_when=asyncio.FIRST_COMPLETED)
            await turn.end()
            for task in done:
                task.result()
        finally:
            self._interface.attached = None
            await _cancel(announcing, *ends, *slots)
        if self._stop.is_set() and self._unplug_on_exit:
            await self._unplug(monitor)

    async def _check(self, monitor: Monitor) -> Inventory:
        """What is plugged in QEMU. Raises UsageError when QEMU or what it has doesn't suit."""
        try:
            await qemu.check(monitor)
            inventory = await qemu.take_inventory(monitor)
            for function in self._functions.values():
                _check_place(function, inventory, self._functions.values())
        except UsageError as error:
            raise UsageError(printable(f"{monitor.name} at {self._socket}: {error}")) from error
        self._is_running = await qemu.is_running(monitor)
        return inventory

    async def _announce(self) -> None:
        for slot in self._slots:
            await slot.settled.wait()
        notify("READY=1\nSTATUS=Attached to QEMU")

    async def _unplug(self, monitor: Monitor) -> None:
        """Unplugs everything, as far as the guest consents in time."""
        leaving = [slot.unplug(monitor, CONSENT_SECONDS) for slot in self._slots]
        for remaining in await asyncio.gather(*leaving):
            for function in remaining:
                function.log.warning(
                    "%s in %g s: it stays plugged until the guest does, or is reset",
                    "the guest hasn't let it go"
                    if self._is_running
                    else "the guest is paused and can't let it go",
                    CONSENT_SECONDS,
                )

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "DEVICE_DELETED":
            for slot in self._slots:
                for function in slot.functions:
                    if function.name == data.get("device"):
                        slot.on_deleted(function)
        elif name in ("STOP", "RESUME"):
            self._is_running = name == "RESUME"
            self._event_log.info("the guest was %s", "resumed" if self._is_running else "paused")
        elif name in ("RESET", "SHUTDOWN"):
            verb = "reset" if name == "RESET" else "shut down"
            reason = data.get("reason")
            self._event_log.info(
                "the machine was %s (%s)", verb, reason if isinstance(reason, str) else "unknown reason"
            )

    def _on_uevent(self, _events: int) -> None:
        if any(event.kind != "destroy" for event in self._uevents.read()):
            self._kvm_event.set()


class _Stepper:
    """Steps the daemon's loop whenever asyncio's finds it ready; an exception in there ends up in ``failed``."""

    def __init__(self, loop: Loop, stopped: asyncio.Event) -> None:
        """Sets ``stopped`` when the loop is."""
        self._stopped = stopped
        self._asyncio = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = self._asyncio.create_future()
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._asyncio.add_reader(loop.fileno(), self._step)

    def close(self) -> None:
        """Steps it no more."""
        self._asyncio.remove_reader(self._loop.fileno())
        if self._timer is not None:
            self._timer.cancel()
        self.failed.cancel()

    def _step(self) -> None:
        try:
            self._loop.step(0)
        except BaseException as error:  # noqa: BLE001  asyncio would log it and go on
            self._asyncio.remove_reader(self._loop.fileno())
            if not self.failed.done():
                self.failed.set_exception(error)
            return
        if self._loop.is_stopped:
            self._stopped.set()
        if self._timer is not None:
            self._timer.cancel()
        seconds = self._loop.until_next_timer()
        self._timer = None if seconds is None else self._asyncio.call_later(seconds, self._step)


def _slot_number(function: Function) -> int:
    return function.devfn >> 3


def _check_ids(names: Iterable[str]) -> None:
    """Raises UsageError for an id that can't be one in QEMU (id_wellformed() in QEMU's util/id.c)."""
    for name in names:
        if not name[0].isalpha():
            raise UsageError(f"device {name}: an id in QEMU begins with a letter")


def _check_place(function: Function, inventory: Inventory, functions: Iterable[Function]) -> None:
    """Raises UsageError when the function's id or address is another's in QEMU; ``functions`` are all of ours."""
    name, address = function.name, format_devfn(function.devfn)
    driver = inventory.drivers.get(name)
    if driver is None:
        occupant = inventory.occupants.get(function.devfn)
        if occupant is not None:
            taken = {devfn >> 3 for devfn in (*inventory.occupants, *(each.devfn for each in functions))}
            free = [format_devfn(slot << 3) for slot in range(32) if slot not in taken]
            hint = f", such as {free[0]}" if free else ""
            raise UsageError(f"device {name}: {address} is taken by {occupant}: choose another addr={hint}")
    elif driver != PROXY_DRIVER:
        raise UsageError(f"device {name}: it has a {driver} of that id: choose another id=")
    elif inventory.devfns.get(name) != function.devfn:
        raise UsageError(
            f"device {name}: it is plugged already, elsewhere than at {address}: device_del it first"
        )


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Ends tasks. Raises what one of them has raised that isn't the peers' doing."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception) and not isinstance(result, IohubError):
            raise result
