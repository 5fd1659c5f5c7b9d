# SPDX-License-Identifier: GPL-2.0-or-later
"""The guests of --vm embedded and --vm soft give the same answers to the same commands, down to the letter."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.daemonpair import Daemons
from tests.support.wait import wait_until

pytestmark = pytest.mark.usefixtures("requires_kvm")

MODELS = (
    "edu",
    "tests.support.remotebench:LineDevice",
    "pci-serial",
    "tests.support.oddfunctions:Huge",
    "edu",
)
"""at 03.0 to 07.0; the first and the last are on one IRQ"""
LINE, HUGE = "04.0", "06.0"
ANSWER_SECONDS = 20.0

TIMING = re.compile(r" (?:ticks|after_ticks|vector7|vector15|tsc)=\S+")
"""what no two runs have in common"""


class Console:
    """A guest's console as it is, so that nothing of an answer is passed over."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(ANSWER_SECONDS)
        self._sock.connect(str(path))
        self._lines = self._sock.makefile("rb")
        assert self._lines.readline() == b"iohub-guest 1 ready\n"

    def ask(self, command: str) -> list[str]:
        """The lines of the answer."""
        self._sock.sendall(command.encode() + b"\n")
        lines: list[str] = []
        while not lines or not lines[-1].startswith(("ok", "err")):
            lines.append(TIMING.sub("", self._lines.readline().decode().rstrip("\n")))
            assert lines[-1], "the guest has gone"
        return lines

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


class Guests:
    """Both guests, each with the same functions."""

    def __init__(self, directory: Path) -> None:
        self._all: list[Daemons] = []
        self._consoles: list[Console] = []
        for vm in ("embedded", "soft"):
            (directory / vm).mkdir()
            daemons = Daemons(directory / vm, vm, len(MODELS))
            self._all.append(daemons)
            daemons.start_remoted(*MODELS)
            daemons.start_proxyd()
            self._consoles.append(Console(directory / vm / "proxyd.console"))

    def ask(self, command: str) -> list[str]:
        """What both answer."""
        embedded, soft = (console.ask(command) for console in self._consoles)
        assert soft == embedded
        return soft

    def wait_for(self, command: str, answer: str) -> None:
        """Both come to answer that in one line."""
        for console in self._consoles:
            wait_until(lambda: console.ask(command) == [answer], answer)  # noqa: B023 - called here

    def close(self) -> None:
        for console in self._consoles:
            console.close()
        for daemons in self._all:
            daemons.close()


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory, requires_kvm: None) -> Iterator[Guests]:
    with closing(Guests(tmp_path_factory.mktemp("guests"))) as guests:
        yield guests


def test_all_functions_get_addresses_and_irqs(guests: Guests) -> None:
    assert guests.ask(f"config write 32 {LINE} 0x1c 0x12") == ["ok"]
    assert guests.ask("setup") == [
        "* function addr=03.0 id=1234:11e8 model=edu gsi=5 memory0=0xe0000000",
        "* function addr=05.0 id=1b36:0002 model=pci-serial gsi=10 io0=0xd000",
        "* function addr=07.0 id=1234:11e8 model=edu gsi=5 memory0=0xe0100000",
        "* device addr=04.0 id=1b36:0042 gsi=9 io0=0xd020 memory1=0xe0200000 memory2=0xe0210000",
        "* device addr=06.0 id=1234:0dd0 memory4=0xe0220000",
        "ok functions=3 devices=2",
    ]
    for addr, irq in (("03.0", 5), (LINE, 9), ("05.0", 10), (HUGE, 0)):
        assert guests.ask(f"config read 8 {addr} 0x3c") == [f"ok value={irq:#x}"]
    assert guests.ask("config read 32 01.0 0x60") == ["ok value=0x9050b0a"]
    assert guests.ask(f"config read 16 {LINE} 4") == ["ok value=0x3"]
    for addr, offset in ((LINE, 0x1C), (HUGE, 0x10), (HUGE, 0x14), (HUGE, 0x18), (HUGE, 0x1C)):
        (line,) = guests.ask(f"config read 32 {addr} {offset}")
        assert int(line.rpartition("=")[2], 16) & ~0xF == 0, (
            "no address above 4 GiB, and none that fits nowhere"
        )


