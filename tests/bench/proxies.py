# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM's side: proxyd's embedded VM beside stock QEMU's proxy, with one guest and remoted; and its Client."""

from __future__ import annotations

import os
import socket
import statistics
import time
from contextlib import ExitStack, closing
from pathlib import Path

from common import mpqemu
from common.disposal import Disposal
from common.link import Client
from common.mpqemu import Command
from common.options import DEFAULT_POLL_US
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
    """Microseconds of a config read (p50), by common.link.Client as proxyd has it, and others in turns with it."""
    times: dict[str, list[float]] = {"Client": [], "Client, polling off": [], "C client": []}
    with Remote(candidate, directory) as remote, ExitStack() as stack:
        clients = []
        for limit in (DEFAULT_POLL_US / 1e6, 0.0):
            copy = socket.socket(fileno=os.dup(remote.link.fileno()))
            clients.append(Client(copy, 20.0, Disposal(), poll_limit=limit))
            stack.callback(clients[-1].close_own_copy)
        for _ in range(rounds):
            remote.link.setblocking(False)  # of the shared description
            for name, client in zip(times, clients, strict=False):
                times[name].append(_median_of_requests(client, count))
            remote.link.setblocking(True)
            theirs = exchange_times(remote, "config-read", 200, count, -1)
            times["C client"].append(statistics.median(theirs) / 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def _median_of_requests(client: Client, count: int) -> float:
    payload = mpqemu.CONFIG.pack(0, 0, 4)
    own = []
    for _ in range(count):
        begin = time.perf_counter()
        client.request(Command.PCI_CFGREAD, payload)
        own.append(time.perf_counter() - begin)
    return statistics.median(own) * 1e6
