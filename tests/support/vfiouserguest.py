# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest whose devices are a remoted's, over vfio-user."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.control import call
from common.ctl.children import Child
from tests.support.linuxguest import LinuxGuest
from tests.support.monitorclient import Monitor

__all__ = ["PORT", "VfioUserGuest", "serving"]

PORT = {"bus": "port0", "addr": "0"}
"""the place on the guest's PCI Express root port, for devices that are plugged while it runs"""
_PORT_OPTIONS = ["-device", "pcie-root-port,id=port0,chassis=1,addr=02.0"]


@contextmanager
def serving(directory: Path, *devices: str) -> Iterator[Child]:
    """A remoted with these devices, each what follows --device, on vfio-user.

    AssertionError at the end if a device's code has raised, or a client's message was rejected.
    """
    options = [f"--device={device},transport=vfio-user" for device in devices]
    remoted = Child("remoted", ["--name=vm", f"--runtime-dir={directory}", *options], directory)
    try:
        yield remoted
        for function in call(directory / "remoted.varlink", "org.iohub.Remoted.Status")["functions"]:
            assert (function["errors"], function["rejected"]) == (0, 0), function
    finally:
        remoted.kill()


class VfioUserGuest(LinuxGuest):
    """A guest with a PCI Express root port, and ``monitor``, its QEMU's; another one listens at ``qmp.sock``."""

    def __init__(
        self,
        qemu: str,
        directory: Path,
        devices: Mapping[str, Mapping[str, str]],
        cpus: int = 1,
        kernel_options: str = "",
    ) -> None:
        """The directory is remoted's; each device has an id and a place, ``addr`` and perhaps ``bus``."""
        self._directory = directory
        args = [
            *_PORT_OPTIONS,
            "-qmp",
            "chardev:qmp",
            "-qmp",
            f"unix:{directory}/qmp.sock,server=on,wait=off",
        ]
        for name, place in devices.items():
            args += ["-device", json.dumps(self._properties(name, place))]
        super().__init__(args, program=qemu, cpus=cpus, channels=("qmp",), kernel_options=kernel_options)
        with self._starting() as owned:
            self.monitor = owned.enter_context(Monitor(self.channels["qmp"]))

    def plug(self, name: str, place: Mapping[str, str]) -> None:
        """Plugs a device while the guest runs."""
        self.monitor.execute("device_add", **self._properties(name, place))

    def unplug(self, name: str) -> None:
        """Asks the guest to let a device go, and waits until QEMU has removed it."""
        self.monitor.execute("device_del", id=name)
        self.monitor.wait_event("DEVICE_DELETED", device=name)

    def complaints(self, *words: str) -> list[str]:
        """The kernel's warnings and errors with one of these words."""
        lines = self.run("dmesg -r | grep '^<[0-4]>' || true").splitlines()
        return [line for line in lines if any(word in line for word in words)]

    def _properties(self, name: str, place: Mapping[str, str]) -> dict[str, Any]:
        socket = {"type": "unix", "path": str(self._directory / f"{name}.sock")}
        return {"driver": "vfio-user-pci", "id": name, "socket": socket, **place}
