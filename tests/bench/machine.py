# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine that a benchmark ran on, and what else it did meanwhile."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

from tests.bench.candidates import QEMU, cpu_seconds

__all__ = ["OtherLoad", "describe"]

_TICK = os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, str]:
    """CPU, kernel and versions, each in words."""
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
            break
    cpus = len(os.sched_getaffinity(0))
    virtual = "hypervisor" in Path("/proc/cpuinfo").read_text()
    return {
        "machine": f"{model}, {cpus} CPUs" + (", itself a VM" if virtual else ""),
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "QEMU": _qemu_version(),
    }


class OtherLoad:
    """The CPU time that others have used since it was made; to be asked when the measured processes have ended."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._busy, self._stolen = _busy_seconds()
        self._own = cpu_seconds()

    def describe(self) -> str:
        """In CPUs, as a mean since the beginning."""
        elapsed = time.monotonic() - self._begin
        busy, stolen = _busy_seconds()
        stolen -= self._stolen
        other = busy - self._busy - (cpu_seconds() - self._own) - stolen
        return f"{max(0.0, other) / elapsed:.2f} CPUs used by others, {stolen / elapsed:.2f} by the host"


def _busy_seconds() -> tuple[float, float]:
    """CPU time of all processes and interrupts, and of it what the hypervisor gave to others (proc(5), stat)."""
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / _TICK, steal / _TICK


def _qemu_version() -> str:
    if not shutil.which(QEMU):
        return "none"
    text = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return text.splitlines()[0].removeprefix("QEMU emulator version ")
