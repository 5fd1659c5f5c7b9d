# SPDX-License-Identifier: GPL-2.0-or-later
"""A remoted in a thread of the test: the real loop, hub, functions and servers, without the process."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TypeVar

from common.errors import PeerGone
from common.loop import Loop
from common.notifier import EventNotifier
from remoted.device import PciFunction
from remoted.host import Host
from remoted.iohub import IoHub, Pirq
from remoted.memory import GuestMemory
from remoted.server import DeviceServer

F = TypeVar("F", bound=PciFunction)


class RemoteThread:
    """Serves functions on sockets in a directory until close()."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loop = Loop()
        self.hub = IoHub(self._loop)
        self.servers: dict[str, DeviceServer] = {}
        self._thread = threading.Thread(target=self._loop.run, name="remote", daemon=True)

    def add(self, model: type[F], name: str, devfn: int) -> F:
        """Creates a function that listens on NAME.sock; before start()."""
        pirq = self.hub.pirqs[devfn]
        log = logging.getLogger(f"remote.{name}")
        function = model(Host(name, self._loop, log, GuestMemory(), pirq.set_irq), {})
        function.full_reset()
        server = DeviceServer(self._loop, function, pirq, lambda: None)
        server.listen(self.path(name))
        self.servers[name] = server
        return function

    def path(self, name: str) -> str:
        return str(self._directory / f"{name}.sock")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends thread, sessions and sockets."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for server in self.servers.values():
            server.close()
        self.hub.finalize()
        self._loop.close()


class HangingUp(Pirq):
    """Lets a session end as soon as it is complete, or later."""

    links = 0
    at_once = True

    def set_irqfd(self, irqfd: EventNotifier, resamplefd: EventNotifier) -> None:
        self.links += 1
        irqfd.close()
        resamplefd.close()
        if self.at_once:
            raise PeerGone("enough")
