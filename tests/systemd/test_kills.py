# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGKILL of the daemons at random moments, while a guest in a stock QEMU boots, probes and uses its functions.

``IOHUB_KILLS=200`` in the environment makes it so many kills of each kind; the report is printed with ``-s``.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from statistics import quantiles

import pytest

from tests.support.hammer import ROUNDS, Interrupts, check_counts, hammering, kill_at_random, tsc_hertz
from tests.support.hostbench import PROXYD, QEMU_UNIT, REMOTED, HostBench
from tests.support.wait import wait_until

KILLS = int(os.environ.get("IOHUB_KILLS", "10"))
BLACKOUT = 0.02
"""seconds from the access that raises a line to its handler, which nothing but a kill takes"""
PLUGGING = 0.8
"""seconds that QEMU takes to start, and proxyd to plug, on a machine that is not slow"""

RAM = 0x2000000
"""where the guest has RAM that it doesn't use"""
PAGE = 4096
EDU_BUFFER = 0x40000
DMA_SOURCE, DMA_DESTINATION, DMA_COUNT, DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
DMA_RUN, DMA_FROM_DEVICE = 1, 2
PCI_COMMAND, PCI_COMMAND_MASTER = 0x04, 0x04


@pytest.fixture(scope="module")
def host(
    installed: Path, requires_systemd: None, requires_kvm: None, requires_qemu: None
) -> Iterator[HostBench]:
    """A host whose VM runs, for all tests here: ``setup`` starts the counts anew."""
    with closing(HostBench(installed)) as bench:
        bench.start()
        yield bench


class Transfers:
    """The guest lets edu copy a page of RAM into its buffer, and from there to another page."""

    def __init__(self, host: HostBench) -> None:
        self._host = host
        records = host.command("setup").of_kind("function")
        self._base = next(record.number("memory0") for record in records if record.text("addr") == "05.0")
        command = host.command(f"config read 16 05.0 {PCI_COMMAND}").result.number("value")
        host.command(f"config write 16 05.0 {PCI_COMMAND} {command | PCI_COMMAND_MASTER}")
        pid = host.wait_for_process(QEMU_UNIT)
        fds = Path(f"/proc/{pid}/fd")
        self._memory = os.open(next(fd for fd in fds.iterdir() if "memfd:" in os.readlink(fd)), os.O_RDWR)

    def __call__(self) -> None:
        page = os.urandom(PAGE)
        os.pwrite(self._memory, page + bytes(3 * PAGE), RAM)
        self._copy(RAM, EDU_BUFFER, DMA_RUN)
        self._copy(EDU_BUFFER, RAM + 2 * PAGE, DMA_RUN | DMA_FROM_DEVICE)
        assert os.pread(self._memory, 4 * PAGE, RAM) == page + bytes(PAGE) + page + bytes(PAGE)

    def close(self) -> None:
        os.close(self._memory)

    def _copy(self, source: int, destination: int, command: int) -> None:
        for register, value in (
            (DMA_SOURCE, source),
            (DMA_DESTINATION, destination),
            (DMA_COUNT, PAGE),
            (DMA_COMMAND, command),
        ):
            self._host.command(f"write 32 {self._base + register:#x} {value:#x}")
            assert self._read(register) & ~DMA_RUN == value & ~DMA_RUN
        wait_until(lambda: not self._read(DMA_COMMAND) & DMA_RUN, "the transfer is over")

    def _read(self, register: int) -> int:
        return self._host.command(f"read 32 {self._base + register:#x}").result.number("value")


