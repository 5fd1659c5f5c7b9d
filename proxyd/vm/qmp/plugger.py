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
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common.backoff import FIRST_SECONDS, Backoff
from common.config import DeviceConfig, Transport, VmConfig
from common.errors import PeerGone, ProtocolError, UsageError
from common.journal import RateLimited, device_log, printable
from common.loop import Loop
from common.messages import Event
from common.pathwatch import PathWatch
from common.peer import PeerCredentials
from common.service import notify
from proxyd.controlserver import answer_calls
from proxyd.vm.procstat import is_stopped, process_start
from proxyd.vm.qmp import qemu
from proxyd.vm.qmp.function import Function
from proxyd.vm.qmp.health import Health
from proxyd.vm.qmp.monitor import Monitor, MonitorAbsent
from proxyd.vm.qmp.places import check_place
from proxyd.vm.qmp.qemu import Inventory
from proxyd.vm.qmp.servers import (
    find_servers,
    find_successor,
    find_unlinked,
    find_waiting,
    wait_for_remoted,
)
from proxyd.vm.qmp.slot import CONSENT_SECONDS, Turn
from proxyd.vm.qmp.slots import Slots
from proxyd.vm.qmp.stepper import Stepper, cancel
from proxyd.vm.qmp.uevents import KvmEvents
from proxyd.vmstate import VmState, describe

__all__ = ["QemuPlugger"]

_MAX_FUNCTIONS = 256
_LEAVE_SECONDS = 20.0
"""how long the end of the daemon may wait for QEMU: for a command under way, and for the guest's consent"""
_RETRY_SECONDS = 1.0
"""the pause before a monitor that has just ended, or failed, is tried again"""
_LOOK_SECONDS = 5.0
"""how often remoted is asked for the links that QEMU has made itself"""
_POLL_SECONDS = 2.0
"""how often a monitor is looked for where nobody listens"""


