# SPDX-License-Identifier: GPL-2.0-or-later
"""A device whose code does not return: it is named while it hangs, and the second signal ends the daemon."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import mpqemu, pci
from common.link import Client
from common.mpqemu import Command
from tests.support.wait import wait_until

DEADLINE = 20.0
BASE = 0xFEB00000

DEVICE = '''\
import os
from remoted.device import Bar, BarKind, Option, PciFunction


def spin():
    while True:
        try:
            pass
        except BaseException:
            pass


def block():
    while True:
        os.read(os.pipe()[0], 1)


HANGS = {"spin": spin, "block": block}


class Hanging(PciFunction):
    """Hangs where it is told to."""

    VENDOR_ID, DEVICE_ID = 0xACE0, 0x0001
    BARS = {0: Bar(BarKind.MEM32, 4096)}
    REGISTERS = {0: {0x8: "STATUS"}}
    OPTIONS = (Option("where", str), Option("how", str, "spin", choices=("spin", "block")))

    def __init__(self, host, options):
        super().__init__(host, options)
        self.hang("init")

    def hang(self, where):
        if self.options["where"] == where:
            HANGS[self.options["how"]]()


    def bar_read(self, bar, offset, size):
        self.hang("read")
        return 0

    def bar_write(self, bar, offset, size, value):
        self.host.loop.call_later(0, self.on_time)

    def on_time(self):
        self.hang("timer")

    def close(self):
        self.hang("close")
'''

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts remoted with one device that hangs somewhere; its log is the file ``log``."""
    (tmp_path / "hanging.py").write_text(DEVICE)
    processes = []

    def run(where: str, how: str = "spin") -> subprocess.Popen[bytes]:
        device = f"--device={tmp_path}/hanging.py:Hanging,id=card,where={where},how={how}"
        command = [sys.executable, "-m", "remoted", "--name=vm", f"--runtime-dir={tmp_path}/run", device]
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()


def connect(directory: Path) -> Client:
    path = directory / "run" / "card.sock"
    wait_until(path.exists, "the device listens")
    client = Client.connect(str(path), DEADLINE)
    for addr, value in ((pci.PCI_BASE_ADDRESS_0, BASE), (pci.PCI_COMMAND, pci.PCI_COMMAND_MEMORY)):
        client.request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(addr, value, 4))
    return client


def log(directory: Path) -> str:
    return (directory / "log").read_text()


def wait_told(directory: Path, doing: str) -> None:
    """The line of a device that still hangs."""
    text = f" s: {doing}\n"
    wait_until(lambda: text in log(directory), f"{doing!r} is told of")
    (line,) = [line for line in log(directory).splitlines(keepends=True) if line.endswith(text)]
    assert "card: warning: the device's code has not returned for " in line


def end(process: subprocess.Popen[bytes], directory: Path, signum: int, count: int) -> None:
    """Ends it by so many signals; nothing is left of its sockets."""
    for _ in range(count - 1):
        process.send_signal(signum)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
    process.send_signal(signum)
    assert process.wait(DEADLINE) == -signum
    assert os.listdir(directory / "run") == []
    assert "killed: " in log(directory)


READ_STATUS = Command.BAR_READ, mpqemu.BAR.pack(BASE + 0x8, 0, 4, True)
START_TIMER = Command.BAR_WRITE, mpqemu.BAR.pack(BASE + 0x20, 0, 4, True)


@pytest.mark.parametrize(
    ("where", "how", "request_", "doing", "signum"),
    [
        ("read", "spin", READ_STATUS, "reading 4 bytes at BAR 0 + 0x8 (STATUS)", signal.SIGINT),
        ("timer", "block", START_TIMER, "running the timer's Hanging.on_time()", signal.SIGTERM),
    ],
)
def test_hung_handler(
    tmp_path: Path,
    start: Start,
    where: str,
    how: str,
    request_: tuple[Command, bytes],
    doing: str,
    signum: int,
) -> None:
    process = start(where, how)
    with contextlib.closing(connect(tmp_path)) as client:
        client.send(*request_)
        wait_told(tmp_path, doing)
        end(process, tmp_path, signum, 2)


def test_hung_start(tmp_path: Path, start: Start) -> None:
    process = start("init")
    wait_told(tmp_path, "__init__")
    end(process, tmp_path, signal.SIGTERM, 1)


def test_hung_end(tmp_path: Path, start: Start) -> None:
    """The sockets have gone before the device is closed."""
    process = start("close")
    connect(tmp_path).close()
    process.send_signal(signal.SIGTERM)
    wait_told(tmp_path, "close")
    end(process, tmp_path, signal.SIGTERM, 1)
