# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM's side: proxyd's embedded VM beside stock QEMU's proxy, with one guest and remoted; and its Client."""

from __future__ import annotations

import os
import socket
import statistics
import time
from contextlib import closing
from pathlib import Path

from common import mpqemu
from common.disposal import Disposal
from common.link import Client
from common.mpqemu import Command
from tests.bench.candidates import Candidate, Remote
from tests.bench.exchanges import exchange_times
from tests.support.matrix import OURS, STOCK, Cell

__all__ = ["measure_client", "raise_to_handler"]

_ADDR = "05.0"
_INTERRUPTS = 500
_NAMES = {OURS: "proxyd", STOCK: "QEMU's proxy"}


def raise_to_handler(rounds: int, directory: Path) -> dict[str, float]:
    """By proxy, median cycles from the guest's write that raises to its handler, with remoted behind either.

    That is the exit to the proxy, its request, remoted's irqfd, and what the guest needs to take the interrupt.
    """
    medians: dict[str, list[float]] = {name: [] for name in _NAMES.values()}
    for number in range(rounds):
        for proxy, name in _NAMES.items():
            own = directory / f"{proxy}{number}"
            own.mkdir()
            with closing(Cell(own, proxy, OURS)) as cell:
                cell.ok("setup")
                cell.ok(f"run {_INTERRUPTS}")
                records = cell.ok(f"samples {_ADDR}").of_kind("raise_to_handler")
                samples = [int(value, 16) for each in records for value in each.text("tsc").split(",")]
                medians[name].append(statistics.median(samples))
    return {name: statistics.median(values) for name, values in medians.items()}


def measure_client(candidate: Candidate, rounds: int, count: int, directory: Path) -> dict[str, float]:
    """Microseconds of a config read (p50): by common.link.Client, and by the C client, in turns."""
    times: dict[str, list[float]] = {"Client": [], "C client": []}
    with Remote(candidate, directory) as remote:
        copy = socket.socket(fileno=os.dup(remote.link.fileno()))
        client = Client(copy, 20.0, Disposal())
        payload = mpqemu.CONFIG.pack(0, 0, 4)
        for _ in range(rounds):
            own = []
            remote.link.setblocking(False)  # of the shared description
            for _ in range(count):
                begin = time.perf_counter()
                client.request(Command.PCI_CFGREAD, payload)
                own.append(time.perf_counter() - begin)
            remote.link.setblocking(True)
            times["Client"].append(statistics.median(own) * 1e6)
            theirs = exchange_times(remote, "config-read", 200, count, -1)
            times["C client"].append(statistics.median(theirs) / 1000)
        client.close_own_copy()
    return {name: statistics.median(values) for name, values in times.items()}
