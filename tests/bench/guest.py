# SPDX-License-Identifier: GPL-2.0-or-later
"""Port reads and interrupts of a guest in stock QEMU, in CPU cycles, with its pci-serial in several places."""

from __future__ import annotations

import socket
import statistics
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from common.config import Transport
from tests.bench.candidates import Candidate, start_process
from tests.support.consolevfiouser import device_option
from tests.support.qemu import GUESTS, PATIENCE, QEMU, Qemu, build_guests, pc_machine
from tests.support.vfiouserprocess import VfioUserServer

__all__ = ["IN_PROCESS", "KINDS", "run_guests"]

IN_PROCESS = "in QEMU itself"
KINDS = {"P": "port read", "I": "interrupt round trip"}
"""what guests/cycles.S reports, by its letter"""

_ADDR = "05.0"
_BATCH = 256
_REPORT = struct.Struct("<cI")
_WARMUP = 4
"""reports of each kind that aren't counted"""


def run_guests(
    candidates: Sequence[Candidate], rounds: int, reports: int, directory: Path, program: str = QEMU
) -> dict[str, dict[str, float]]:
    """Mean cycles by kind and candidate: in each round a guest of each, in turns, and the median of the rounds."""
    build_guests()
    names = [IN_PROCESS, *(candidate.name for candidate in candidates)]
    means: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in names} for kind in KINDS.values()}
    for number in range(rounds):
        order = [None, *candidates]
        for candidate in (*order[number % len(order) :], *order[: number % len(order)]):
            for kind, mean in _run_one(candidate, reports, directory, program).items():
                means[kind][IN_PROCESS if candidate is None else candidate.name].append(mean)
    return {
        kind: {name: statistics.median(rounds) for name, rounds in by_name.items()}
        for kind, by_name in means.items()
    }


def _run_one(candidate: Candidate | None, reports: int, directory: Path, program: str) -> dict[str, float]:
    """Mean cycles by kind, of one guest; None stands for the device in QEMU itself."""
    with ExitStack() as stack:
        pass_fds = []
        if candidate is None:
            device = ["-chardev", "null,id=null", "-device", f"pci-serial,addr={_ADDR},chardev=null"]
        elif candidate.transport is Transport.VFIO_USER:
            server = VfioUserServer(directory, {"serial0": "pci-serial"})
            stack.callback(server.close)
            device = device_option(server, "serial0")
        else:
            process, ours = start_process(candidate, directory)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            stack.enter_context(ours)
            device = ["-device", f"x-pci-proxy-dev,addr={_ADDR},fd={ours.fileno()}"]
            pass_fds.append(ours.fileno())
        qemu = Qemu(
            [
                *pc_machine(",memory-backend=ram"),
                *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
                *("-bios", str(GUESTS / "cycles.bin")),
                *("-device", "isa-debugcon,iobase=0xe9,chardev=reports", *device),
            ],
            pass_fds,
            channels=("reports",),
            program=program,
        )
        stack.enter_context(qemu)
        return _read(qemu.channels["reports"], reports)


def _read(channel: socket.socket, reports: int) -> dict[str, float]:
    channel.settimeout(PATIENCE)
    totals: dict[str, list[int]] = {kind: [] for kind in KINDS.values()}
    with channel.makefile("rb") as stream:
        for _ in range(len(KINDS) * (_WARMUP + reports)):
            letter, cycles = _REPORT.unpack(stream.read(_REPORT.size))
            totals[KINDS[letter.decode()]].append(cycles)
    return {kind: statistics.fmean(cycles[_WARMUP:]) / _BATCH for kind, cycles in totals.items()}
