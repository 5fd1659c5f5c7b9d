# SPDX-License-Identifier: GPL-2.0-or-later
"""Where devices go in a QEMU whose root bus takes none while it runs, as that of the machine type ``q35``.

Each slot of functions goes behind a PCI Express port of its own, which has one slot, number 0. The port is found
among those that have an id on QEMU's command line, and a bus of the same name.
"""

from __future__ import annotations

from typing import NamedTuple

from common.errors import IohubError
from common.pci import format_devfn
from proxyd.vm.qmp.monitor import CommandError, Monitor
from proxyd.vm.qmp.qemu import children, malformed

__all__ = ["NoPort", "Place", "choose_place", "find_place"]

_PORTS = frozenset(f"child<{kind}>" for kind in ("pcie-root-port", "ioh3420", "xio3130-downstream"))
_PERIPHERAL = "/machine/peripheral"
_FLAT_BUS = "pci.0"


class NoPort(IohubError):
    """Every port has a device."""


class Place(NamedTuple):
    """Where a function is, or goes."""

    bus: str
    """QEMU's name of the bus"""
    devfn: int
    """the function's on that bus"""

    @property
    def addr(self) -> str:
        """As device_add takes it."""
        return format_devfn(self.devfn)

    def __str__(self) -> str:
        return self.addr if self.bus == _FLAT_BUS else f"{self.addr} of {self.bus}"


async def choose_place(monitor: Monitor, devfn: int, sibling: str | None, *, is_flat: bool) -> Place:
    """Where a function of this devfn goes; with ``sibling``, a function of its slot that is plugged, beside that.

    Raises NoPort.
    """
    if is_flat:
        return Place(_FLAT_BUS, devfn)
    if sibling is not None:
        return Place((await find_place(monitor, sibling)).bus, devfn & 7)
    with malformed("its PCI Express ports"):
        for name, kind in sorted((await children(monitor, _PERIPHERAL)).items()):
            if kind in _PORTS and await _is_free(monitor, f"{_PERIPHERAL}/{name}/{name}"):
                return Place(name, devfn & 7)
    raise NoPort(
        "no PCI Express port is free: start QEMU with -device pcie-root-port,id=rp1,chassis=1 and so on, one for "
        "each slot of devices"
    )


async def find_place(monitor: Monitor, name: str) -> Place:
    """Where the device of this id is. Raises CommandError if there is none."""
    path = f"{_PERIPHERAL}/{name}"
    with malformed("a device's place"):
        bus = str(await monitor.execute("qom-get", path=path, property="parent_bus"))
        devfn = int(await monitor.execute("qom-get", path=path, property="addr"))
        return Place(bus.rpartition("/")[2], devfn)


async def _is_free(monitor: Monitor, bus: str) -> bool:
    try:
        if not await monitor.execute("qom-get", path=bus, property="hotplug-handler"):
            return False
        return not any(name.startswith("child[") for name in await children(monitor, bus))
    except CommandError:
        return False
