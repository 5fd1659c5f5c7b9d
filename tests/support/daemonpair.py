# SPDX-License-Identifier: GPL-2.0-or-later
"""Both daemons as processes, and the console of the guest that proxyd runs."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common.control import call
from common.ctl.children import Child
from common.ctl.guestconsole import GuestConsole

_READY_SECONDS = 20


class Daemons:
    """The two daemons of one VM, and the guest's console."""

    def __init__(self, directory: Path, vm: str, count: int) -> None:
        self._directory = directory
        self._vm = vm
        self._devices = [(f"edu{slot}", f"{slot:02x}.0") for slot in range(3, 3 + count)]
        self._stack = ExitStack()

    def start_remoted(self, *models: str) -> Child:
        """A model for each function, or one for all; edu by default."""
        every = models if len(models) > 1 else (models or ("edu",)) * len(self._devices)
        options = [
            f"--device={model},id={name},addr={addr}"
            for model, (name, addr) in zip(every, self._devices, strict=True)
        ]
        return self._start("remoted", options)

    def start_proxyd(self) -> Child:
        options = [f"--device=id={name},addr={addr}" for name, addr in self._devices]
        return self._start("proxyd", [f"--vm={self._vm}", *options])

    def connect_console(self) -> GuestConsole:
        """The console of a guest that is ready."""
        self._console = socket.socket(socket.AF_UNIX)
        self._console.connect(str(self._directory / "proxyd.console"))
        console = self._stack.enter_context(GuestConsole(self._console))
        console.wait_ready(_READY_SECONDS)
        return console

    def send(self, command: str) -> None:
        """A command whose answer nobody waits for."""
        self._console.sendall(command.encode() + b"\n")

    def functions(self) -> list[dict[str, Any]]:
        """What proxyd tells of them."""
        status = call(self._directory / "proxyd.varlink", "org.iohub.Proxyd.Status")
        return list(status["functions"])

    def connected(self) -> int:
        return sum(function["connected"] for function in self.functions())

    def resamples(self) -> int:
        """How many EOIs remoted was told of."""
        status = call(self._directory / "remoted.varlink", "org.iohub.Remoted.Status")
        return sum(function["resamples"] for function in status["functions"])

    def close(self) -> None:
        self._stack.close()

    def _start(self, module: str, options: list[str]) -> Child:
        arguments = ["--name=vm", f"--runtime-dir={self._directory}", *options]
        child = Child(module, arguments, self._directory)
        self._stack.callback(child.kill)
        return child
