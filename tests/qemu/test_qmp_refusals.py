# SPDX-License-Identifier: GPL-2.0-or-later
"""What a QEMU must be for proxyd to serve it; otherwise one line says what to change, and nothing is plugged."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.monitorclient import MonitorClient
from tests.support.qemu import PATIENCE, QEMU, Qemu, newer_qemu
from tests.support.qmpbench import RAM

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")

GOOD = ("-accel", "kvm", *RAM, "-machine", "memory-backend=ram0")
NO_IRQCHIP = ("-machine", "kernel-irqchip=off", "-cpu", "qemu64,-apic")
"""a newer QEMU has no APIC of its own beside KVM, and refuses to start unless told to have none"""


def run_proxyd(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A proxyd that ends by itself."""
    command = [sys.executable, "-m", "proxyd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def refuse(directory: Path, qemu: Sequence[str], *devices: str, program: str = QEMU) -> str:
    """Starts a stopped QEMU and a proxyd for it; the one line that proxyd says before it ends with status 2."""
    path = directory / "qmp"
    arguments = ["--name", "test", "--runtime-dir", str(directory), "--vm", f"qmp:{path}"]
    arguments += [f"--device={device}" for device in devices or ("id=dev0,addr=05.0",)]
    options = [
        *("-S", "-nodefaults", "-display", "none", "-m", "64", *qemu),
        *("-qmp", f"unix:{path},server=on,wait=off", "-qmp", f"unix:{path}.test,server=on,wait=off"),
    ]
    with Qemu(options, program=program) as process, MonitorClient(directory / "qmp.test") as monitor:
        before = monitor.plugged()
        ended = run_proxyd(arguments)
        assert monitor.plugged() == before
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    match = re.fullmatch(rf"iohub-proxyd: \S+\[{process.pid}\] at {path}: (.*)", line)
    assert match is not None, line
    return match[1]


@pytest.mark.parametrize(
    ("qemu", "change"),
    [
        (("-accel", "tcg", *GOOD[2:]), "start it with -accel kvm"),
        ((*GOOD, "-machine", "kernel-irqchip=split"), "start it with -machine kernel-irqchip=on"),
        ((*GOOD, *NO_IRQCHIP), "start it with -machine kernel-irqchip=on"),
        ((*GOOD, "-machine", "q35"), "start it with -machine pc"),
        ((*GOOD, "-machine", "isapc"), "start it with -machine pc"),
        (
            (*GOOD, "-global", "PIIX4_PM.acpi-root-pci-hotplug=off"),
            "start it with -machine acpi=on and -global PIIX4_PM.acpi-root-pci-hotplug=on",
        ),
        (
            ("-accel", "kvm"),
            "start it with -object memory-backend-memfd,id=ram0,size=64M,share=on -machine memory-backend=ram0",
        ),
        (
            ("-accel", "kvm", *RAM),
            "start it with -object memory-backend-memfd,id=ram0,size=64M,share=on -machine memory-backend=ram0",
        ),
        (
            (*GOOD, "-object", "memory-backend-memfd,id=dimm0,size=64M,share=off"),
            "its RAM 'dimm0' is private, devices would write to copies: add share=on to it",
        ),
    ],
)
def test_says_what_to_change_on_the_command_line(tmp_path: Path, qemu: Sequence[str], change: str) -> None:
    assert refuse(tmp_path, qemu).endswith(change)


def test_a_qemu_without_vfio_user_is_refused(tmp_path: Path) -> None:
    if newer_qemu() == QEMU:
        pytest.skip("the system's QEMU has vfio-user-pci")
    reason = "it has no vfio-user-pci: use QEMU 10.1 or later, or devices with transport=mpqemu"
    assert refuse(tmp_path, GOOD, "id=dev0,addr=05.0", "id=dev1,addr=06.0,transport=vfio-user") == reason


def test_private_ram_is_refused_for_vfio_user_as_well(tmp_path: Path, vfio_user_qemu: str) -> None:
    """QEMU sends its fd, and the device would use other pages than the guest."""
    private = (*GOOD, "-object", "memory-backend-memfd,id=dimm0,size=64M,share=off")
    reason = refuse(tmp_path, private, "id=dev0,addr=05.0,transport=vfio-user", program=vfio_user_qemu)
    assert reason == "its RAM 'dimm0' is private, devices would write to copies: add share=on to it"


def test_a_machine_without_acpi_takes_no_devices(tmp_path: Path) -> None:
    assert "start it with -machine acpi=on" in refuse(tmp_path, (*GOOD, "-machine", "acpi=off"))


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("id=dev0,addr=07.0", "device dev0: 07.0 is taken by net7: choose another addr=, such as 04.0"),
        (
            "id=dev0,addr=08.0",
            "device dev0: 08.0 is taken by Ethernet controller: choose another addr=, such as 04.0",
        ),
        ("id=net7,addr=05.0", "device net7: it has a rtl8139 of that id: choose another id="),
    ],
)
def test_ids_and_addresses_of_other_devices_are_theirs(tmp_path: Path, device: str, reason: str) -> None:
    others = [
        word
        for properties in ("addr=2", "id=net7,addr=7", "addr=8")
        for word in ("-device", f"rtl8139,{properties},romfile=")
    ]
    assert refuse(tmp_path, (*GOOD, *others), device, "id=dev1,addr=03.0") == reason


def test_qemu_can_not_have_every_id(tmp_path: Path) -> None:
    arguments = ["--name", "test", "--runtime-dir", str(tmp_path), "--vm", "qmp:/none", "--device", "id=0dev"]
    ended = run_proxyd(arguments)
    assert ended.returncode == 2
    assert ended.stderr == "iohub-proxyd: device 0dev: an id in QEMU begins with a letter\n"
