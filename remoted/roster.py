# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices that the daemon runs: created at its start, added and removed when its configuration changes.

A device that is removed takes no further client, and is closed when the one that it serves has gone: it works as
long as the guest has it plugged. One whose configuration differs is removed first, and then created anew.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from common.config import DeviceConfig, Transport, VmConfig
from common.errors import IohubError, ModelError, UsageError
from common.journal import Log, RateLimited, device_log
from common.keptfiles import KeptFiles
from common.loop import Loop
from common.messages import Event
from common.pci import format_devfn
from remoted.declaration import check_attributes
from remoted.function import PciFunction
from remoted.guard import DEVICE_ERRORS, Guard, describe_error
from remoted.host import Host
from remoted.iohub import IoHub, Line
from remoted.memory import GuestMemory
from remoted.models import find_model, hidden_models
from remoted.server import DeviceServer, adopt_connection
from remoted.sharedmemory import take_bar_memory
from remoted.watchdog import Watchdog

if TYPE_CHECKING:
    from common.fdstore import FdStore
    from remoted.ramfiles import RamFiles

__all__ = ["Roster"]


class Roster:
    """The devices and their servers; those that are being removed among them."""

    def __init__(self, program: str, loop: Loop, watchdog: Watchdog, on_idle: Callable[[], None]) -> None:
        """``program`` names the log. ``on_idle()`` is called when a client has gone that could be the last one."""
        self.devices: list[tuple[DeviceConfig, DeviceServer]] = []
        """in the order of their creation"""
        self._program = program
        self._loop = loop
        self._hub = IoHub(loop)
        self._watchdog = watchdog
        self._store: FdStore | None = None
        self._ram_files: RamFiles | None = None
        self._on_idle = on_idle
        self._config: VmConfig | None = None
        self._leaving: set[DeviceServer] = set()
        self._is_settling = False
        """whether _settle() is due"""

    @property
    def servers(self) -> list[DeviceServer]:
        """The servers of all devices."""
        return [server for _, server in self.devices]

    def start(self, config: VmConfig, store: FdStore | None) -> None:
        """Creates every device; those of the previous process continue, if there is a store.

        Raises UsageError and OSError; close() comes after it in any case.
        """
        self._config, self._store = config, store
        if store is not None:
            from remoted.ramfiles import RamFiles

            self._ram_files = RamFiles(store)
        crowded = _crowded_slots(config)
        for device in config.devices:
            self.devices.append((device, self._create(device, crowded)))
        # All links of the previous process go on before anybody new is waited for.
        for device, server in self.devices:
            _listen(config, device, server)
        if self._store is not None and self._ram_files is not None:
            self._ram_files.end_of_start()
            for name in self._store.drop_inherited():
                logging.getLogger(self._program).info(
                    "dropped from the fd store, as no device uses it: %s", name
                )

    def change(self, config: VmConfig) -> None:
        """Adds and removes devices until they are those of the configuration; all others go on.

        A device that can't be created is left out, with the reason in its log.
        """
        self._config = config
        self._settle()

    def close(self) -> None:
        """Ends all sessions, and closes devices and eventfds."""
        for server in self.servers:
            server.close()
        self._hub.finalize()

    def _settle(self) -> None:
        """Does of the last change() what can be done now."""
        assert self._config is not None
        self._is_settling = False
        config, crowded = self._config, _crowded_slots(self._config)
        wanted = {device.id: device for device in config.devices}
        staying, leaving = [], []
        for device, server in self.devices:
            is_crowded = device.devfn >> 3 in crowded
            is_wanted = wanted.get(device.id) == device and server.function.is_multifunction == is_crowded
            if not is_wanted and server not in self._leaving:
                self._leaving.add(server)
                server.retire()
            if server in self._leaving and server.session is None:
                leaving.append(server)
            else:
                staying.append((device, server))
        self.devices[:] = staying
        for server in leaving:
            self._leaving.remove(server)
            server.discard()
        present = {device.id for device, _ in staying} | {device.devfn for device, _ in staying}
        for device in config.devices:
            if device.id not in present and device.devfn not in present:
                try:
                    self._add(config, device, crowded)
                except (IohubError, OSError) as error:
                    log = RateLimited(device_log(self._program, device.id, device.devfn))
                    log.error("not added: %s", error, event=Event.DEVICE_NOT_ADDED)

    def _on_client_gone(self) -> None:
        if not self._leaving:
            self._on_idle()
        elif not self._is_settling:
            self._is_settling = True
            self._loop.call_later(0, self._settle)  # its session is still being closed

    def _add(self, config: VmConfig, device: DeviceConfig, crowded: set[int]) -> None:
        server = self._create(device, crowded)
        try:
            _listen(config, device, server)
        except BaseException:
            server.close()
            raise
        self.devices.append((device, server))

    def _create(self, device: DeviceConfig, crowded: set[int]) -> DeviceServer:
        log = device_log(self._program, device.id, device.devfn)
        with Guard(log, self._watchdog).watching("loading its class"):
            try:
                model = find_model(device.model or "", device.id)
            except UsageError as error:
                raise ModelError(str(error)) from error.__cause__
        pirq = self._hub.pirqs[self._hub.map_irq(device.devfn, model.INTERRUPT_PIN)]
        line: Line = pirq
        vectors = None
        if device.transport is Transport.VFIO_USER:
            from remoted.vfiouser.line import IntxLine  # only where it is used
            from remoted.vfiouser.vectors import Vectors

            line = intx = IntxLine(self._loop, self._hub.owners)
            vectors = Vectors(intx)
        files = None if self._store is None else KeptFiles(self._store, f"{device.devfn:02x}.own-")
        host = Host(
            device.id,
            self._loop,
            log,
            GuestMemory(),
            line.set_irq,
            self._watchdog,
            vectors,
            kept_memory=partial(self._take_memory, device.devfn),
            files=files,
            msix=device.msix,
        )
        try:
            function = _power_on(model, host, device)
        except UsageError:
            _warn_of_hidden_model(device, log)
            raise
        if device.devfn >> 3 in crowded:
            function.set_multifunction()
        server = DeviceServer(self._loop, function, vectors or pirq, self._on_client_gone)
        try:
            if self._store is None or self._ram_files is None:
                function.full_reset()
            else:
                server.keep(self._store, self._ram_files, device.devfn)
            if device.fd is not None:
                server.serve(adopt_connection(device.fd, device.id))
        except BaseException:
            server.close()
            raise
        log.info("%s at %s", device.model, format_devfn(device.devfn))
        # Later: to look for what is installed takes longer than to create a device.
        self._loop.call_later(0, partial(_warn_of_hidden_model, device, log))
        return server

    def _take_memory(self, devfn: int, bar: int) -> int:
        return -1 if self._store is None else take_bar_memory(self._store, devfn, bar)