class QemuPlugger:
    """The daemon beside one stock QEMU at a time."""

    def __init__(self, program: str, config: VmConfig, loop: Loop, *, has_store: bool = False) -> None:
        """``has_store``: the service manager keeps remoted's links, as it has an fd store for this unit.

        Raises UsageError.
        """
        self._socket = config.vm.partition(":")[2]
        self._has_store = has_store
        self._unplug_on_exit = config.unplug_on_exit
        log = logging.getLogger(program)
        self._event_log = RateLimited(log)
        self._loop = loop
        self._program = program
        self._config = config
        self._slots = Slots(config.devices, self._make_function, self._announce)
        self._stop = asyncio.Event()
        self._appeared = asyncio.Event()
        self._uevents = KvmEvents()
        self._loop.add(self._uevents.fileno(), self._on_uevent)
        self._watch = PathWatch(loop, lambda _path: self._appeared.set())
        self._remoted = config.own_socket_path("remoted.varlink")
        self._state = VmState(config.name, config.vm, "kvm", None, self._slots.functions, self._remoted)
        self._state.reason = "looking for QEMU"
        self._health = Health()
        self._state.amiss.add(self._health.amiss)
        self._control = answer_calls(self._loop, config, self._state, log)
        self._qemu: tuple[int, int] | None = None
        """the process that was attached last, as far as it can be seen: a sandbox may hide it"""
        self._has_attached = False
        """whether a QEMU has been attached, which may have functions of ours"""

    def reload(self, config: VmConfig) -> None:
        """Plugs and unplugs devices until they are those of the configuration. Raises UsageError."""
        self._slots.change(config.devices)
        self._config = config
        if not self._has_attached:
            self._slots.settle_detached()

    def run(self) -> int:
        """Serves until the loop is stopped. Raises UsageError for a QEMU that can't be served."""
        asyncio.run(self._main())
        return 0

    def describe(self) -> str:
        """The state in one line."""
        if self._state.attached is None:
            return "Waiting for QEMU"
        plugged = sum(function.is_plugged for function in self._slots.functions)
        return f"Attached to QEMU: {describe(self._slots.functions)}, {plugged} plugged"

    def close(self) -> None:
        """Closes everything; what is plugged stays so."""
        for function in self._slots.functions:
            function.release()
        self._control.close()
        self._watch.close()
        self._loop.remove(self._uevents.fileno())
        self._uevents.close()

    async def _main(self) -> None:
        # asyncio's own has few threads: a device could wait for those that hang. One more is for remoted's socket.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_MAX_FUNCTIONS + 1))
        stepper = Stepper(self._loop, self._stop)
        serving = asyncio.create_task(self._serve())
        stopped = asyncio.create_task(self._stop.wait())
        ends: set[asyncio.Future[Any]] = {serving, stepper.failed}
        try:
            await asyncio.wait({*ends, stopped}, return_when=asyncio.FIRST_COMPLETED)
            done, _ = await asyncio.wait(ends, timeout=_LEAVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                self._event_log.warning(
                    "not done with QEMU within %g s: what is plugged stays so",
                    _LEAVE_SECONDS,
                    event=Event.LEAVE_TIMEOUT,
                )
            for task in done:
                task.result()
        finally:
            stepper.close()
            await cancel(serving, stopped)

    async def _serve(self) -> None:
        """One QEMU after the other, until told to stop."""
        while (monitor := await self._find()) is not None:
            try:
                await self._attend(monitor)
                self._state.reason = f"detached from {monitor.name}"
                self._event_log.info("%s", self._state.reason, event=Event.QEMU_DETACHED)
            except (PeerGone, ProtocolError) as error:
                self._state.reason = f"lost {monitor.name}: {error}"
                self._event_log.warning("%s", self._state.reason, event=Event.QEMU_LOST)
            finally:
                self._health.end()
                for slot in self._slots:
                    slot.close()
                await monitor.close()
            if await _within(_RETRY_SECONDS, self._stop.wait()):
                return

    async def _find(self) -> Monitor | None:
        """QEMU's monitor, however long that takes; None when told to stop meanwhile."""
        finding = asyncio.create_task(self._connect())
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({finding, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return finding.result() if finding.done() else None
        finally:
            await cancel(finding, stopped)

    async def _connect(self) -> Monitor:
        """Connects as soon as that is possible.

        KVM's uevents tell of a new VM, except in a network or user namespace of one's own, where none arrive
        (uevent_net_broadcast() in lib/kobject_uevent.c); a watch on the socket's directory tells of the socket,
        except where inotify doesn't see it. Where neither does, the attempts do, every two seconds.
        """
        backoff = Backoff()
        while True:
            self._appeared.clear()
            self._watch.watch(self._socket)
            try:
                return await Monitor.connect(self._socket, self._on_event, self._on_silence)
            except MonitorAbsent as error:
                self._tell_absence(f"nobody listens at {error}: waiting for QEMU")
                if await _within(backoff.next(_POLL_SECONDS), self._appeared.wait()):
                    backoff.reset()
                    await asyncio.sleep(FIRST_SECONDS)  # who has bound a socket listens at it a moment later
            except PeerGone as error:
                self._tell_absence(f"{error}: trying again")
                await asyncio.sleep(_RETRY_SECONDS)

    def _announce(self) -> None:
        notify(f"READY=1\nSTATUS={self.describe()}")

    def _tell_absence(self, line: str) -> None:
        """Says once why no QEMU is attached."""
        if (
            self._qemu is not None
            and process_start(self._qemu[0]) == self._qemu
            and is_stopped(self._qemu[0])
        ):
            line += f"; the QEMU that was attached last, process {self._qemu[0]}, is stopped by a signal"
        if line != self._state.reason:
            self._state.reason = line
            self._event_log.info("%s", line, event=Event.QEMU_AWAITED)
            self._announce()

    def _on_silence(self, peer: PeerCredentials) -> None:
        event = Event.QEMU_STOPPED if is_stopped(peer.pid) else Event.MONITOR_TAKEN
        if event is Event.QEMU_STOPPED:
            line = f"{peer} at {self._socket} doesn't answer: it is stopped by a signal"
        else:
            line = (
                f"{peer} at {self._socket} doesn't answer: it is busy, or its monitor has another client; give "
                "iohub-proxyd a monitor of its own (-qmp unix:PATH,server=on,wait=off)"
            )
        if line != self._state.reason:
            self._state.reason = line
            self._event_log.warning("%s", line, event=event)
            self._announce()

    async def _attend(self, monitor: Monitor) -> None:
        """Serves one QEMU until it goes, or until told to stop.

        Raises UsageError, and PeerGone and ProtocolError when the monitor is out of order.
        """
        inventory = await self._check(monitor)
        self._recognize(monitor)
        if self._has_store and any(each.name in inventory.drivers for each in self._slots.functions):
            await wait_for_remoted(self._remoted)
        servers = await find_servers(
            self._remoted,
            [each.config for each in self._slots.functions if each.name in inventory.drivers],
            self._config.socket_path,
        )
        self._state.attached, self._state.reason = monitor.name, None
        self._event_log.info("attached to QEMU", event=Event.QEMU_ATTACHED, peer=str(monitor.peer))
        ends = [
            asyncio.create_task(monitor.wait_closed()),
            asyncio.create_task(self._stop.wait()),
            asyncio.create_task(self._health.watch(monitor)),
            asyncio.create_task(self._watch_links()),
        ]
        turn = Turn()
        serving = asyncio.create_task(self._slots.serve(monitor, inventory, servers, turn))
        try:
            done, _ = await asyncio.wait({*ends, serving}, return_when=asyncio.FIRST_COMPLETED)
            await turn.end()
            for task in done:
                task.result()
        finally:
            self._state.attached = None
            await cancel(*ends, serving)
        if self._stop.is_set() and self._unplug_on_exit:
            await self._unplug(monitor)

    async def _watch_links(self) -> None:
        """Looks whether links that QEMU has made itself are still there, where their processes are."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            remotes = {
                each: each.remote
                for each in self._slots.functions
                if each.is_sound and each.config.transport is Transport.VFIO_USER
            }
            unlinked = await find_unlinked(self._remoted) if remotes else set()
            for function, remote in remotes.items():
                if function.name in unlinked and function.remote is remote:
                    function.lose_link()

    def _make_function(self, device: DeviceConfig) -> Function:
        path, log = self._config.socket_path(device), device_log(self._program, device.id, device.devfn)
        function = Function(device, path, self._loop, log)
        if device.transport is Transport.VFIO_USER:
            is_others = device.socket is not None
            function.find_server = lambda: find_waiting(self._remoted, device.id, path, is_others=is_others)
        if self._has_store:
            function.find_successor = lambda: find_successor(self._remoted, device.id)
        return function

    def _recognize(self, monitor: Monitor) -> None:
        """Lets the slots forget what was, unless this is the QEMU that was attached before."""
        process = process_start(monitor.peer.pid)
        if process is None or process != self._qemu:
            for slot in self._slots:
                slot.forget()
            self._slots.settle_detached()
        self._qemu, self._has_attached = process, True

    async def _check(self, monitor: Monitor) -> Inventory:
        """What is plugged in QEMU. Raises UsageError when QEMU or what it has doesn't suit."""
        try:
            transports = {function.config.transport for function in self._slots.functions}
            self._state.irqchip = await qemu.check(monitor, transports)
            for function in self._slots.functions:
                function.is_gone = False
            inventory = await qemu.take_inventory(monitor)
            for function in self._slots.functions:
                check_place(function, inventory, self._slots.functions)
        except UsageError as error:
            raise UsageError(printable(f"{monitor.name} at {self._socket}: {error}")) from error
        await self._health.begin(monitor)
        return inventory

    async def _unplug(self, monitor: Monitor) -> None:
        """Unplugs everything, as far as the guest consents in time."""
        leaving = [slot.unplug(monitor, CONSENT_SECONDS) for slot in self._slots]
        for remaining in await asyncio.gather(*leaving):
            for function in remaining:
                if function.is_stuck:
                    continue  # which was told
                function.log.warning(
                    "%s within %g s: it stays plugged until the guest ejects it or is reset",
                    "the guest has not ejected it"
                    if self._health.is_running
                    else "the guest is paused and can't eject it",
                    CONSENT_SECONDS,
                    event=Event.NOT_EJECTED,
                )

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "DEVICE_DELETED":
            for slot in self._slots:
                for function in slot.functions:
                    if function.name == data.get("device"):
                        slot.on_deleted(function)
        elif name in ("STOP", "RESUME"):
            self._health.on_event(name)
            if self._health.is_running:
                self._event_log.info("the guest was resumed", event=Event.GUEST_RESUMED)
            else:
                self._event_log.info("the guest was paused", event=Event.GUEST_PAUSED)
        elif name in ("RESET", "SHUTDOWN"):
            verb = "reset" if name == "RESET" else "shut down"
            reason = data.get("reason")
            self._event_log.info(
                "the machine was %s (%s)",
                verb,
                reason if isinstance(reason, str) else "unknown reason",
                event=Event.MACHINE_RESET if name == "RESET" else Event.MACHINE_SHUT_DOWN,
            )

    def _on_uevent(self, _events: int) -> None:
        if any(event.kind != "destroy" for event in self._uevents.read()):
            self._appeared.set()


async def _within(seconds: float, waiting: Awaitable[object]) -> bool:
    """Whether it is over within so many seconds; it is cancelled otherwise."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await waiting
            return True
    return False