@pytest.mark.parametrize(
    ("units", "kills"),
    [((REMOTED,), KILLS), ((PROXYD,), KILLS // 4 or 1), ((REMOTED, PROXYD), KILLS // 10 or 1)],
    ids=["remoted", "proxyd", "both"],
)
def test_kills_while_the_guest_runs(host: HostBench, units: tuple[str, ...], kills: int) -> None:
    host.command("setup")
    said = host.journal("-u", QEMU_UNIT)
    qemu = host.wait_for_process(QEMU_UNIT)
    interrupts = Interrupts(host)
    with hammering(interrupts):
        kill_at_random(host, units, kills, Random(kills))
    sums = check_counts(host, spurious=kills)
    assert host.wait_for_process(QEMU_UNIT) == qemu
    assert host.journal("-u", QEMU_UNIT) == said
    hertz = tsc_hertz()
    blackouts = sorted(cycles / hertz for cycles in interrupts.samples if cycles > BLACKOUT * hertz)
    print(
        f"\n{kills} kills of {' and '.join(units)}, {sums['served']} interrupts, {sums['spurious']} spurious"
    )
    if len(blackouts) > 1:
        cuts = quantiles(blackouts, n=100, method="inclusive")
        print(f"blackouts in {len(blackouts)} accesses that raise a line: p50 {cuts[49]:.3f} s,")
        print(f"p99 {cuts[98]:.3f} s, max {blackouts[-1]:.3f} s")


def stop_until_the_watchdog_ends_it(host: HostBench) -> None:
    host.kill(REMOTED, signal.SIGSTOP)


def run_out_of_memory(host: HostBench) -> None:
    """The kernel's OOM killer ends it, as its control group has no page left for what it allocates next."""
    pid = host.wait_for_process(REMOTED)

    def has_ended() -> bool:
        host.functions("remoted")  # an answer takes memory
        return not Path(f"/proc/{pid}").exists()

    with memory_limited(host, pid):
        wait_until(has_ended, "it has run out of memory")


@contextmanager
def memory_limited(host: HostBench, pid: int) -> Iterator[None]:
    """Leaves a process without free memory, until it has ended."""
    unit = host.root / "sys/fs/cgroup" / host.system.show(REMOTED, "ControlGroup").lstrip("/")
    if (unit / "memory.max").exists():
        # The unit's next process is in a new group.
        (unit / "memory.max").write_text((unit / "memory.current").read_text())
        yield
        return
    group = Path(f"/sys/fs/cgroup/memory/iohub-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory controller to limit a process: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text("0")
        (group / "cgroup.procs").write_text(str(pid))
        yield
        assert "oom_kill 1" in (group / "memory.oom_control").read_text()
    finally:
        for left in (group / "cgroup.procs").read_text().split():
            (group.parent / "cgroup.procs").write_text(left)
        group.rmdir()


ENDS: dict[str, Callable[[HostBench], object]] = {
    "watchdog": stop_until_the_watchdog_ends_it,
    "out of memory": run_out_of_memory,
    "crash": lambda host: host.kill(REMOTED, signal.SIGSEGV),
    "restart": lambda host: host.system.systemctl("restart", REMOTED),
    "end": lambda host: host.kill(REMOTED, signal.SIGTERM),
}


@pytest.mark.parametrize("end", ENDS)
def test_other_ends_while_the_guest_runs(host: HostBench, end: str) -> None:
    """Each costs one spurious interrupt at most, as a kill does."""
    host.drop_in(REMOTED, "[Service]\nWatchdogSec=1s\n")
    pid = host.kill(REMOTED)
    pid = host.wait_for_process(REMOTED, pid)
    host.wait_state(REMOTED, "active")
    wait_until(lambda: host.linked() == {"edu0", "com1"}, "all functions are served")
    host.command("setup")
    with hammering(Interrupts(host)):
        ENDS[end](host)
        host.wait_for_process(REMOTED, pid)
        host.wait_state(REMOTED, "active")
    host.command(f"run {ROUNDS} held 4")
    check_counts(host, spurious=1)


@pytest.mark.parametrize("units", [(REMOTED,), (REMOTED, PROXYD)], ids=["remoted", "both"])
def test_kills_while_the_guest_probes(host: HostBench, units: tuple[str, ...]) -> None:
    """It finds the same functions each time, and gives them the same BARs and IRQs."""
    found = host.command("setup").records
    kills = max(KILLS // 4, 4)

    def probe() -> None:
        assert host.command("setup").records == found

    with hammering(probe) as hammer:
        kill_at_random(host, units, kills, Random(kills))
    assert hammer.rounds
    host.command(f"run {ROUNDS} held 4")
    check_counts(host, spurious=1)


def test_kills_during_dma(host: HostBench) -> None:
    """Each transfer moves what it is to move, and nothing else."""
    kills = max(KILLS // 4, 4)
    with closing(Transfers(host)) as transfers, hammering(transfers) as hammer:
        kill_at_random(host, (REMOTED,), kills, Random(kills))
    assert hammer.rounds


@pytest.mark.parametrize(
    "units", [(REMOTED,), (PROXYD,), (REMOTED, PROXYD)], ids=["remoted", "proxyd", "both"]
)
def test_kills_while_qemu_starts(host: HostBench, units: tuple[str, ...]) -> None:
    """While the daemons start, functions are plugged and the guest boots: in the end it has them all."""
    random = Random(KILLS)
    for _ in range(max(KILLS // 20, 1)):
        host.system.systemctl("restart", "--no-block", QEMU_UNIT)
        for _ in range(3):
            threading.Event().wait(random.uniform(0, PLUGGING))
            for unit in units:
                host.kill(unit)
        host.attach()
        host.command("setup")
        host.command(f"run {ROUNDS} held 4")
        check_counts(host, spurious=3)


def test_kills_while_a_function_is_plugged(host: HostBench) -> None:
    """Into a guest that runs: the others work on meanwhile, and the new one works in the end."""
    random = Random(KILLS)
    path = host.root / "etc/iohub/vm1.toml"
    before = path.read_text()
    qemu = host.wait_for_process(QEMU_UNIT)
    names = {"edu0", "com1"}
    interrupts = Interrupts(host)
    host.command("setup")
    try:
        for number in range(min(max(KILLS // 8, 2), 20)):
            unit = random.choice((REMOTED, PROXYD))
            names.add(f"new{number}")
            with hammering(interrupts):
                host.add_device(f'model = "edu"\nid = "new{number}"\naddr = "{7 + number:02x}.0"\n')
                for each in (REMOTED, PROXYD):
                    host.kill(each, signal.SIGHUP)
                threading.Event().wait(random.uniform(0, 0.1))
                host.kill(unit)
                wait_until(lambda: host.linked() == names, f"all of {names} are plugged and linked")
            assert len(host.command("setup").of_kind("function")) == len(names)
        host.command(f"run {ROUNDS} held 4")
        check_counts(host, spurious=1)
        assert host.wait_for_process(QEMU_UNIT) == qemu
    finally:
        path.write_text(before)
        host.system.systemctl("restart", QEMU_UNIT)
        host.attach()
