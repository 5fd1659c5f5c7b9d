# SPDX-License-Identifier: GPL-2.0-or-later
"""A remoted as a process that serves Probes over vfio-user, and what its clients see and leave behind."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from common import pci
from common.control import call
from common.ctl.children import Child
from tests.support.asleep import settled_log, wait_asleep
from tests.support.fds import count_fds
from tests.support.vfiouserclient import CONFIG_REGION, PATIENCE, VfioUserClient
from tests.support.wait import wait_until

PROBE = "tests.support.vfiouserdevice:Probe"
PINLESS = "tests.support.vfiouserdevice:Pinless"


PCI_CAPABILITY_LIST = 0x34
PCI_CAP_ID_MSI = 0x05
PCI_CAP_ID_MSIX = 0x11


class Event:
    """An eventfd of the client. A context manager, which closes it."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    def set(self, count: int = 1) -> None:
        """What KVM does at an EOI, or at several."""
        os.eventfd_write(self.fd, count)

    def take(self) -> int:
        """How often it was signalled since the last look."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def wait(self) -> int:
        """The same, once it was signalled at all."""
        assert select.select([self.fd], [], [], PATIENCE)[0], "it wasn't signalled"
        return self.take()


@contextmanager
def events(count: int) -> Iterator[list[Event]]:
    """So many eventfds."""
    made = [Event() for _ in range(count)]
    try:
        yield made
    finally:
        for event in made:
            event.close()


def fds_of(made: Iterable[Event]) -> list[int]:
    """Their numbers."""
    return [event.fd for event in made]


@contextmanager
def memory(size: int) -> Iterator[int]:
    """A memfd."""
    fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


class VfioUserServer:
    """One process that serves devices over vfio-user."""

    def __init__(
        self, directory: Path, devices: Mapping[str, str], slots: Iterable[int] = range(5, 32)
    ) -> None:
        """``devices``: models by id, and those at function 0 of these slots."""
        self._directory = directory
        self.addresses = {name: f"{slot:02x}.0" for slot, name in zip(slots, devices, strict=False)}
        """of the devices, by id"""
        options = [
            f"--device={model},id={name},addr={self.addresses[name]},transport=vfio-user"
            for name, model in devices.items()
        ]
        self.child = Child("remoted", ["--name=vm", f"--runtime-dir={directory}", *options], directory)
        self.pid = self.child.process.pid
        wait_asleep(self.pid)  # what its start needs is closed by then
        self.fds = count_fds(self.pid)
        """open without a client"""
        self.maps = self.count_maps()
        """mapped without a client"""

    def close(self) -> None:
        self.child.kill()

    def path(self, name: str) -> str:
        """Where a device listens."""
        return str(self._directory / f"{name}.sock")

    def connect(self, name: str) -> VfioUserClient:
        """A client that has yet to negotiate."""
        return VfioUserClient.connect(self.path(name))

    def negotiated(self, name: str) -> VfioUserClient:
        """A client that has negotiated, and reset the device."""
        client = self.connect(name)
        try:
            client.version()
            client.reset()
        except BaseException:
            client.close()
            raise
        return client

    def status(self, name: str) -> dict[str, Any]:
        """What the daemon says about a device."""
        functions = call(self._directory / "remoted.varlink", "org.iohub.Remoted.Status")["functions"]
        return next(dict(function) for function in functions if function["id"] == name)

    @property
    def log(self) -> str:
        return settled_log(self.child)

    def count_maps(self) -> int:
        """How many shared mappings it has: of guest RAM, BARs and its own state. Its heap is not counted."""
        lines = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        return sum(line.split()[1].endswith("s") for line in lines)

    def await_nothing_left(self) -> None:
        """Waits until it has open and mapped what it had before its first client."""
        assert self.child.process.poll() is None, self.child.last_line()
        wait_until(
            lambda: (count_fds(self.pid), self.count_maps()) == (self.fds, self.maps),
            f"remoted has {self.fds} fds open, not {count_fds(self.pid)}, "
            f"and {self.maps} mappings, not {self.count_maps()}",
        )

    def cpu_seconds(self) -> float:
        """How long it has run on a CPU: a clock that stands still while others have the CPU (clock_getres(2))."""
        return time.clock_gettime(~self.pid << 3 | 2)


def settle(client: VfioUserClient, unmask: Event | None = None) -> None:
    """Returns when the server has handled what was sent before, and what its unmask eventfd was signalled.

    It reads the eventfd in the same pass of its loop in which it acts upon it, so it has when it answers again.
    """
    if unmask is not None:
        wait_until(
            lambda: not select.select([unmask.fd], [], [], 0)[0], "the server reads the unmask eventfd"
        )
    client.read(CONFIG_REGION, 0, 2)


def find_capability(client: VfioUserClient, wanted: int) -> int:
    """Where a capability is in config space. Raises LookupError."""
    position = client.read(CONFIG_REGION, PCI_CAPABILITY_LIST, 1)
    while position:
        if client.read(CONFIG_REGION, position, 1) == wanted:
            return position
        position = client.read(CONFIG_REGION, position + 1, 1)
    raise LookupError(f"no capability {wanted:#x}")


def set_bus_master(client: VfioUserClient) -> None:
    """Lets the device access memory, to which messages belong, and keeps all else in the command register."""
    command = client.read(CONFIG_REGION, pci.PCI_COMMAND, 2)
    client.write(CONFIG_REGION, pci.PCI_COMMAND, command | pci.PCI_COMMAND_MASTER, 2)


def enable_msi(client: VfioUserClient, vectors: int = 1, enabled: bool = True) -> None:
    """What the guest writes to have MSI, with so many vectors (PCI 3.0, 6.8.1.3)."""
    set_bus_master(client)
    control = find_capability(client, PCI_CAP_ID_MSI) + 2
    value = client.read(CONFIG_REGION, control, 2) & ~0x71
    client.write(CONFIG_REGION, control, value | (vectors.bit_length() - 1) << 4 | enabled, 2)


def enable_msix(client: VfioUserClient, enabled: bool = True, masked: bool = False) -> None:
    """What the guest writes to have MSI-X, or to mask the whole function (PCI 3.0, 6.8.2.3)."""
    set_bus_master(client)
    control = find_capability(client, PCI_CAP_ID_MSIX) + 2
    value = client.read(CONFIG_REGION, control, 2) & 0x3FFF
    client.write(CONFIG_REGION, control, value | enabled << 15 | masked << 14, 2)


def chunks(sequence: Sequence[int], size: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Parts of that size and where each begins."""
    for start in range(0, len(sequence), size):
        yield start, sequence[start : start + size]
