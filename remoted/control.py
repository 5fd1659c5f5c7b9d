# SPDX-License-Identifier: GPL-2.0-or-later
"""org.iohub.Remoted: what the devices' daemon answers at its control socket."""

# No `from __future__ import annotations`: asyncvarlink reads the methods' types.
import os
from collections.abc import Sequence
from itertools import islice

from asyncvarlink import varlinkmethod

from common.amiss import Amiss, one_line
from common.config import DeviceConfig
from common.errors import UsageError
from common.lostlines import LOST
from common.pci import format_devfn, parse_devfn
from common.polling import Polling as LoopPolling
from common.remoted_interface import (
    Function,
    Link,
    NoSuchDevice,
    NotDrivable,
    Polling,
    Remoted,
    StatusReply,
)
from remoted.function import PciFunction
from remoted.guard import DEVICE_ERRORS
from remoted.server import DeviceServer

__all__ = ["RemotedService"]

_MAX_COUNTERS = 32
_MAX_COUNT = (1 << 63) - 1
"""of a model's own counters: Varlink's integers have 64 bits"""


class RemotedService(Remoted):
    """The interface's methods."""

    def __init__(
        self, vm: str, devices: Sequence[tuple[DeviceConfig, DeviceServer]], polling: LoopPolling
    ) -> None:
        """``devices`` and ``polling``, the loop's, are read at each call."""
        self.amiss = Amiss()
        """what concerns no single device"""
        self.amiss.add(LOST.amiss)
        self._vm = vm
        self._devices = devices
        self._polling = polling

    @varlinkmethod
    def Status(self) -> StatusReply:
        """Every function's line, counters and link."""
        return {
            "vm": self._vm,
            "pid": os.getpid(),
            "polling": Polling(
                window_us=round(self._polling.window * 1e6),
                found=self._polling.found,
                missed=self._polling.missed,
                spent_ms=round(self._polling.seconds * 1e3),
            ),
            "amiss": self.amiss.texts(),
            "functions": [_function_status(config, server) for config, server in self._devices],
        }

    @varlinkmethod
    def Raise(self, *, device: str) -> None:
        """Asserts the INTx line of a device whose model allows it, such as irq-line, named by id or address."""
        self._drive(device, True)

    @varlinkmethod
    def Lower(self, *, device: str) -> None:
        """Deasserts such a line."""
        self._drive(device, False)

    def _drive(self, device: str, level: bool) -> None:
        config, server = self._find(device)
        if not (server.function.IS_DRIVABLE and server.function.drive_intx(level)):
            raise NotDrivable(device=config.id, model=config.model)

    def _find(self, device: str) -> tuple[DeviceConfig, DeviceServer]:
        for config, server in self._devices:
            if config.id == device:
                return config, server
        try:
            devfn = parse_devfn(device)
        except UsageError:
            devfn = -1
        for config, server in self._devices:
            if config.devfn == devfn:
                return config, server
        raise NoSuchDevice(device=device)


def _function_status(config: DeviceConfig, server: DeviceServer) -> Function:
    line, session = server.line, server.session
    interrupts, vectors = server.interrupts_in_use
    status = Function(
        id=config.id,
        addr=format_devfn(config.devfn),
        model=config.model or "",
        level=server.function.intx_level,
        asserted=bool(line.level),
        raised=line.raised,
        resamples=line.resamples,
        reasserts=line.reasserts,
        rejected=server.rejected,
        refused=server.refused,
        accesses=server.accesses,
        quiet_seconds=int(server.quiet_seconds()),
        errors=server.function.errors,
        has_irqfd=line.has_irqfd,
        transport=config.transport,
        interrupts=interrupts,
        vectors=vectors,
        messages=server.messages,
        link=Link.connected if session else Link.waiting if server.is_listening else Link.closed,
        amiss=server.function.amiss.texts(),
        counters=_counters(server.function),
    )
    if session is not None:
        status.client_pid = session.peer.pid
        status.client_name = session.client_name
        status.client_gone = _has_ended(session.peer.pid)
    return status


def _counters(function: PciFunction) -> dict[str, int]:
    """What the model counts; nothing if its own code fails in it."""
    try:
        return {
            one_line(str(name)): max(-_MAX_COUNT, min(_MAX_COUNT, int(value)))
            for name, value in islice(function.counters.items(), _MAX_COUNTERS)
        }
    except DEVICE_ERRORS:
        return {}


def _has_ended(pid: int) -> bool:
    """Whether there is no such process; not known, and so False, for one in another PID namespace (pid 0)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False
