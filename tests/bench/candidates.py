# SPDX-License-Identifier: GPL-2.0-or-later
"""The remote processes that are compared, each with a pci-serial and one connected link."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from common import mpqemu, pci
from common.config import Transport
from common.disposal import Disposal
from common.link import Client
from common.mpqemu import Command
from tests.support.checkout import ROOT
from tests.support.storemanager import StoreManager
from tests.support.vfiouserclient import CONFIG_REGION, INTX, VfioUserClient

__all__ = [
    "ADAPTIVE",
    "BINARIES",
    "CANDIDATES",
    "FLOOR",
    "FLOORS",
    "INTERPRETER",
    "IO_BASE",
    "KEPT",
    "LOOPS",
    "OFF",
    "PEER",
    "QEMU",
    "TRANSPORTS",
    "Candidate",
    "Remote",
    "cpu_seconds",
    "process_cpu_seconds",
    "remoted_command",
    "start_process",
]

QEMU = "qemu-system-x86_64"
IO_BASE = 0xC000
PEER = "x-remote"
FLOOR = "floor polling"
FLOORS = ("floor", FLOOR, "floor.py", "floor.py polling")
"""in C and in Python, each without and with polling"""
ADAPTIVE = "remoted adaptive"
OFF = "remoted off"
KEPT = "remoted kept"
INTERPRETER = os.path.realpath(sys.executable)
"""not that of .venv, which reads what an editable installation has put there; installed programs don't"""
BINARIES = ROOT / "build" / "bench"
"""where make puts the C programs"""
POLL_MICROSECONDS = 50
"""for how long the floor looks for the next event"""

_FLOOR_PY = Path(__file__).with_name("floor.py")
_QEMU_RESET_SECONDS = 0.3
"""QEMU's remote answers before its initial machine reset is over, which forgets BARs"""
_DEADLINE = 20.0
_CPUCLOCK_SCHED = 2  # include/linux/posix-timers.h: of all threads of a process, in nanoseconds


@dataclass(frozen=True)
class Candidate:
    """One way to serve a link."""

    name: str
    command: Callable[[int, Path], list[str]]
    """of the inherited link and a directory of its own"""
    settle: float = 0.0
    """seconds from the first answer until it can be used"""
    has_store: bool = False
    """whether it runs as under a service manager, with an fd store that keeps its link"""
    transport: Transport = Transport.MPQEMU


class Remote:
    """A running candidate with a client that has given it an irqfd and placed its BAR."""

    def __init__(self, candidate: Candidate, directory: Path, *, settle: bool = True) -> None:
        """Without ``settle`` it may forget its BAR: only for what doesn't need it."""
        self.candidate = candidate
        self._manager = StoreManager(directory) if candidate.has_store else None
        address = "" if self._manager is None else self._manager.address
        begin = time.perf_counter()
        self.process, self.link = start_process(candidate, directory, address)
        self.pid = self.process.pid
        self.first_answer = self.first_answer_cpu = 0.0
        """seconds from before the process is made, and the CPU time that it has used by then"""
        self.irqfd, self.resamplefd = (os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2))
        """over vfio-user the trigger and the unmask eventfd"""
        copy = socket.socket(fileno=os.dup(self.link.fileno()))
        if candidate.transport is Transport.VFIO_USER:
            self._set_up_vfio_user(VfioUserClient(copy), begin)
        else:
            self._set_up(Client(copy, _DEADLINE, Disposal()), begin, settle)
        self.link.setblocking(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self.link.close()
        self.process.terminate()
        self.process.wait()
        os.close(self.irqfd)
        os.close(self.resamplefd)
        if self._manager is not None:
            self._manager.close()

    def _set_up(self, client: Client, begin: float, settle: bool) -> None:
        client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0, 0, 4))
        self._note_first_answer(begin)
        time.sleep(self.candidate.settle * settle)  # noqa: TID251 - nothing tells when QEMU's own reset is over
        client.send(Command.SET_IRQFD, fds=(self.irqfd, self.resamplefd))
        if self._manager is not None:
            self._manager.serve_until_stored("irqfd")
        client.request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(pci.PCI_BASE_ADDRESS_0, IO_BASE, 4))
        client.request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(pci.PCI_COMMAND, pci.PCI_COMMAND_IO, 2))
        client.close_own_copy()

    def _set_up_vfio_user(self, client: VfioUserClient, begin: float) -> None:
        with client:
            client.version()
            client.read(CONFIG_REGION, 0)
            self._note_first_answer(begin)
            client.attach(INTX, 0, [self.irqfd])
            client.attach_unmask(self.resamplefd)

    def _note_first_answer(self, begin: float) -> None:
        self.first_answer = time.perf_counter() - begin
        self.first_answer_cpu = self.cpu_seconds()

    def pin(self, cpus: set[int]) -> None:
        """Lets all its threads run on these CPUs only."""
        for task in os.listdir(f"/proc/{self.pid}/task"):
            os.sched_setaffinity(int(task), cpus)

    def cpu_seconds(self) -> float:
        """The CPU time of all its threads."""
        return process_cpu_seconds(self.pid)

    def switches(self) -> int:
        """How often one of its threads has left a CPU, by its own will or not."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
        return total

    def memory(self) -> dict[str, int]:
        """Bytes: resident, private, and of these those that no other process could share."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {
            name: int(size.split()[0]) * 1024 for name, _, size in (line.partition(":") for line in lines)
        }
        private = sizes["Private_Clean"] + sizes["Private_Dirty"]
        return {"resident": sizes["Rss"], "private": private, "dirty": sizes["Private_Dirty"]}


