# SPDX-License-Identifier: GPL-2.0-or-later
"""org.iohub.Remoted: what the devices' daemon answers at its control socket."""

from __future__ import annotations

import os
from collections.abc import Sequence

from varlink import VarlinkError

from common.amiss import Amiss
from common.config import DeviceConfig
from common.errors import UsageError
from common.pci import format_devfn, parse_devfn
from remoted.server import DeviceServer

__all__ = ["INTERFACE", "RemotedInterface"]

INTERFACE = "org.iohub.Remoted"


class RemotedInterface:
    """The interface's methods, as common/org.iohub.Remoted.varlink defines them."""

    def __init__(self, vm: str, devices: Sequence[tuple[DeviceConfig, DeviceServer]]) -> None:
        """``devices`` is read at each call."""
        self.amiss = Amiss()
        """what concerns no single device"""
        self._vm = vm
        self._devices = devices

    def Status(self) -> dict[str, object]:
        """Every function's line, counters and link."""
        return {
            "vm": self._vm,
            "pid": os.getpid(),
            "amiss": self.amiss.texts(),
            "functions": [_function_status(config, server) for config, server in self._devices],
        }

    def Raise(self, device: str) -> None:
        """Asserts a drivable device's line. Raises VarlinkError: NoSuchDevice, NotDrivable."""
        self._drive(device, True)

    def Lower(self, device: str) -> None:
        """Deasserts a drivable device's line. Raises VarlinkError: NoSuchDevice, NotDrivable."""
        self._drive(device, False)

    def _drive(self, device: str, level: bool) -> None:
        config, server = self._find(device)
        if not server.function.IS_DRIVABLE:
            parameters = {"device": config.id, "model": config.model}
            raise VarlinkError({"error": f"{INTERFACE}.NotDrivable", "parameters": parameters})
        server.function.set_intx(level)

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
        raise VarlinkError({"error": f"{INTERFACE}.NoSuchDevice", "parameters": {"device": device}})


def _function_status(config: DeviceConfig, server: DeviceServer) -> dict[str, object]:
    pirq, session = server.pirq, server.session
    status: dict[str, object] = {
        "id": config.id,
        "addr": format_devfn(config.devfn),
        "model": config.model,
        "level": server.function.intx_level,
        "asserted": bool(pirq.level),
        "raised": pirq.raised,
        "resamples": pirq.resamples,
        "reasserts": pirq.reasserts,
        "rejected": server.rejected,
        "refused": server.refused,
        "has_irqfd": pirq.has_irqfd,
        "link": "connected" if session else "waiting" if server.is_listening else "closed",
        "amiss": server.function.amiss.texts(),
    }
    if session is not None:
        status["client_pid"] = session.peer.pid
        if session.client_name is not None:
            status["client_name"] = session.client_name
        status["client_gone"] = _has_ended(session.peer.pid)
    return status


def _has_ended(pid: int) -> bool:
    """Whether there is no such process; not known, and so False, for one in another PID namespace (pid 0)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False
