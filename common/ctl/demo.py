# SPDX-License-Identifier: GPL-2.0-or-later
"""``iohubctl demo``: both daemons, four functions, a guest that counts every interrupt, and faults on purpose.

The counts come from both ends: ``raised`` and ``served`` are the guest's (it raises by writing a device's register
and serves in its handler), ``resamples`` and ``reasserts`` are remoted's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from common.control import call
from common.ctl.children import Child
from common.ctl.guestconsole import GuestConsole, Record, Reply
from common.errors import IohubError, PeerGone, UsageError
from common.output import emit

__all__ = ["add_arguments", "run"]

_DEFAULT_ROUNDS = 2500
_HELD_EVERY = 4
"""one interrupt in so many is acknowledged only when it arrives again: its line stays high over an EOI"""
_FEW_ROUNDS = 50
_KILL_SHARE = 5
"""the run that remoted is killed in has this fraction of the rounds"""
_SILENCE_SECONDS = 60.0
"""the longest silence of the guest"""

_DEVICES = (
    ("edu0", "edu", "05.0"),
    ("serial0", "pci-serial", "06.0"),
    ("edu1", "edu", "07.0"),
    ("serial1", "pci-serial", "09.0"),
)
"""id, model, address; 05.0 and 09.0 are wired to the same PIRQ and so share a GSI"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument(
        "--rounds",
        type=int,
        default=_DEFAULT_ROUNDS,
        metavar="N",
        help="interrupts that each of the four functions raises (default: %(default)s)",
    )
    parser.add_argument(
        "--vm",
        choices=("embedded", "soft"),
        default="embedded",
        help="a guest on /dev/kvm, or a scripted one on a userspace irqchip (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo. Returns the exit status: 1 if an interrupt was lost or a line is stuck.

    Raises UsageError, and IohubError when it can't be run at all.
    """
    if arguments.rounds < 1:
        raise UsageError("--rounds takes a number from 1 up")
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is signal.SIG_DFL:  # and not ignored, by nohup(1)
            signal.signal(signum, signal.default_int_handler)  # as Ctrl-C: the daemons end with the demo
    directory = Path(tempfile.mkdtemp(prefix="iohub-demo-"))
    try:
        with _Demo(directory, arguments.vm) as demo:
            demo.play(arguments.rounds)
        result = demo.result()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    emit(f"{json.dumps(result) if arguments.json else _table(result)}\n")
    return 1 if result["lost"] or result["stuck"] or result["failed"] else 0


@dataclass
class _Function:
    """What is known of one function, summed over the guest's restarts and the daemon's."""

    id: str
    addr: str
    gsi: int = 0
    raised: int = 0
    served: int = 0
    lost: int = 0
    redone: int = 0
    resamples: int = 0
    reasserts: int = 0
    samples: dict[str, list[int]] = field(
        default_factory=lambda: {"raise_to_handler": [], "eoi_to_reassert": []}
    )
    """latencies in cycles of the guest's time stamp counter"""


class _Demo:
    """The two daemons, the console, and the counts."""

    def __init__(self, directory: Path, vm: str) -> None:
        self._directory = directory
        self._progress = _Progress()
        self._functions = {addr: _Function(device, addr) for device, _, addr in _DEVICES}
        self._spurious: dict[int, int] = {}
        self._stuck = 0
        self._steps: list[dict[str, Any]] = []
        self._killed = False
        self._started = time.monotonic()
        self._say("starting remoted, proxyd and the guest")
        with ExitStack() as started:
            self._remoted = self._start_remoted()
            started.callback(self._remoted.kill)
            options = [f"--device=id={device},addr={addr}" for device, _, addr in _DEVICES]
            self._proxyd = Child("proxyd", [*self._common, f"--vm={vm}", *options], directory)
            started.callback(self._proxyd.kill)
            self._console = self._connect_console()
            started.callback(self._console.close)
            self._console.wait_ready(_SILENCE_SECONDS)
            status = self._ask_proxyd()
            started.pop_all()
        self._irqchip = "kvm" if status["irqchip"] == "kvm" else "soft"
        self._tsc_khz: int = status.get("tsc_khz") or 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._progress.end()
        self._console.close()
        self._proxyd.end()
        self._remoted.end()

    def play(self, rounds: int) -> None:
        """Runs all steps. Raises IohubError when one can't be run to its end."""
        self._setup()
        self._say(f"{rounds} interrupts from each of {len(self._functions)} functions")
        self._command(f"run {rounds} held {_HELD_EVERY}")
        for addr, function in self._functions.items():
            reply = self._command(f"samples {addr}")
            for kind in ("raise_to_handler", "eoi_to_reassert"):
                function.samples[kind] = [
                    sample for record in reply.of_kind(kind) for sample in record.cycles()
                ]
        self._play_step("re-route of an asserted line", "reroute 05.0")
        self._play_step("INTX_DISABLE set and cleared while high", "intx 06.0")
        self._play_reset()
        self._play_kill(max(rounds // _KILL_SHARE, _FEW_ROUNDS))
        self._count_guest()
        self._count_remoted()

    def result(self) -> dict[str, Any]:
        """What --json prints."""
        functions = self._functions.values()
        return {
            "irqchip": self._irqchip,
            "seconds": round(time.monotonic() - self._started, 1),
            "functions": [self._function_result(function) for function in functions],
            "steps": self._steps,
            "raised": sum(function.raised for function in functions),
            "served": sum(function.served for function in functions),
            "spurious": sum(self._spurious.values()),
            "lost": sum(function.lost for function in functions),
            "stuck": self._stuck,
            "failed": sum(not step["good"] for step in self._steps),
        }

    def _function_result(self, function: _Function) -> dict[str, Any]:
        return {
            "id": function.id,
            "addr": function.addr,
            "gsi": function.gsi,
            "raised": function.raised,
            "served": function.served,
            "resamples": function.resamples,
            "reasserts": function.reasserts,
            "spurious": self._spurious.get(function.gsi, 0),
            "lost": function.lost,
            "redone": function.redone,
            "raise_to_handler_us": self._percentiles(function.samples["raise_to_handler"]),
            "eoi_to_reassert_us": self._percentiles(function.samples["eoi_to_reassert"]),
        }

    def _percentiles(self, cycles: list[int]) -> dict[str, float] | None:
        if not cycles or not self._tsc_khz:
            return None
        cycles = sorted(cycles)
        return {
            f"p{percent}": round(cycles[len(cycles) * percent // 100] * 1000 / self._tsc_khz, 1)
            for percent in (50, 99)
        }

    def _setup(self) -> None:
        for record in self._command("setup").of_kind("function"):
            self._functions[record.text("addr")].gsi = record.number("gsi")

    def _play_step(self, title: str, command: str) -> None:
        self._say(title)
        reply = self._console.command(command, timeout=_SILENCE_SECONDS)
        self._steps.append({"step": title, "good": reply.ok})

    def _play_reset(self) -> None:
        title = "reset of the machine while a line is high"
        self._say(title)
        self._count_guest()
        self._command("hold 05.0")
        self._command("reboot")
        self._console.wait_ready(_SILENCE_SECONDS)
        self._setup()
        self._command(f"run {_FEW_ROUNDS} held {_HELD_EVERY}")
        self._steps.append({"step": title, "good": True})

    def _play_kill(self, rounds: int) -> None:
        title = "SIGKILL and restart of remoted in mid-run"
        self._say(title)
        self._ask_remoted()  # its first answer takes longer than the rest of a short run
        back: list[str] = []

        def on_record(record: Record) -> None:
            self._on_record(record)
            if record.kind == "back":
                back.append(record.text("addr"))
            elif (
                record.kind == "progress"
                and record.number("done") * 2 >= record.number("total")
                and not self._killed
            ):
                self._count_remoted()
                self._remoted.kill()
                self._killed = True
                self._remoted = self._start_remoted()

        reply = self._console.command(
            f"run {rounds} held {_HELD_EVERY}", on_record=on_record, timeout=_SILENCE_SECONDS
        )
        connected = [function["connected"] for function in self._ask_proxyd()["functions"]]
        self._steps.append({"step": title, "good": reply.ok and bool(back) and all(connected)})

    def _command(self, line: str) -> Reply:
        reply = self._console.command(line, on_record=self._on_record, timeout=_SILENCE_SECONDS)
        if not reply.ok:
            raise IohubError(f"the guest can't {line}: {reply.reason}")
        return reply

    def _count_guest(self) -> None:
        """Adds what the guest has counted; a reset of the machine ends its counts."""
        reply = self._command("stats")
        for record in reply.of_kind("function"):
            function = self._functions[record.text("addr")]
            function.raised += record.number("raised")
            function.served += record.number("served")
            function.lost += record.number("lost")
            function.redone += record.number("redone")
        for record in reply.of_kind("irq"):
            irq = record.number("irq")
            self._spurious[irq] = self._spurious.get(irq, 0) + record.number("spurious")
            self._stuck += record.number("stuck")

    def _count_remoted(self) -> None:
        """Adds what remoted has counted; its end ends its counts, with those since the last question."""
        for status in self._ask_remoted()["functions"]:
            function = self._functions[status["addr"]]
            function.resamples += status["resamples"]
            function.reasserts += status["reasserts"]

    def _ask_remoted(self) -> dict[str, Any]:
        return call(self._directory / "remoted.varlink", "org.iohub.Remoted.Status")

    def _ask_proxyd(self) -> dict[str, Any]:
        return call(self._directory / "proxyd.varlink", "org.iohub.Proxyd.Status")

    def _on_record(self, record: Record) -> None:
        if record.kind == "progress":
            self._progress.show(record.number("done"), record.number("total"))

    def _say(self, title: str) -> None:
        self._progress.begin(title)

    @property
    def _common(self) -> list[str]:
        return ["--name=demo", f"--runtime-dir={self._directory}"]

    def _start_remoted(self) -> Child:
        options = [f"--device={model},id={device},addr={addr}" for device, model, addr in _DEVICES]
        return Child("remoted", [*self._common, *options], self._directory)

    def _connect_console(self) -> GuestConsole:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(self._directory / "proxyd.console"))
        except OSError as error:
            sock.close()
            raise PeerGone(f"the guest's console: {error.strerror}") from error
        return GuestConsole(sock)


class _Progress:
    """The progress on stderr: one line for each step, rewritten in place if stderr is a terminal."""

    def __init__(self) -> None:
        self._in_place = sys.stderr.isatty()
        self._title = ""

    def begin(self, title: str) -> None:
        self.end()
        self._title = title
        self._write(f"{title} ...")

    def show(self, done: int, total: int) -> None:
        if self._in_place:
            self._write(f"\r{self._title} ... {100 * done // total} %\x1b[K")

    def end(self) -> None:
        if self._title:
            self._write("\n")
            self._title = ""

    @staticmethod
    def _write(text: str) -> None:
        with contextlib.suppress(OSError):  # progress that can't be written doesn't end the demo
            sys.stderr.write(text)
            sys.stderr.flush()


def _table(result: dict[str, Any]) -> str:
    counts = ("raised", "served", "resamples", "spurious", "lost")
    heads = [
        "ADDR",
        "DEVICE",
        "GSI",
        *(count.upper() for count in counts),
        "RAISE TO HANDLER",
        "EOI TO RE-ASSERT",
    ]
    rows = [heads]
    rows += [
        [
            function["addr"],
            function["id"],
            str(function["gsi"]),
            *(str(function[count]) for count in counts),
            _latency(function["raise_to_handler_us"]),
            _latency(function["eoi_to_reassert_us"]),
        ]
        for function in result["functions"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += ["", *(f"{'ok    ' if step['good'] else 'FAILED'}  {step['step']}" for step in result["steps"])]
    totals = ", ".join(
        f"{result[count]} {count}" for count in ("raised", "served", "spurious", "lost", "stuck")
    )
    lines += ["", f"irqchip {result['irqchip']}: {totals}, in {result['seconds']} s"]
    return "\n".join(lines)


def _latency(percentiles: dict[str, float] | None) -> str:
    return "-" if percentiles is None else f"p50 {percentiles['p50']:.0f}, p99 {percentiles['p99']:.0f} us"
