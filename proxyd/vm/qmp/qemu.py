# SPDX-License-Identifier: GPL-2.0-or-later
"""What the monitor tells of a running QEMU: whether devices can be plugged there, and what is plugged.

Paths and types are those of QEMU's object model (QOM), of the machine type ``pc`` where they have i440fx or pci.0.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from common.config import Transport
from common.errors import ProtocolError, UsageError
from proxyd.vm.qmp.monitor import CommandError, Monitor

__all__ = [
    "DRIVERS",
    "PROXY_DRIVER",
    "VFIO_USER_DRIVER",
    "Inventory",
    "check",
    "children",
    "drop_note",
    "has_flat_bus",
    "malformed",
    "note_request",
    "run_state",
    "shows_msix",
    "take_inventory",
]

PROXY_DRIVER = "x-pci-proxy-dev"
VFIO_USER_DRIVER = "vfio-user-pci"
DRIVERS = {Transport.MPQEMU: PROXY_DRIVER, Transport.VFIO_USER: VFIO_USER_DRIVER}
"""QEMU's device for each transport"""

_HOST_BRIDGE = "/machine/i440fx"
_BUS = f"{_HOST_BRIDGE}/pci.0"
_NOTE = "iohub-unplug-"
_MAX_WORDS = 200
_FD_BACKENDS = frozenset(f"child<memory-backend-{kind}>" for kind in ("memfd", "file", "shm"))


class Inventory(NamedTuple):
    """What is on bus 0, and what has an id."""

    drivers: dict[str, str]
    """by the id of -device or device_add"""
    devfns: dict[str, int]
    """by the same, for those on bus 0"""
    occupants: dict[int, str]
    """what to call a function of bus 0, by devfn"""
    asked: frozenset[str] = frozenset()
    """ids of what this daemon, or one before it, has told QEMU to unplug: see note_request()"""
    is_flat: bool = True
    """see has_flat_bus(); elsewhere each slot goes behind a PCI Express port: see proxyd.vm.qmp.ports"""


async def check(monitor: Monitor, transports: Collection[Transport]) -> str:
    """Raises UsageError, which says what to change, unless devices of these transports can work there.

    Returns who raises interrupts: ``kvm``, or ``qemu`` without KVM.
    """
    with malformed("its machine"):
        has_kvm = bool((await monitor.execute("query-kvm"))["enabled"])
        for transport in sorted(transports):
            await _check_driver(monitor, DRIVERS[transport])
        if Transport.MPQEMU in transports:
            await _check_proxies(monitor, has_kvm)
        await _check_ram(monitor, needs_fd=Transport.MPQEMU in transports)
        if await has_flat_bus(monitor):
            await _check_hot_plug(monitor)
    return "kvm" if has_kvm else "qemu"


async def has_flat_bus(monitor: Monitor) -> bool:
    """Whether the machine is a ``pc``, whose bus pci.0 takes devices at any address while it runs."""
    try:
        await monitor.execute("qom-list", path=_HOST_BRIDGE)
    except CommandError:
        return False
    return True


async def _check_driver(monitor: Monitor, driver: str) -> None:
    try:
        await monitor.execute("device-list-properties", typename=driver)
    except CommandError as error:
        reason = {
            PROXY_DRIVER: "use a QEMU that was configured with --enable-multiprocess",
            VFIO_USER_DRIVER: "use QEMU 10.1 or later, or devices with transport=mpqemu",
        }[driver]
        raise UsageError(f"it has no {driver}: {reason}") from error


async def _check_proxies(monitor: Monitor, has_kvm: bool) -> None:
    """What x-pci-proxy-dev needs besides."""
    if not has_kvm:
        raise UsageError("it runs without KVM: start it with -accel kvm")
    try:
        bridge = await children(monitor, _HOST_BRIDGE)
    except CommandError as error:
        raise UsageError("it has no PCI bus pci.0: start it with -machine pc") from error
    if bridge["ioapic"] != "child<kvm-ioapic>":
        raise UsageError(
            "its interrupt controllers are not all in the kernel: start it with -machine kernel-irqchip=on"
        )


async def _check_hot_plug(monitor: Monitor) -> None:
    handler = await monitor.execute("qom-get", path=_BUS, property="hotplug-handler")
    # The handler alone doesn't tell: QEMU 10.0 sets it with hot-plug off, too, 7.2 does not.
    if not handler or not await monitor.execute("qom-get", path=handler, property="acpi-root-pci-hotplug"):
        raise UsageError(
            "its PCI bus takes no devices while it runs: start it with -machine acpi=on and "
            "-global PIIX4_PM.acpi-root-pci-hotplug=on"
        )