def test_a_function_without_a_driver_is_driven_by_hand(guests: Guests) -> None:
    guests.ask("setup")
    guests.wait_for(f"irq {LINE}", "ok gsi=9 interrupts=0 asserted=0 disabled=0")
    for command in ("write 32 0xe0210008 0x11223344", "write 16 0xe0200010 0xbeef", "out 8 0xd021 0x5a"):
        assert guests.ask(command) == ["ok"]
    assert guests.ask("read 16 0xe021000a") == ["ok value=0x1122"]
    assert guests.ask("read 8 0xe0200011") == ["ok value=0xbe"]
    assert guests.ask("in 8 0xd021") == ["ok value=0x5a"]
    assert guests.ask("out 8 0xd020 1") == ["ok"]
    guests.wait_for(f"irq {LINE}", "ok gsi=9 interrupts=1 asserted=1 disabled=1")
    guests.ask(f"irq {LINE} enable")
    guests.wait_for(f"irq {LINE}", "ok gsi=9 interrupts=2 asserted=1 disabled=1")
    assert guests.ask("out 8 0xd020 0") == ["ok"]
    guests.ask(f"irq {LINE} enable")
    guests.wait_for(f"irq {LINE}", "ok gsi=9 interrupts=2 asserted=0 disabled=0")
    assert guests.ask(f"irq {HUGE}") == ["ok interrupts=0 asserted=0 disabled=0"]
    assert guests.ask("stats")[-2:] == ["* vectors spurious7=0 spurious15=0", "ok"]


def test_runs_count_the_same(guests: Guests) -> None:
    guests.ask("setup")
    assert guests.ask("run 20 held 5")[-1] == "ok"
    stats = guests.ask("stats")
    assert (
        "* function addr=03.0 id=1234:11e8 model=edu gsi=5 raised=20 served=20 lost=0 redone=0 eois=48 held=4 "
        "reasserts=4" in stats
    )
    for command in ("reroute 03.0", "reroute 05.0", "intx 05.0", "hold 07.0", "release 07.0"):
        assert guests.ask(command)[-1].startswith("ok")
    guests.ask("samples 03.0")


def test_the_listings(guests: Guests) -> None:
    assert guests.ask("help")[0] == "# help: this list"
    assert guests.ask("version") == ["ok guest=iohub-guest version=1"]
    guests.ask("setup")
    assert guests.ask("lspci")[-1] == f"ok count={len(MODELS) + 2}"


BAD = (
    *("", " ", "nonsense", "help 1", "version 2", "lspci x", "setup 1", "stats 1", "reboot now"),
    *(
        "in",
        "in 8",
        "in 64 0",
        "in eight 0",
        "in 8 65536",
        "in 8 -1",
        "in 8 0x",
        "in 8 1 2",
        "in 8 1_0",
        "in 8 ٣",
    ),
    *("out 8 0x80", "out 8 0x80 256", "out 16 0x80 65536", "out 32 0x80 0x100000000", "out 8 0x80 1 2"),
    *(
        "read 8",
        "read 7 0",
        "read 8 0x100000000",
        "read 32 zero",
        "write 8 0xe0000000",
        "write 8 0xe0000000 256",
    ),
    *(
        "config",
        "config read 8 03.0",
        "config peek 8 03.0 0",
        "config read 8 03.0 256",
        "config read 8 3.0 0",
    ),
    *(
        "config read 32 03.0 2",
        "config read 16 03.0 3",
        "config write 8 03.0 60",
        "config write 8 03.0 60 256",
    ),
    *("config read 8 03.0 0 1", "config read 8 20.0 0", "config read 8 03.8 0", "config read 9 03.0 0"),
    *("irq", "irq 03.0", "irq 1f.0", "irq nowhere", f"irq {LINE} disable", f"irq {LINE} enable now"),
    *(
        "run",
        "run 0",
        "run 1000001",
        "run ten",
        "run 10 held",
        "run 10 held 0",
        "run 10 hold 1",
        "run 1 held x",
    ),
    *(
        "samples",
        f"samples {LINE}",
        "reroute 1f.0",
        f"reroute {LINE}",
        "intx",
        "intx 3",
        "hold",
        "release 03.0",
    ),
    *("x" * 127, "x" * 128, "x" * 500, "lspci\tx", "lspci\x01"),
)


@pytest.mark.parametrize("command", BAD, ids=range(len(BAD)))
def test_bad_commands_are_refused_alike(guests: Guests, command: str) -> None:
    (line,) = guests.ask(command)
    assert line.startswith("err ")


def test_refusals_depend_on_what_is_set_up(guests: Guests) -> None:
    guests.ask("setup")
    assert guests.ask("hold 03.0") == ["ok status=1"]
    for command in ("run 1", "hold 03.0", "reroute 03.0", "intx 03.0"):
        (line,) = guests.ask(command)
        assert line.startswith("err ")
    assert guests.ask("release 03.0")[-1] == "ok"