def start_process(
    candidate: Candidate, directory: Path, store: str = ""
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A process and the client's end of its link; ``store`` is the address of its service manager."""
    variables = {"NOTIFY_SOCKET": store, "FDSTORE": "4096"} if store else {}
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            candidate.command(theirs.fileno(), directory),
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env={**os.environ, **variables},
            stderr=subprocess.DEVNULL,
        )
    return process, ours


def process_cpu_seconds(pid: int) -> float:
    """The CPU time of all threads of a process."""
    return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)


def cpu_seconds() -> float:
    """The CPU time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def remoted_command(directory: Path, *args: str, module: str = "qemu_iohub") -> list[str]:
    """What starts remoted as an installed program starts it; or a module that runs it otherwise."""
    libraries = [path for path in sys.path if path.endswith("-packages")]
    start = "from qemu_iohub import iohub_remoted; sys.exit(iohub_remoted())"
    if module != "qemu_iohub":
        start = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path += {libraries!r}; {start}"
    return [INTERPRETER, "-P", "-S", "-c", code, *args, "--name=bench", f"--runtime-dir={directory}"]


def _remoted(
    *args: str, module: str = "qemu_iohub", transport: Transport = Transport.MPQEMU
) -> Callable[[int, Path], list[str]]:
    def command(fd: int, directory: Path) -> list[str]:
        device = f"--device=pci-serial,id=serial0,addr=05.0,fd={fd},transport={transport}"
        return [*remoted_command(directory, *args, module=module), device]

    return command


def _floor(poll: int) -> Callable[[int, Path], list[str]]:
    return lambda fd, _directory: [str(BINARIES / "floor"), str(fd), str(poll)]


def _python_floor(poll: int) -> Callable[[int, Path], list[str]]:
    return lambda fd, _directory: [INTERPRETER, "-I", "-S", str(_FLOOR_PY), str(fd), str(poll)]


def _x_remote(fd: int, _directory: Path) -> list[str]:
    return [
        *(QEMU, "-machine", "x-remote", "-display", "none", "-monitor", "none", "-serial", "none"),
        *("-chardev", "null,id=c", "-device", "pci-serial,id=d0,chardev=c"),
        *("-object", f"x-remote-object,id=r0,devid=d0,fd={fd}"),
    ]


CANDIDATES = (
    *([Candidate(PEER, _x_remote, _QEMU_RESET_SECONDS)] if shutil.which(QEMU) else []),
    Candidate("floor", _floor(0)),
    Candidate(FLOOR, _floor(POLL_MICROSECONDS)),
    Candidate("floor.py", _python_floor(0)),
    Candidate("floor.py polling", _python_floor(POLL_MICROSECONDS)),
    Candidate(OFF, _remoted("--poll-max-us=0")),
    Candidate("remoted fixed", _remoted(module="tests.bench.fixedloop")),
    Candidate(ADAPTIVE, _remoted()),
    Candidate(KEPT, _remoted(), has_store=True),
)
"""in the order of the columns"""

TRANSPORTS = tuple(
    Candidate(str(transport), _remoted(transport=transport), transport=transport) for transport in Transport
)
"""remoted as it is started without options, by what carries its link"""

LOOPS = tuple(
    Candidate(name, _remoted(name, "--poll-max-us=0", module="tests.bench.otherloop"))
    for name in ("asyncio", "uvloop")
    if importlib.util.find_spec(name)
)
"""remoted on another event loop; uvloop where it is installed"""