async def take_inventory(monitor: Monitor) -> Inventory:
    """Asks what is plugged at present."""
    with malformed("its devices"):
        peripheral = await children(monitor, "/machine/peripheral")
        objects = await children(monitor, "/objects")
        inventory = Inventory(
            {name: _type(kind) for name, kind in peripheral.items() if name != "type"},
            {},
            {},
            frozenset(name.removeprefix(_NOTE) for name in objects if name.startswith(_NOTE)),
            await has_flat_bus(monitor),
        )
        for bus in await monitor.execute("query-pci"):
            for device in bus["devices"] if bus["bus"] == 0 else ():
                devfn = int(device["slot"]) << 3 | int(device["function"])
                name = str(device["qdev_id"])
                inventory.occupants[devfn] = name or str(
                    device["class_info"].get("desc", "a device without id")
                )
                if name:
                    inventory.devfns[name] = devfn
    return inventory


async def shows_msix(monitor: Monitor, name: str) -> bool:
    """Whether the guest sees MSI-X of a device. Raises CommandError if there is no such device."""
    with malformed("a device"):
        parts = await children(monitor, f"/machine/peripheral/{name}")
        return any(part.startswith("msix-table") for part in parts)


async def note_request(monitor: Monitor, name: str) -> bool:
    """Leaves a note in QEMU that a device is to be unplugged by this daemon's will. Returns whether it took it.

    The monitor tells neither that an unplug is pending nor who has asked for it. An object without a use stays as
    long as QEMU does, whatever becomes of this daemon and its files.
    """
    try:
        await monitor.execute("object-add", **{"qom-type": "secret", "id": f"{_NOTE}{name}", "data": ""})
    except CommandError:
        return False
    return True


async def drop_note(monitor: Monitor, name: str) -> None:
    """Removes the note."""
    with suppress(CommandError):
        await monitor.execute("object-del", id=f"{_NOTE}{name}")


async def run_state(execute: Callable[[str], Awaitable[Any]]) -> tuple[bool, str]:
    """Whether the guest's CPUs run, and QEMU's word for that (RunState in qapi/run-state.json).

    ``execute`` is the monitor's method for it. Raises what that raises, and ProtocolError.
    """
    with malformed("its state"):
        status = await execute("query-status")
        return bool(status["running"]), str(status["status"])


async def _check_ram(monitor: Monitor, *, needs_fd: bool) -> None:
    """RAM that has a file must be shared: QEMU hands fds of it to the devices, also of what it maps privately.

    With ``needs_fd`` all RAM must have a file, or proxies lose the devices' DMA; vfio-user does without it.

    Every backend is held to that: DIMMs and NUMA nodes have their own, -m without memory-backend= makes one. Where
    a file is the monitor doesn't tell: remoted refuses one that is neither on tmpfs nor on hugetlbfs.
    """
    types = await children(monitor, "/objects")
    for backend in await monitor.execute("query-memdev"):
        name = str(backend["id"])
        has_fd = types.get(name) in _FD_BACKENDS
        if needs_fd and not has_fd:
            size = int(backend["size"]) >> 20
            raise UsageError(
                f"its RAM {name!r} is anonymous, devices can't map it: start it with -object "
                f"memory-backend-memfd,id=ram0,size={size}M,share=on -machine memory-backend=ram0"
            )
        if has_fd and not backend["share"]:
            raise UsageError(
                f"its RAM {name!r} is private, devices would write to copies: add share=on to it"
            )


async def children(monitor: Monitor, path: str) -> dict[str, str]:
    """Names and types of the properties of an object. Raises CommandError."""
    return {str(entry["name"]): str(entry["type"]) for entry in await monitor.execute("qom-list", path=path)}


def _type(kind: str) -> str:
    return kind.removeprefix("child<").removesuffix(">")


@contextmanager
def malformed(what: str) -> Iterator[None]:
    """Turns what comes of an answer of another shape than QEMU's into a ProtocolError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        text = f"{error!r}"[:_MAX_WORDS]
        raise ProtocolError(f"QEMU's monitor gives an invalid answer about {what}: {text}") from error
