# SPDX-License-Identifier: GPL-2.0-or-later
"""``make bench``: round trips of remoted beside those of QEMU's C remote process, in one run.

Two figures each, of a pci-serial: a config read over the link, and the echo of a resample (resamplefd written,
irqfd readable) while the line is high. The two sides take turns in batches, so that a machine that is busy for
a while is busy for both; the ratio of the medians is what counts.

Below them, without a peer, for how long ``--vm pid:PID`` makes a QEMU stand still.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from common import mpqemu, pci
from common.disposal import Disposal
from common.link import Client
from common.mpqemu import Command
from tests.bench.stop import stops

QEMU = "qemu-system-x86_64"
_IO_BASE = 0xC000
_IER = 1
_IER_THRI = 0x02
_QEMU_RESET_SECONDS = 0.3
"""QEMU's remote answers before its initial machine reset is over, which forgets BARs"""


class Side(NamedTuple):
    """One remote process, with a pci-serial whose line is high."""

    name: str
    process: subprocess.Popen[bytes]
    sock: socket.socket
    irqfd: int
    resamplefd: int


def start(name: str, command: Callable[[int], list[str]], settle: float) -> Side:
    """Starts a remote on an inherited socket and lets its line rise."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        command(theirs.fileno()), pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL
    )
    theirs.close()
    client = Client(socket.socket(fileno=os.dup(ours.fileno())), 20.0, Disposal())
    client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0, 0, 4))
    time.sleep(settle)  # noqa: TID251 - nothing tells when QEMU's own reset is over
    irqfd, resamplefd = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
    client.send(Command.SET_IRQFD, fds=(irqfd, resamplefd))
    client.request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(pci.PCI_BASE_ADDRESS_0, _IO_BASE, 4))
    client.request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(pci.PCI_COMMAND, pci.PCI_COMMAND_IO, 2))
    client.request(Command.BAR_WRITE, mpqemu.BAR.pack(_IO_BASE + _IER, _IER_THRI, 1, False))
    client.close_own_copy()
    if not select.select([irqfd], [], [], 5)[0]:
        raise SystemExit(f"{name}: the line doesn't rise")
    os.eventfd_read(irqfd)
    ours.setblocking(True)
    os.set_blocking(irqfd, True)
    return Side(name, process, ours, irqfd, resamplefd)


def config_reads(side: Side, count: int) -> list[int]:
    """Nanoseconds of so many config reads."""
    frame = mpqemu.request_frame(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0, 0, 4))
    reply = bytearray(64)
    send, receive, now = side.sock.send, side.sock.recv_into, time.perf_counter_ns
    times = []
    for _ in range(count):
        begin = now()
        send(frame)
        receive(reply)
        times.append(now() - begin)
    return times


def resample_echoes(side: Side, count: int) -> list[int]:
    """Nanoseconds from the resamplefd's write to the irqfd's event, so many times."""
    irqfd, resamplefd = side.irqfd, side.resamplefd
    write, read, now = os.eventfd_write, os.eventfd_read, time.perf_counter_ns
    times = []
    for _ in range(count):
        begin = now()
        write(resamplefd, 1)
        read(irqfd)
        times.append(now() - begin)
    return times


def remoted_command(directory: str, fd: int) -> list[str]:
    return [sys.executable, "-m", "remoted", "--name", "bench", "--runtime-dir", directory,
            "--device", f"pci-serial,id=serial0,addr=05.0,fd={fd}"]  # fmt: skip


def qemu_command(fd: int) -> list[str]:
    return [QEMU, "-machine", "x-remote", "-display", "none", "-monitor", "none", "-serial", "none",
            "-chardev", "null,id=c", "-device", "pci-serial,id=d0,chardev=c",
            "-object", f"x-remote-object,id=r0,devid=d0,fd={fd}"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, default=40, help="turns of each side (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=500, help="round trips a turn (default: %(default)s)")
    parser.add_argument("--stops", type=int, default=500, help="of a QEMU, each kind (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="iohub-bench-") as directory:
        return run(arguments, partial(remoted_command, directory))


def run(arguments: argparse.Namespace, remoted: Callable[[int], list[str]]) -> int:
    """Measures both sides in turns and prints the medians."""
    sides = [start("remoted", remoted, 0.0)]
    if shutil.which(QEMU):
        sides.append(start("x-remote", qemu_command, _QEMU_RESET_SECONDS))
    else:
        print(f"{QEMU} is not installed: remoted alone", file=sys.stderr)
    figures: dict[str, dict[str, list[int]]] = {"config read": {}, "resample echo": {}}
    try:
        for _ in range(arguments.batches):
            for side in sides:
                figures["config read"].setdefault(side.name, []).extend(config_reads(side, arguments.batch))
                figures["resample echo"].setdefault(side.name, []).extend(
                    resample_echoes(side, arguments.batch)
                )
    finally:
        for side in sides:
            side.sock.close()
            side.process.terminate()
            side.process.wait()

    medians = {
        figure: {name: statistics.median(times) / 1000 for name, times in by_side.items()}
        for figure, by_side in figures.items()
    }
    still = {}
    if len(sides) == 2 and os.access("/dev/kvm", os.R_OK | os.W_OK):
        still = {kind: spread(times) for kind, times in stops(arguments.stops).items()}
    if arguments.json:
        print(json.dumps({"median_us": medians, "stop_us": still}))
        return 0
    print(f"{'median of a round trip':24}" + "".join(f"{side.name:>12}" for side in sides) + f"{'ratio':>10}")
    for figure, by_side in medians.items():
        row = f"{figure:24}" + "".join(f"{value:9.1f} us" for value in by_side.values())
        if len(by_side) == 2:
            row += f"{by_side['remoted'] / by_side['x-remote']:10.2f}"
        print(row)
    if still:
        print()
        print(
            f"{'a QEMU stands still at':24}" + "".join(f"{name:>12}" for name in next(iter(still.values())))
        )
    for kind, values in still.items():
        print(f"{kind:24}" + "".join(f"{value:9.0f} us" for value in values.values()))
    return 0


def spread(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    p99 = sorted(times)[len(times) * 99 // 100]
    return {"p50": statistics.median(times), "p99": p99, "max": max(times)}


if __name__ == "__main__":
    sys.exit(main())
