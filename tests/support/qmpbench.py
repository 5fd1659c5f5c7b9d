# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted, proxyd with ``--vm qmp:`` and a stock QEMU with the guest, started and ended by a test."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common.control import call
from common.ctl.children import Child
from common.ctl.guestconsole import Reply
from tests.support.fds import settled_fds
from tests.support.monitorclient import MonitorClient
from tests.support.qemu import QEMU
from tests.support.qemuguest import QemuGuest
from tests.support.wait import wait_until

EDU = ("edu", "id=edu0", "addr=05.0")
SERIAL = ("pci-serial", "id=com1", "addr=06.0")
RAM = ("-object", "memory-backend-memfd,id=ram0,size=64M,share=on")

_EJECT_BASE = 0xAE00
"""the registers of PIIX4's ACPI PCI hot-plug (QEMU's docs/specs/acpi_pci_hotplug.rst)"""
_DOWN, _EJECT, _SELECT = 0x4, 0x8, 0x10


class QmpBench:
    """One VM. The guest does no ACPI: eject() does for it what its tables would tell it to."""

    def __init__(
        self, directory: Path, *devices: Sequence[str], program: str = QEMU, accelerator: str = "kvm"
    ) -> None:
        """``devices``: model, id, addr and so on of each."""
        self.directory = directory
        self._program = program
        self._accelerator = accelerator
        self._devices = devices or (EDU, SERIAL)
        self._stack = ExitStack()
        self._remoted: Child | None = None
        self._proxyd: Child | None = None
        self._guest: QemuGuest | None = None

    def close(self) -> None:
        """Ends everything that still runs."""
        for child in (self._proxyd, self._remoted):
            if child is not None:
                child.kill()
        self._stack.close()
        if self._guest is not None:
            self._guest.close()

    @property
    def remoted(self) -> Child:
        """The one that was started last."""
        assert self._remoted is not None
        return self._remoted

    @property
    def proxyd(self) -> Child:
        """The one that was started last."""
        assert self._proxyd is not None
        return self._proxyd

    @property
    def guest(self) -> QemuGuest:
        """The one that was started last."""
        assert self._guest is not None
        return self._guest

    @property
    def monitor_path(self) -> Path:
        """proxyd's monitor."""
        return self.directory / "qmp"

    def start_remoted(self) -> None:
        options = [option for device in self._devices for option in ("--device", ",".join(device))]
        self._remoted = Child("remoted", [*self._common(), *options], self.directory)

    def start_proxyd(self, *options: str, module: str = "proxyd") -> None:
        """Returns when everything that can be plugged is plugged, or when it waits for QEMU.

        ``module`` is what runs as proxyd, and the name of its log.
        """
        ours = ("id=", "addr=", "transport=")
        devices = [
            option
            for device in self._devices
            for option in ("--device", ",".join(each for each in device if each.startswith(ours)))
        ]
        arguments = [*self._common(), "--vm", f"qmp:{self.monitor_path}", *devices, *options]
        self._proxyd = Child(module, arguments, self.directory, deadline=60.0)

    def start_proxyd_from(self, file: Path) -> None:
        """The same with the devices of a file."""
        self._proxyd = Child("proxyd", [*self._common(), f"--config={file}"], self.directory, deadline=60.0)

    def start_guest(self) -> MonitorClient:
        """The test's own monitor of it. One that was before is ended."""
        if self._guest is not None:
            self._guest.close()
        ours = self.directory / "qmp.test"
        arguments = [*RAM, "-qmp", f"unix:{self.monitor_path},server=on,wait=off"]
        self._guest = QemuGuest(
            [*arguments, "-qmp", f"unix:{ours},server=on,wait=off"],
            machine=",memory-backend=ram0",
            program=self._program,
            accelerator=self._accelerator,
        )
        return self._stack.enter_context(MonitorClient(ours))

    def command(self, line: str) -> Reply:
        """The guest's answer, which must be ok."""
        reply = self.guest.console.command(line, timeout=60.0)
        assert reply.ok, f"{line}: {reply.reason}, {reply.records}"
        return reply

    def run_guest(self, rounds: int = 8) -> None:
        """The guest sets up all functions; each of their interrupts must be served, and no others may come."""
        assert self.command("setup").result.number("functions") == len(self._devices)
        self.check_interrupts(rounds)

    def check_interrupts(self, rounds: int = 8) -> None:
        """The same, after a setup that was before."""
        before = self._counts()
        self.command(f"run {rounds} held 4")
        counts = {key: count - before[key] for key, count in self._counts().items()}
        expected = rounds * len(self._devices)
        assert counts.pop("vectors") <= 1  # KVM's own, beside QEMU's timer: see test_matrix
        assert counts == {"served": expected, "lost": 0, "redone": 0, "spurious": 0, "stuck": 0}

    def eject(self, *slots: int) -> None:
        """The guest lets slots go as soon as QEMU asks for all of them."""
        mask = sum(1 << slot for slot in slots)
        self.command(f"out 32 {_EJECT_BASE + _SELECT:#x} 0")
        wait_until(lambda: self._asked() & mask == mask, "QEMU asks the guest to eject")
        for slot in slots:
            self.command(f"out 32 {_EJECT_BASE + _EJECT:#x} {1 << slot:#x}")

    def asked_to_eject(self, slot: int) -> bool:
        """Whether QEMU has asked the guest to let a slot go."""
        self.command(f"out 32 {_EJECT_BASE + _SELECT:#x} 0")
        return bool(self._asked() >> slot & 1)

    def addresses(self) -> set[str]:
        """What the guest finds on its bus."""
        return {record.text("addr") for record in self.command("lspci").of_kind("pci")}

    def end_proxyd(self) -> int:
        """SIGTERM; the exit status, however long it takes."""
        self.proxyd.process.send_signal(signal.SIGTERM)
        return self.proxyd.process.wait(60.0)

    def unplug(self) -> None:
        """Ends a proxyd that was started with ``--unplug-on-exit``; the guest lets both slots go."""
        self.proxyd.process.send_signal(signal.SIGTERM)
        self.eject(5, 6)
        assert self.proxyd.process.wait(60.0) == 0

    def plug_and_unplug(self, monitor: MonitorClient, times: int) -> None:
        """Each time the guest uses what a new proxyd has plugged. No fd may stay open."""
        before = self.settled_fds()
        for _ in range(times):
            self.start_proxyd("--unplug-on-exit")
            self.run_guest(rounds=4)
            self.unplug()
            assert monitor.plugged() == {}
        assert self.settled_fds() == before

    def settled_fds(self) -> tuple[int, int]:
        """How many fds remoted and QEMU have open once they open and close none."""
        return settled_fds(self.remoted.process.pid), settled_fds(self.guest.pid)

    def log(self, name: str) -> str:
        """What ``proxyd``, ``remoted``, or a module that was started as one, has logged so far."""
        return (self.directory / f"{name}.log").read_text()

    def wait_log(self, name: str, text: str, count: int = 1) -> None:
        """Waits for a line that contains the text, or for so many of them."""
        wait_until(lambda: self.log(name).count(text) >= count, f"{text!r} in the log of {name}")

    def status(self, daemon: str) -> dict[str, dict[str, Any]]:
        """The functions by id, as the daemon's control socket tells."""
        interface = f"org.iohub.{daemon.capitalize()}"
        reply = call(self.directory / f"{daemon}.varlink", f"{interface}.Status")
        return {function["id"]: function for function in reply["functions"]}

    def wait_linked(self, times: int) -> None:
        """Waits until all functions are plugged and linked, each after having been replaced so many times."""
        expected = dict.fromkeys((device[1].removeprefix("id=") for device in self._devices), (True, times))
        wait_until(
            lambda: (
                {name: (f["connected"], f["reconnects"]) for name, f in self.status("proxyd").items()}
                == expected
            ),
            f"all functions are linked and were replaced {times} times",
        )

    def _asked(self) -> int:
        return self.command(f"in 32 {_EJECT_BASE + _DOWN:#x}").result.number("value")

    def _common(self) -> list[str]:
        return ["--name", "test", "--runtime-dir", str(self.directory)]

    def _counts(self) -> dict[str, int]:
        stats = self.command("stats")
        functions, irqs, (vectors,) = (
            stats.of_kind("function"),
            stats.of_kind("irq"),
            stats.of_kind("vectors"),
        )
        counts = {key: sum(f.number(key) for f in functions) for key in ("served", "lost", "redone")}
        counts |= {key: sum(irq.number(key) for irq in irqs) for key in ("spurious", "stuck")}
        counts["vectors"] = vectors.number("spurious7") + vectors.number("spurious15")
        return counts
