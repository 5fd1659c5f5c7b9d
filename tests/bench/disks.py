# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk in a Linux guest under TCG: the model nvme over vfio-user beside the nvme of QEMU's own process."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.linuxguest import LinuxGuest, build
from tests.support.qemu import newer_qemu
from tests.support.vfiouserguest import PORT, VfioUserGuest, serving

__all__ = ["WORKLOADS", "is_measurable", "measure_disks"]

IN_PROCESS = "in QEMU itself"
OWN = "vfio-user"
WORKLOADS = {
    "4 KiB random reads, depth 1": (4096, 1, "random"),
    "4 KiB random reads, depth 32": (4096, 32, "random"),
    "1 MiB sequential reads, depth 4": (1 << 20, 4, "sequential"),
}
"""block in bytes, depth and order; the last one is a MiB a read, so that its figure is MiB/s"""

_DISK = "/dev/nvme0n1"
_IMAGE_SIZE = 64 << 20
_CPUS = 2


def is_measurable() -> bool:
    """Whether there are a QEMU that has vfio-user-pci and a Linux guest."""
    return newer_qemu() is not None and build()


def measure_disks(rounds: int, seconds: float, directory: Path) -> dict[str, dict[str, float]]:
    """Reads a second by workload and disk; medians of the rounds, in which the disks take turns."""
    image = directory / "disk.img"
    image.write_bytes(os.urandom(_IMAGE_SIZE))
    found: dict[str, dict[str, list[float]]] = {workload: {IN_PROCESS: [], OWN: []} for workload in WORKLOADS}
    starts = {IN_PROCESS: _in_process, OWN: _served}
    for number in range(rounds):
        for name in sorted(starts, reverse=bool(number % 2)):
            with starts[name](image) as guest:
                guest.run(f"until test -b {_DISK}; do usleep 10000; done")
                for workload, (block, depth, order) in WORKLOADS.items():
                    printed = guest.run(f"diskbench {_DISK} {block} {depth} {seconds} {order}")
                    found[workload][name].append(float(printed))
    return {
        workload: {name: statistics.median(values) for name, values in by_name.items()}
        for workload, by_name in found.items()
    }


@contextmanager
def _in_process(image: Path) -> Iterator[LinuxGuest]:
    drive = f"if=none,id=image,format=raw,file={image}"
    options = ["-drive", drive, "-device", "nvme,serial=disk0,drive=image,addr=05.0"]
    with LinuxGuest(options, program=_program(), cpus=_CPUS) as guest:
        yield guest


@contextmanager
def _served(image: Path) -> Iterator[LinuxGuest]:
    device = f"nvme,id=disk0,addr=05.0,drive=file:{image}"
    with (
        serving(image.parent, device),
        VfioUserGuest(_program(), image.parent, {"disk0": PORT}, _CPUS) as guest,
    ):
        yield guest


def _program() -> str:
    program = newer_qemu()
    assert program is not None
    return program
