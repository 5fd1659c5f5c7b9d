# SPDX-License-Identifier: GPL-2.0-or-later
"""The configured functions of one slot, and their stay in a running QEMU.

A slot comes and goes as a whole: ACPI ejects slots, and a guest looks at the other functions when function 0
arrives (QEMU refuses any that comes later). So function 0 is plugged last, and one function that must be
replaced takes the others with it.

QEMU's proxy keeps the link that it was created with. A duplicate of it is kept here to see it end; it is closed
as soon as QEMU's is, since the other side would wait for both. A function that was found plugged has no such
duplicate: there the process at its device's socket is watched instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Callable, Sequence
from select import EPOLLIN, EPOLLRDHUP

from common.amiss import Amiss
from common.config import DeviceConfig
from common.errors import PeerGone, ProtocolError
from common.journal import Log, RateLimited
from common.link import PeerCredentials
from common.loop import Loop
from common.pci import format_devfn
from proxyd.vm.qmp.handover import Handover, connect, examine, find_server
from proxyd.vm.qmp.monitor import CommandError, Monitor
from proxyd.vm.qmp.qemu import PROXY_DRIVER, Inventory, take_inventory

__all__ = ["CONSENT_SECONDS", "Function", "Slot", "Turn"]

CONSENT_SECONDS = 5.0
"""how long a guest may take to let a device go before that is told; QEMU then takes another device_del, too"""
_LAST_CONSENT_SECONDS = 60.0
_EXAMINATION_SECONDS = 5.0
"""how long a device's answers may take altogether; QEMU would stand still for as long"""
_FIRST_RETRY_SECONDS = 0.02
_LAST_RETRY_SECONDS = 1.0
_LAST_REPLACEMENT_SECONDS = 5.0
"""the same for what loses its link within a second each time: every replacement is a hot-plug for the guest"""
_LASTING_SECONDS = 1.0
_NO_QEMU = "not plugged: there is no QEMU"


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
        """Waits for who has it. Nobody gets it any more: who asks for it only waits to be cancelled."""
        self._is_over = True
        async with self._lock:
            pass


class Function:
    """One configured device, and QEMU's proxy of it."""

    pin = None
    gsi = None
    """both are QEMU's to know"""

    answer_times = None
    """QEMU knows"""

    def __init__(self, config: DeviceConfig, path: str, loop: Loop, log: Log) -> None:
        """``path`` is its device's socket."""
        self.name = config.id
        self.devfn = config.devfn
        self.path = path
        self.reconnects = 0
        self.reason = _NO_QEMU
        """what is or was amiss last"""
        self.amiss = Amiss()
        self.remote: PeerCredentials | None = None
        """the process at the other end of QEMU's link; None unless the function is plugged and its link good"""
        self.is_plugged = False
        self.handover: Handover | None = None
        """the link, from when it is there until QEMU has none any more"""
        self.is_broken = False
        """whether QEMU's link was ended from here"""
        self.log = RateLimited(log)
        self.on_change: Callable[[], None] = lambda: None
        self._loop = loop
        self._watched = -1

    @property
    def is_sound(self) -> bool:
        """Whether it is plugged and its link is good, as far as that can be seen from here."""
        return self.is_plugged and self.remote is not None

    @property
    def fdname(self) -> str:
        """The name that the link has in QEMU from getfd until device_add."""
        return f"iohub-{self.name}"

    def warn(self, text: str) -> None:
        """Logs what is amiss, and keeps it to be asked for."""
        self.reason = text
        self.log.warning("%s", text)

    def plugged(self, handover: Handover) -> None:
        """QEMU has a proxy now, with a duplicate of this link: watches its end."""
        self.is_plugged = True
        self.is_broken = False
        self.remote = handover.client.peer
        # Not EPOLLIN: every reply to QEMU would wake this process.
        self._watch(handover.client.fileno(), EPOLLRDHUP)

    def adopt(self, server: PeerCredentials) -> None:
        """QEMU had a proxy already: watches the process that serves it, if that can be watched."""
        self.is_plugged = True
        self.remote = server
        try:
            fd = os.pidfd_open(server.pid)
        except ProcessLookupError:
            self._on_end(0)
        except OSError as error:  # among others: it is in another PID namespace, and has the pid 0 here
            self.log.warning(
                "%s can't be watched (%s): should it end, start this daemon again", server, error.strerror
            )
        else:
            self._watch(fd, EPOLLIN)

    def release(self) -> None:
        """Forgets the link, and closes what of it is here."""
        self.remote = None
        fd, self._watched = self._watched, -1
        handover, self.handover = self.handover, None
        if fd != -1:
            self._loop.remove(fd)
            if handover is None:
                os.close(fd)
        if handover is not None:
            handover.client.close_own_copy()

    def break_link(self) -> None:
        """Ends the link for QEMU, too, which may be waiting for an answer from it."""
        if self.handover is not None:
            self.handover.client.shutdown()
            self.is_broken = True

    def _watch(self, fd: int, events: int) -> None:
        self._loop.add(fd, self._on_end, events)
        self._watched = fd

    def _on_end(self, _events: int) -> None:
        self.warn(
            f"the link to {self.remote} has ended: QEMU's proxy can't take another, the guest reads all ones"
        )
        self.release()
        self.on_change()


