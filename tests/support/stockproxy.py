# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock QEMU whose proxies are linked to a remoted: with the guest, or with firmware that hammers a device."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.control import call
from common.ctl.children import Child
from common.ctl.guestconsole import Record, Reply
from common.link import Client
from common.mpqemu import CONFIG, Command
from tests.support.asleep import settled_log
from tests.support.fds import count_fds
from tests.support.monitorclient import MonitorClient
from tests.support.qemu import GUESTS, Qemu, build_guests, pc_machine
from tests.support.qemuguest import QemuGuest

__all__ = ["HAMMER_ADDR", "Remoted", "StockGuest", "start_hammer"]

HAMMER_ADDR = "05.0"

_DEADLINE = 20.0
_BACKEND = ",memory-backend=ram"
_RAM = ("-object", "memory-backend-memfd,id=ram,size=64M,share=on")


class Remoted:
    """A remoted as a process, with its sockets in a directory."""

    def __init__(self, directory: Path, devices: dict[str, str]) -> None:
        """``devices``: the model of each, by its address, which is its id too."""
        self._directory = directory
        self.devices = devices
        options = [f"--device={model},id={_id(addr)},addr={addr}" for addr, model in devices.items()]
        arguments = ["--name=test", f"--runtime-dir={directory}", *options]
        self.child = Child("remoted", arguments, directory)

    def connect(self, addr: str) -> Client:
        """A client of one device."""
        return Client.connect(str(self._directory / f"{_id(addr)}.sock"), _DEADLINE)

    def status(self, addr: str) -> dict[str, Any]:
        """What it says about one device."""
        functions = call(self._directory / "remoted.varlink", "org.iohub.Remoted.Status")["functions"]
        return next(dict(function) for function in functions if function["addr"] == addr)

    def count_idle_fds(self, addr: str) -> int:
        """How many fds it has open besides the link of the client that asks.

        Whoever has gone before is gone by then: the second request is answered when the pass of the loop that
        had the first one is over.
        """
        client = self.connect(addr)
        try:
            for _ in range(2):
                client.request(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
            return count_fds(self.child.process.pid) - 1
        finally:
            client.close()

    @property
    def log(self) -> str:
        return settled_log(self.child)


class StockGuest:
    """The guest, on a machine with 64 MiB, whose functions are a remoted's."""

    def __init__(self, directory: Path, remoted: Remoted, seabios: bool = False) -> None:
        """Boots it; ``monitor`` is a monitor of QEMU."""
        self._stack = ExitStack()
        path = directory / "qmp"
        path.unlink(missing_ok=True)
        arguments = [*_RAM, "-qmp", f"unix:{path},server=on,wait=off"]
        with ExitStack() as links:
            fds = []
            for addr in remoted.devices:
                link = remoted.connect(addr)
                links.callback(link.close_own_copy)
                fds.append(link.fileno())
                arguments += ["-device", f"x-pci-proxy-dev,addr={addr},fd={link.fileno()}"]
            self.machine = self._stack.enter_context(QemuGuest(arguments, fds, _BACKEND, seabios))
        self.console = self.machine.console
        self.monitor = self._stack.enter_context(MonitorClient(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def ok(self, line: str) -> Reply:
        """The guest's answer, which must be ok."""
        reply = self.console.command(line, timeout=60.0)
        assert reply.ok, f"{line}: {reply.reason}, {reply.records}"
        return reply

    def value(self, line: str) -> int:
        """The value that the guest has read."""
        return self.ok(line).result.number("value")

    def functions(self) -> dict[str, Record]:
        """The guest's counters by address."""
        return {record.text("addr"): record for record in self.ok("stats").of_kind("function")}


def start_hammer(remoted: Remoted, *args: str) -> Qemu:
    """A QEMU whose firmware raises, lowers and acknowledges the pci-serial at HAMMER_ADDR without end."""
    build_guests()
    link = remoted.connect(HAMMER_ADDR)
    try:
        return Qemu(
            [
                *(*pc_machine(_BACKEND), *_RAM, "-bios", str(GUESTS / "hammer.bin")),
                *("-device", f"x-pci-proxy-dev,addr={HAMMER_ADDR},fd={link.fileno()}", *args),
            ],
            [link.fileno()],
        )
    finally:
        link.close_own_copy()


def _id(addr: str) -> str:
    return "dev" + addr.replace(".", "-")
