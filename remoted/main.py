# SPDX-License-Identifier: GPL-2.0-or-later
"""iohub-remoted: runs a VM's devices outside of it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Sequence
from types import FrameType

from common import eventsignal
from common.config import DeviceConfig, VmConfig, parse_remoted
from common.control import ControlServer
from common.errors import IohubError, ModelError, UsageError
from common.fdstore import FdStore
from common.journal import RateLimited, device_log, report_failure, setup
from common.loop import Loop
from common.messages import Event
from common.output import OutputError, complain
from common.pci import format_devfn
from common.privilege import renounce
from common.remoted_interface import Stalled
from common.service import feed_watchdog, freeze_heap, notify, raise_fd_limit
from common.stdio import flush_stdio
from common.trust import TRUST
from remoted.control import RemotedService
from remoted.function import PciFunction
from remoted.guard import DEVICE_ERRORS, Guard, describe_error, log_stray_errors
from remoted.host import Host
from remoted.iohub import IoHub
from remoted.memory import GuestMemory
from remoted.modellist import describe_models
from remoted.models import find_model, hidden_models
from remoted.ramfiles import RamFiles
from remoted.server import DeviceServer, adopt_connection
from remoted.watchdog import Doing, Watchdog

__all__ = ["main"]

PROGRAM = "iohub-remoted"


class Remoted:
    """The daemon: hub, devices, servers.

    SIGTERM and SIGINT end it after the present pass of the loop. One that comes before the loop runs, or when the
    daemon is ending already, kills it: device code may keep the loop for ever.
    """

    def __init__(self, config: VmConfig) -> None:
        """Creates every device and starts to listen. Raises UsageError."""
        self._loop = Loop(poll_limit=config.poll_max_us / 1e6)
        self._hub = IoHub(self._loop)
        self._servers: list[DeviceServer] = []
        self._control: ControlServer | None = None
        self._store: FdStore | None = None
        log = logging.getLogger(PROGRAM)
        self._log = RateLimited(log)
        self._is_serving = False
        self._watchdog = Watchdog()
        try:
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._loop.stop_on_signal(signum)
                signal.signal(signum, self._on_signal)
            log_stray_errors(log)
            self._watchdog.start()
            devices: list[tuple[DeviceConfig, DeviceServer]] = []
            path = str(config.runtime_dir / "remoted.varlink")
            interface = RemotedService(config.name, devices, self._loop.polling)
            self._control = ControlServer(self._loop, path, interface, log)
            self._watchdog.while_stalled = self._refuse_calls
            self._store = FdStore.open(self._loop, os.environ)
            self._ram_files = RamFiles(self._store) if self._store is not None else None
            for device in config.devices:
                self._servers.append(self._create(config, device))
                devices.append((device, self._servers[-1]))
            self._drop_stale()
        except BaseException:
            self.close()
            raise

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT, or until the last inherited link has closed."""
        self._is_serving = True
        notify("READY=1")
        feed_watchdog(self._loop)
        freeze_heap()
        self._loop.run()
        self._is_serving = False
        notify("STOPPING=1")

    def close(self) -> None:
        """Ends sessions, unlinks sockets, closes devices and eventfds."""
        self._hang_up()
        for server in self._servers:
            server.close()
        self._hub.finalize()
        if self._store is not None:
            self._store.close()
        self._watchdog.close()
        self._loop.close()

    def _hang_up(self) -> None:
        if self._control is not None:
            self._control.close()
        for server in self._servers:
            server.hang_up()

    def _refuse_calls(self, doing: Doing, seconds: float) -> None:
        """Says at the control socket what keeps the loop from answering there; in the watchdog's thread."""
        guard, control = doing[0], self._control
        names = [server.function.host.name for server in self._servers if server.function.host.guard is guard]
        if control is not None:
            control.refuse(Stalled(device="".join(names), reason=guard.describe_stall(doing, seconds)))

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self._is_serving and not self._loop.is_stopped:
            self._loop.stop()
            return
        # Whatever this interrupts may be anywhere: it is not expected to be in order.
        with contextlib.suppress(Exception):
            self._log.warning(
                "killed: a second signal, or one outside of the loop", event=Event.KILLED_WHILE_BUSY
            )
        with contextlib.suppress(Exception):
            self._hang_up()
        with contextlib.suppress(Exception):
            flush_stdio()
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    def _create(self, config: VmConfig, device: DeviceConfig) -> DeviceServer:
        log = device_log(PROGRAM, device.id, device.devfn)
        with Guard(log, self._watchdog).watching("loading its class"):
            try:
                model = find_model(device.model or "", device.id)
            except UsageError as error:
                raise ModelError(str(error)) from error.__cause__
        for other in hidden_models():
            if other.name == device.model:
                RateLimited(log).warning(
                    "%s is the built-in model, not that of %s: %s",
                    other.name,
                    other.origin,
                    other.target,
                    event=Event.MODEL_HIDDEN,
                )
        pirq = self._hub.pirqs[self._hub.map_irq(device.devfn, model.INTERRUPT_PIN)]
        host = Host(device.id, self._loop, log, GuestMemory(), pirq.set_irq, self._watchdog)
        function = _power_on(model, host, device)
        if sum(other.devfn >> 3 == device.devfn >> 3 for other in config.devices) > 1:
            function.set_multifunction()
        server = DeviceServer(self._loop, function, pirq, self._on_idle)
        try:
            if self._store is None or self._ram_files is None:
                function.full_reset()
            else:
                server.keep(self._store, self._ram_files, device.devfn)
            if device.fd is not None:
                server.serve(adopt_connection(device.fd, device.id))
            else:
                server.listen(config.socket_path(device))
        except BaseException:
            server.close()
            raise
        log.info("%s at %s", device.model, format_devfn(device.devfn))
        return server

    def _drop_stale(self) -> None:
        """Empties the fd store of what no device has taken."""
        if self._store is not None and self._ram_files is not None:
            self._ram_files.end_of_start()
            for name in self._store.drop_inherited():
                self._log.info("dropped from the fd store, as no device uses it: %s", name)

    def _on_idle(self) -> None:
        """A client has gone: without listeners and links there is nothing left to do."""
        if not any(server.is_listening or server.session for server in self._servers):
            self._loop.stop()


