# SPDX-License-Identifier: GPL-2.0-or-later
"""One remoted with many functions: what idle ones cost a busy one, and what busy ones cost each other."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from common import mpqemu
from common.mpqemu import Command
from common.pci import format_devfn
from tests.bench.candidates import process_cpu_seconds, remoted_command
from tests.support.checkout import ROOT

__all__ = ["ManyFunctions", "measure_functions"]

_REQUEST = mpqemu.request_frame(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0, 0, 4))
_REPLY_SIZE = mpqemu.HEADER.size + mpqemu.RET.size


class ManyFunctions:
    """A remoted with so many pci-serial, each with a link."""

    def __init__(self, count: int, directory: Path, *options: str) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        self.links = [ours for ours, _ in pairs]
        devices = [
            f"--device=pci-serial,id=serial{devfn},addr={format_devfn(devfn)},fd={theirs.fileno()}"
            for devfn, (_, theirs) in enumerate(pairs)
        ]
        command = remoted_command(directory, *options, *devices)
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno() for _, theirs in pairs],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        for _, theirs in pairs:
            theirs.close()
        self.exchange(self.links[:1])
        self.first_answer = time.perf_counter() - begin
        """seconds from before the process is made; all functions are there by then"""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        for link in self.links:
            link.close()

    def pin(self, cpu: int) -> None:
        """Lets all its threads run on this CPU only."""
        for task in os.listdir(f"/proc/{self.process.pid}/task"):
            os.sched_setaffinity(int(task), {cpu})

    @staticmethod
    def exchange(links: Sequence[socket.socket]) -> float:
        """Seconds for a config read over each link: all are asked before the first answer is read."""
        begin = time.perf_counter()
        for link in links:
            link.send(_REQUEST)
        for link in links:
            link.recv(_REPLY_SIZE, socket.MSG_WAITALL)
        return time.perf_counter() - begin


def measure_functions(counts: Sequence[int], rounds: int, directory: Path) -> dict[int, dict[str, float]]:
    """By the number of functions: ms to the first answer, and what a config read takes in us.

    ``one busy`` is the median for one function while all others are idle. ``all busy`` is the CPU time of remoted
    for each request while all have one at the same time; without polling, whose time depends on the client's.
    """
    cpus = sorted(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpus[0]})
    try:
        return {count: _measure(count, cpus[-1], rounds, directory) for count in counts}
    finally:
        os.sched_setaffinity(0, before)


def _measure(count: int, cpu: int, rounds: int, directory: Path) -> dict[str, float]:
    with ManyFunctions(count, directory) as remoted:
        remoted.pin(cpu)
        one = [remoted.exchange(remoted.links[-1:]) for _ in range(2000 * rounds)]
        first_answer = remoted.first_answer
    return {
        "first answer": first_answer * 1000,
        "one busy": statistics.median(one) * 1e6,
        "all busy": statistics.median(_busy_seconds(count, cpu, directory) for _ in range(rounds)) * 1e6,
    }


def _busy_seconds(count: int, cpu: int, directory: Path) -> float:
    """CPU time of a request, in a process of its own: where its memory lies makes a difference."""
    with ManyFunctions(count, directory, "--poll-max-us=0") as remoted:
        remoted.pin(cpu)
        before = process_cpu_seconds(remoted.process.pid)
        requests = 0
        while requests < 20_000:
            remoted.exchange(remoted.links)
            requests += count
        return (process_cpu_seconds(remoted.process.pid) - before) / requests
