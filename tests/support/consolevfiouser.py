# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU whose functions are a remoted's over vfio-user: with the guest, or with firmware that hammers one."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

from common.ctl.guestconsole import Record, Reply
from tests.support.monitorclient import MonitorClient
from tests.support.qemu import GUESTS, Qemu, build_guests, pc_machine
from tests.support.qemuguest import QemuGuest
from tests.support.vfiouserprocess import VfioUserServer
from tests.support.wait import wait_until

__all__ = ["RAM", "ConsoleGuest", "check_interrupts", "device_option", "device_properties", "start_hammer"]

RAM = ("-object", "memory-backend-memfd,id=ram,size=64M,share=on")
_BACKEND = ",memory-backend=ram"
_EJECT_BASE = 0xAE00
"""the registers of PIIX4's ACPI PCI hot-plug (QEMU's docs/specs/acpi_pci_hotplug.rst)"""
_DOWN, _EJECT, _SELECT = 0x4, 0x8, 0x10


def device_properties(server: VfioUserServer, name: str, **others: object) -> dict[str, Any]:
    """The arguments of device_add that plug a device of the server."""
    return {
        **others,
        "driver": "vfio-user-pci",
        "id": name,
        "addr": server.addresses[name],
        "socket": {"type": "unix", "path": server.path(name)},
        "x-msg-timeout": 60_000,
    }


def device_option(server: VfioUserServer, name: str, **others: object) -> list[str]:
    """The same as an option of QEMU."""
    return ["-device", json.dumps(device_properties(server, name, **others))]


class ConsoleGuest:
    """The guest, on a machine with 64 MiB, with all devices of a server."""

    def __init__(
        self,
        directory: Path,
        server: VfioUserServer,
        program: str,
        accelerator: str,
        seabios: bool = False,
        shares_ram: bool = True,
        **properties: object,
    ) -> None:
        """Boots it, its devices with these properties; ``monitor`` is a monitor of QEMU.

        If it doesn't share its RAM, it sends no file descriptors of it.
        """
        self.accelerator = accelerator
        self._server = server
        self._stack = ExitStack()
        path = directory / "qmp"
        path.unlink(missing_ok=True)
        arguments = [*(RAM if shares_ram else ()), "-qmp", f"unix:{path},server=on,wait=off"]
        for name in server.addresses:
            arguments += device_option(server, name, **properties)
        try:
            self.machine = self._stack.enter_context(
                QemuGuest(
                    arguments,
                    machine=_BACKEND if shares_ram else "",
                    seabios=seabios,
                    program=program,
                    accelerator=accelerator,
                )
            )
            self.console = self.machine.console
            self.monitor = self._stack.enter_context(MonitorClient(path))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ok(self, line: str) -> Reply:
        """The guest's answer, which must be ok."""
        reply = self.console.command(line, timeout=60.0)
        assert reply.ok, f"{line}: {reply.reason}, {reply.records}"
        return reply

    def functions(self) -> dict[str, Record]:
        """The guest's counters by address."""
        return {record.text("addr"): record for record in self.ok("stats").of_kind("function")}

    def unplug(self, *names: str) -> None:
        """Asks the guest to let devices go, which it does as its ACPI tables would tell it to."""
        for name in names:
            self.monitor.execute("device_del", id=name)
            slot = int(self._server.addresses[name].partition(".")[0], 16)
            self.ok(f"out 32 {_EJECT_BASE + _SELECT:#x} 0")
            wait_until(partial(self._is_asked_to_eject, slot), "QEMU asks the guest to eject")
            self.ok(f"out 32 {_EJECT_BASE + _EJECT:#x} {1 << slot:#x}")
            self.monitor.wait_event("DEVICE_DELETED", device=name)

    def plug(self, *names: str) -> None:
        """Plugs devices again."""
        for name in names:
            self.monitor.execute("device_add", **device_properties(self._server, name))

    def _is_asked_to_eject(self, slot: int) -> bool:
        return bool(self.ok(f"in 32 {_EJECT_BASE + _DOWN:#x}").result.number("value") >> slot & 1)


def check_interrupts(guest: ConsoleGuest, rounds: int, held: int = 0) -> None:
    """Each raise of each function is served once; with KVM no other interrupt comes, else no storm.

    Without KVM QEMU takes the line down at any access to the device, not at the EOI, and has it asserted again at
    once: the read that tells the handler why it was called is followed by one interrupt more.
    """
    guest.ok("setup")
    guest.ok(f"run {rounds}" + (f" held {rounds // held}" if held else ""))
    functions = guest.functions()
    for function in functions.values():
        counts = {key: function.number(key) for key in ("raised", "served", "lost", "redone", "held")}
        assert counts == {"raised": rounds, "served": rounds, "lost": 0, "redone": 0, "held": held}
    for irq in guest.ok("stats").of_kind("irq"):
        assert (irq.number("orphaned"), irq.number("stuck")) == (0, 0)
        if guest.accelerator == "kvm":
            assert irq.number("spurious") == 0
        else:
            assert irq.number("spurious") <= 2 * (rounds + held)


def start_hammer(server: VfioUserServer, name: str, program: str) -> Qemu:
    """A QEMU on KVM whose firmware raises, lowers and acknowledges the pci-serial at 05.0 without end."""
    build_guests()
    firmware = ["-bios", str(GUESTS / "hammer.bin")]
    return Qemu([*pc_machine(_BACKEND), *RAM, *firmware, *device_option(server, name)], program=program)