def _power_on(model: type[PciFunction], host: Host, device: DeviceConfig) -> PciFunction:
    """Raises UsageError."""
    try:
        with host.guard.watching("__init__"):
            function = model(host, device.properties)
        if not (isinstance(function, PciFunction) and function.is_initialised):
            raise UsageError("its __init__() does not call that of PciFunction")
        for part in function.PARTS:
            if not hasattr(function, part.partition(".")[0]):
                raise UsageError(f"PARTS: its __init__() makes no {part}")
    except UsageError as error:
        raise UsageError(f"device {device.id}: {error}") from error
    except DEVICE_ERRORS as error:
        RateLimited(host.log).exception("the device's code failed: __init__", event=Event.DEVICE_FAILED)
        reason = "{}: {} ({})".format(*describe_error(error))
        raise ModelError(f"device {device.id}: model {device.model} can't be created: {reason}") from error
    return function


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status: 0, or 2 for bad usage."""
    try:
        renounce()
        raise_fd_limit()
        eventsignal.prepare()
        config = parse_remoted(argv, describe_models)
        if not config.devices:
            raise UsageError("no devices: --device gives one, or --config a file with some")
        setup(PROGRAM, config.name, verbose=config.verbose)
        TRUST.allow(config.allow_users)
        config.make_runtime_dir()
        remoted = Remoted(config)
    except OutputError as error:
        complain(PROGRAM, error)
        return error.status
    except (IohubError, OSError) as error:
        report_failure(PROGRAM, error)
        return 2
    try:
        remoted.run()
    finally:
        remoted.close()
    return 0