def _listen(config: VmConfig, device: DeviceConfig, server: DeviceServer) -> None:
    if device.fd is None:
        server.listen(config.socket_path(device))


def _warn_of_hidden_model(device: DeviceConfig, log: Log) -> None:
    """Tells that an installed package has a model of that name, which the device may have been meant to be."""
    for other in hidden_models():
        if other.name == device.model:
            RateLimited(log).warning(
                "%s is the built-in model, not that of %s: %s",
                other.name,
                other.origin,
                other.target,
                event=Event.MODEL_HIDDEN,
            )


def _crowded_slots(config: VmConfig) -> set[int]:
    """The slots that have several functions."""
    counts = Counter(device.devfn >> 3 for device in config.devices)
    return {slot for slot, count in counts.items() if count > 1}


def _power_on(model: type[PciFunction], host: Host, device: DeviceConfig) -> PciFunction:
    """Raises UsageError."""
    try:
        with host.guard.watching("__init__"):
            function = model(host, device.properties)
        if not (isinstance(function, PciFunction) and function.is_initialised):
            raise UsageError("its __init__() does not call that of PciFunction")
        check_attributes(function)
        for part in function.PARTS:
            if not hasattr(function, part.partition(".")[0]):
                raise UsageError(f"PARTS: its __init__() sets no attribute {part}")
    except UsageError as error:
        raise UsageError(f"device {device.id}: {error}") from error
    except DEVICE_ERRORS as error:
        RateLimited(host.log).exception("the device's code failed: __init__", event=Event.DEVICE_FAILED)
        reason = "{}: {} ({})".format(*describe_error(error))
        raise ModelError(f"device {device.id}: model {device.model} can't be created: {reason}") from error
    return function
