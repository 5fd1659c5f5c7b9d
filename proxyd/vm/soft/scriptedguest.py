# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest of --vm soft: in Python what proxyd/vm/embedded/guest does in C, held to that by one test.

The console protocol, the commands and the meaning of every count are those at the top of guest/main.c; latencies
are in nanoseconds. This module takes the commands, as guest/main.c and commands.c do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from proxyd.pci.pcihost import RESET_PORT
from proxyd.vm.soft.machine import LINE_MAX, MachineReset, PowerOff, SoftMachine
from proxyd.vm.soft.scriptedbus import Bus
from proxyd.vm.soft.scriptedirq import MASTER_VECTOR, SLAVE_VECTOR
from proxyd.vm.soft.scriptedparse import CommandError
from proxyd.vm.soft.scriptedpci import Accesses
from proxyd.vm.soft.scriptedroute import Routes
from proxyd.vm.soft.scriptedrun import Run

__all__ = ["ScriptedGuest"]


class _Command(NamedTuple):
    least: int
    most: int
    """arguments"""
    handler: Callable[[list[str]], str]
    """takes the arguments, returns what follows ``ok``, or raises CommandError"""
    usage: str
    help: str


class ScriptedGuest:
    """Takes commands from the console until the daemon ends."""

    def __init__(self, machine: SoftMachine) -> None:
        self._machine = machine

    def run(self) -> None:
        """The guest from power-on; returns when the daemon ends."""
        while True:
            try:
                self._boot()
            except MachineReset:
                continue
            except PowerOff:
                return

    def _boot(self) -> None:
        self._bus = Bus(self._machine)
        self._commands = self._table()
        for command, base, cascade in ((0x20, MASTER_VECTOR, 0x04), (0xA0, SLAVE_VECTOR, 0x02)):
            for port, value in (
                (command, 0x11),
                (command + 1, base),
                (command + 1, cascade),
                (command + 1, 0x01),
            ):
                self._machine.outp(port, value)
            self._machine.outp(command + 1, 0xFB if command == 0x20 else 0xFF)
        for elcr in (0x4D0, 0x4D1):
            self._machine.outp(elcr, 0)
        self._machine.write_line("iohub-guest 1 ready")
        while True:
            try:
                answer = self._execute(self._machine.read_line(self._bus.interrupts.take))
                self._machine.write_line(f"ok {answer}".rstrip())
            except CommandError as error:
                self._machine.write_line(f"err {error}")

    def _execute(self, line: str) -> str:
        if len(line) > LINE_MAX:
            raise CommandError("line too long")
        if not (line.isascii() and line.isprintable()):
            raise CommandError("not printable ASCII")
        words = line.split()
        if not words:
            raise CommandError("empty line")
        command = self._commands.get(words[0])
        if command is None:
            raise CommandError("unknown command")
        if not command.least <= len(words) - 1 <= command.most:
            raise CommandError("wrong number of arguments")
        return command.handler(words[1:])

    def _table(self) -> dict[str, _Command]:
        bus, accesses = self._bus, Accesses(self._machine)
        run, routes = Run(bus), Routes(bus)
        return {
            "help": _Command(0, 0, self._help, "", "this list"),
            "version": _Command(0, 0, self._version, "", "the guest's name and version"),
            "lspci": _Command(0, 0, accesses.list_functions, "", "the functions on the bus"),
            "setup": _Command(0, 0, bus.setup, "", "gives all functions addresses and an IRQ"),
            "read": _Command(
                2, 2, accesses.read_memory, "WIDTH ADDRESS", "reads memory; WIDTH is 8, 16 or 32 bits"
            ),
            "write": _Command(3, 3, accesses.write_memory, "WIDTH ADDRESS VALUE", "writes memory"),
            "in": _Command(2, 2, accesses.read_port, "WIDTH PORT", "reads an I/O port"),
            "out": _Command(3, 3, accesses.write_port, "WIDTH PORT VALUE", "writes an I/O port"),
            "config": _Command(
                4, 5, accesses.config, "read|write WIDTH ADDR OFFSET [VALUE]", "accesses config space"
            ),
            "irq": _Command(1, 2, bus.irq, "ADDR [enable]", "interrupts of a function without a driver"),
            "run": _Command(
                1, 3, run.run, "ROUNDS [held EVERY]", "so many interrupts of each function with a driver"
            ),
            "stats": _Command(0, 0, self._stats, "", "counts since setup"),
            "samples": _Command(1, 1, run.samples, "ADDR", "latencies of the last run"),
            "reroute": _Command(1, 1, routes.reroute, "ADDR", "moves the IRQ while the line is high"),
            "intx": _Command(
                1, 1, routes.intx, "ADDR", "sets and clears INTX_DISABLE while the line is high"
            ),
            "hold": _Command(1, 1, routes.hold, "ADDR", "raises the line with its IRQ masked"),
            "release": _Command(1, 1, routes.release, "ADDR", "unmasks the IRQ after hold"),
            "reboot": _Command(0, 0, self._reboot, "", "resets the machine"),
        }

    def _help(self, _words: list[str]) -> str:
        for name, command in self._commands.items():
            self._machine.write_line(f"# {f'{name} {command.usage}'.rstrip()}: {command.help}")
        return ""

    def _version(self, _words: list[str]) -> str:
        return "guest=iohub-guest version=1"

    def _stats(self, _words: list[str]) -> str:
        bus = self._bus
        for function in bus.functions:
            counts = ("raised", "served", "lost", "redone", "eois", "held", "reasserts")
            text = " ".join(f"{count}={getattr(function, count)}" for count in counts)
            bus.record(
                f"function addr={function.addr} id={function.driver.name} model={function.driver.model} "
                f"gsi={function.irq} {text}"
            )
        for irq, line in sorted(bus.interrupts.lines.items()):
            if line.entries or bus.interrupts.is_used(irq):
                line_counts = ("entries", "eois", "spurious", "orphaned", "stuck")
                text = " ".join(f"{count}={getattr(line, count)}" for count in line_counts)
                bus.record(f"irq irq={irq} {text}")
        spurious = bus.interrupts.spurious
        bus.record(f"vectors spurious7={spurious[7]} spurious15={spurious[15]}")
        return ""

    def _reboot(self, _words: list[str]) -> str:
        self._machine.write_line("ok")
        self._machine.outp(RESET_PORT, 0x06)
        return ""