class Slot:
    """The functions of one slot, to be kept plugged."""

    def __init__(self, functions: Sequence[Function]) -> None:
        self.functions = sorted(functions, key=lambda function: -function.devfn)
        """function 0 last"""
        self.settled = asyncio.Event()
        """whether everything was tried once"""
        self._changed = asyncio.Event()
        self._is_leaving = False
        self._retry = _FIRST_RETRY_SECONDS
        for function in self.functions:
            function.on_change = self._changed.set

    @property
    def plugged(self) -> list[Function]:
        """Those that QEMU has a proxy of."""
        return [function for function in self.functions if function.is_plugged]

    async def run(self, monitor: Monitor, inventory: Inventory, turn: Turn) -> None:
        """Plugs what is missing, adopts what is there, replaces what has lost its link, until it is cancelled.

        What loses its link at once, again and again, is replaced ever more rarely. It is best cancelled
        after the end of ``turn``: nothing is half done then. Raises PeerGone and ProtocolError when the monitor is
        out of order; close() comes after it, however it ends.
        """
        async with turn:
            await self._reconcile(monitor, inventory)
        loop = asyncio.get_running_loop()
        since = -math.inf
        while True:
            if any(not function.is_sound for function in self.plugged) or self._is_open():
                self.settled.set()
                lasted = loop.time() - since
                await self._remove(monitor)
                if lasted < _LASTING_SECONDS:
                    await self._pause(_LAST_REPLACEMENT_SECONDS)
                else:
                    self._retry = _FIRST_RETRY_SECONDS
            if not await self._plug(monitor, turn):
                break
            since = loop.time()
            self.settled.set()
            await self._until(lambda: not all(function.is_sound for function in self.functions))
            if not all(function.is_plugged for function in self.functions):
                break
        self.settled.set()
        await asyncio.Event().wait()

    async def unplug(self, monitor: Monitor, seconds: float) -> list[Function]:
        """Asks the guest to let the slot go; those functions that it still has after so many seconds."""
        self._is_leaving = True
        await self._request_unplug(monitor)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._until(lambda: not self.plugged)
        return self.plugged

    def on_deleted(self, function: Function) -> None:
        """QEMU has unplugged one of the functions."""
        if not function.is_plugged:
            return
        function.is_plugged = False
        function.release()
        if self._is_leaving:
            function.reason = "unplugged"
            function.log.info("unplugged")
        else:
            function.warn("unplugged, not by this daemon: it stays out until that is started again")
        self._changed.set()

    def close(self) -> None:
        """Forgets everything about the QEMU that was."""
        self._is_leaving = False
        self.settled.clear()
        for function in self.functions:
            function.is_plugged = False
            function.release()
            function.reason = _NO_QEMU

    async def _reconcile(self, monitor: Monitor, inventory: Inventory) -> None:
        """Takes over what is plugged already, and takes back what an unfinished plugging has left in QEMU."""
        for function in self.functions:
            if function.name not in inventory.drivers:
                function.reason = "not plugged yet"
                with contextlib.suppress(CommandError):
                    await monitor.execute("closefd", fdname=function.fdname)
                continue
            server = None if function.is_broken else await asyncio.to_thread(find_server, function.path)
            if server is None:
                function.is_plugged = True
                function.warn(f"found plugged without a link to {function.path}")
            else:
                function.log.info("found plugged at %s, served by %s", format_devfn(function.devfn), server)
                function.adopt(server)

    def _is_open(self) -> bool:
        """Whether function 0 is plugged before others: these would be refused."""
        return self.functions[-1].is_plugged and len(self.plugged) < len(self.functions)

    async def _plug(self, monitor: Monitor, turn: Turn) -> bool:
        """Plugs all functions that aren't; False if QEMU doesn't want one. Waits for their devices."""
        missing = [function for function in self.functions if not function.is_plugged]
        await self._connect(missing)
        async with turn:
            try:
                for function in missing:
                    if function.handover is not None:
                        await self._add(monitor, function, function.handover)
            except CommandError as error:
                function.warn(f"QEMU refuses it, it stays out: {error}")
                return False
            except (PeerGone, asyncio.CancelledError):
                function.break_link()
                raise
            finally:
                for other in missing:
                    if not other.is_plugged:
                        other.release()
        return True

    async def _connect(self, functions: Sequence[Function]) -> None:
        """Gets a link for each, however long that takes."""
        while True:
            for function in functions:
                if function.handover is not None:
                    continue
                try:
                    function.handover = await _open(function.path)
                except (PeerGone, ProtocolError) as error:
                    reason = f"not plugged yet: {error}"
                    if reason != function.reason:
                        function.warn(reason)
                    self.settled.set()
                    break
            else:
                return
            await self._pause(_LAST_RETRY_SECONDS)

    async def _pause(self, most: float) -> None:
        """Waits before the next attempt, longer each time."""
        await asyncio.sleep(min(self._retry, most))
        self._retry = min(2 * self._retry, most)

    async def _add(self, monitor: Monitor, function: Function, handover: Handover) -> None:
        await monitor.getfd(function.fdname, handover.client.fileno())
        try:
            await monitor.execute(
                "device_add",
                driver=PROXY_DRIVER,
                id=function.name,
                bus="pci.0",
                addr=format_devfn(function.devfn),
                multifunction=len(self.functions) > 1,
                fd=function.fdname,
            )
        except CommandError:
            with contextlib.suppress(CommandError):
                await monitor.execute("closefd", fdname=function.fdname)
            raise
        inventory = await take_inventory(monitor)
        if inventory.devfns.get(function.name) != function.devfn:
            raise CommandError(f"it took device_add, but has nothing at {format_devfn(function.devfn)}", "")
        function.plugged(handover)
        function.log.info(
            "plugged at %s: %04x:%04x", format_devfn(function.devfn), handover.vendor, handover.device
        )
        for remark in handover.remarks:
            function.log.warning("behind QEMU's proxy %s", remark)

    async def _remove(self, monitor: Monitor) -> None:
        """Unplugs all of the slot, however long the guest takes."""
        seconds = CONSENT_SECONDS
        while waiting := await self.unplug(monitor, seconds):
            if seconds == CONSENT_SECONDS:
                for function in waiting:
                    function.warn(
                        f"the guest hasn't let it go in {seconds:g} s; it is replaced when the guest does, "
                        "or is reset"
                    )
            seconds = min(2 * seconds, _LAST_CONSENT_SECONDS)
        self._is_leaving = False
        for function in self.functions:
            function.reconnects += 1

    async def _request_unplug(self, monitor: Monitor) -> None:
        for function in self.plugged:
            try:
                await monitor.execute("device_del", id=function.name)
            except CommandError as error:
                if error.error_class == "DeviceNotFound":
                    self.on_deleted(function)
                else:  # among others: the guest has been asked already
                    function.log.info("device_del: %s", error)

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
            examined.exception()  # asyncio would log one that nobody has asked for

    try:
        await asyncio.wait({examining}, timeout=_EXAMINATION_SECONDS)
        if not examining.done():
            raise PeerGone(f"its answers take more than {_EXAMINATION_SECONDS:g} s")
        return examining.result()
    except BaseException:
        client.shutdown()  # which ends the thread
        examining.add_done_callback(close)
        raise
