# SPDX-License-Identifier: GPL-2.0-or-later
"""iohub-remoted: runs a VM's devices outside of it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence

from common import eventsignal
from common.config import DeviceConfig, VmConfig, parse_remoted
from common.control import ControlServer
from common.errors import IohubError, UsageError
from common.journal import device_log, printable, setup
from common.loop import Loop
from common.output import OutputError, complain
from common.pci import format_devfn
from common.service import freeze_heap, notify, raise_fd_limit
from remoted.control import RemotedService
from remoted.function import PciFunction
from remoted.host import DEVICE_ERRORS, Failures, GuardedLoop, Host
from remoted.iohub import IoHub
from remoted.memory import GuestMemory
from remoted.models import find_model
from remoted.server import DeviceServer, adopt_connection

__all__ = ["main"]

PROGRAM = "iohub-remoted"


class Remoted:
    """The daemon: hub, devices, servers."""

    def __init__(self, config: VmConfig) -> None:
        """Creates every device and starts to listen. Raises UsageError."""
        self._loop = Loop()
        self._hub = IoHub(self._loop)
        self._servers: list[DeviceServer] = []
        self._control: ControlServer | None = None
        self._log = logging.getLogger(PROGRAM)
        try:
            devices: list[tuple[DeviceConfig, DeviceServer]] = []
            path = str(config.runtime_dir / "remoted.varlink")
            interface = RemotedService(config.name, devices)
            self._control = ControlServer(self._loop, path, interface, self._log)
            for device in config.devices:
                self._servers.append(self._create(config, device))
                devices.append((device, self._servers[-1]))
        except BaseException:
            self.close()
            raise

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT, or until the last inherited link has closed."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._loop.stop_on_signal(signum)
        notify("READY=1")
        freeze_heap()
        self._loop.run()
        notify("STOPPING=1")

    def close(self) -> None:
        """Ends sessions, unlinks sockets, closes devices and eventfds."""
        if self._control is not None:
            self._control.close()
        for server in self._servers:
            server.close()
        self._hub.finalize()
        self._loop.close()

    def _create(self, config: VmConfig, device: DeviceConfig) -> DeviceServer:
        model = find_model(device.model or "", device.id)
        log = device_log(PROGRAM, device.id)
        pirq = self._hub.pirqs[self._hub.map_irq(device.devfn, model.INTERRUPT_PIN)]
        loop = GuardedLoop(self._loop, Failures(log))
        host = Host(device.id, loop, log, GuestMemory(), pirq.set_irq)
        function = self._power_on(model, host, device)
        if sum(other.devfn >> 3 == device.devfn >> 3 for other in config.devices) > 1:
            function.set_multifunction()
        server = DeviceServer(self._loop, function, pirq, self._on_idle)
        try:
            if device.fd is not None:
                server.serve(adopt_connection(device.fd, device.id))
            else:
                server.listen(config.socket_path(device))
        except BaseException:
            server.close()
            raise
        log.info("%s at %s", device.model, format_devfn(device.devfn))
        return server

    @staticmethod
    def _power_on(model: type[PciFunction], host: Host, device: DeviceConfig) -> PciFunction:
        name = f"model {device.model}"
        try:
            unknown = sorted(set(device.properties).difference(model.PROPERTIES))
            if unknown:
                known = ", ".join(sorted(model.PROPERTIES)) or "none"
                raise UsageError(f"{name} has no option {', '.join(unknown)}; it has {known}")
            function = model(host, device.properties)
            function.full_reset()  # fails if the class overrides __init__() without calling this one
        except UsageError as error:
            raise UsageError(f"device {device.id}: {error}") from error
        except DEVICE_ERRORS as error:
            host.log.exception("the device's code failed: %s()", model.__name__)
            reason = printable(f"{type(error).__name__}: {error}")
            raise UsageError(f"device {device.id}: {name} can't be created: {reason}") from error
        return function

    def _on_idle(self) -> None:
        """A client has gone: without listeners and links there is nothing left to do."""
        if not any(server.is_listening or server.session for server in self._servers):
            self._loop.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status: 0, or 2 for bad usage."""
    try:
        raise_fd_limit()
        eventsignal.prepare()
        config = parse_remoted(argv)
        if not config.devices:
            raise UsageError("no devices: --device gives one, or --config a file with some")
        setup(PROGRAM, config.name, verbose=config.verbose)
        config.make_runtime_dir()
        remoted = Remoted(config)
    except OutputError as error:
        complain(PROGRAM, error)
        return error.status
    except (IohubError, OSError) as error:
        complain(PROGRAM, error)
        return 2
    try:
        remoted.run()
    finally:
        remoted.close()
    return 0
