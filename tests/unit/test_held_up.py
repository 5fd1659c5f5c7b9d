# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemons with a stderr, stdout or service manager that takes nothing: devices work, and SIGTERM ends them."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.control import call
from common.errors import PeerGone
from common.link import Client
from common.mpqemu import CONFIG, HEADER, Command
from tests.support.checkout import ROOT
from tests.support.manager import Manager
from tests.support.wait import wait_until

END_SECONDS = 20.0
STOP, GO = b"\x13", b"\x11"  # Ctrl+S and Ctrl+Q

MODEL = """\
from remoted.devices.edu import Edu

class Talker(Edu):
    def config_read(self, offset, size):
        print("talk " * 100)
        return super().config_read(offset, size)
"""


class Held:
    """A stream of the daemon that takes nothing until go() is called."""

    def __init__(self, read_end: int, write_end: int, go: Callable[[], object]) -> None:
        self.read_end = read_end
        self.write_end = write_end
        self._go = go

    def read_until(self, text: str) -> None:
        """Lets it go and reads until the text has come."""
        self._go()
        seen = ""
        while text not in seen:
            assert select.select([self.read_end], [], [], END_SECONDS)[0], f"no {text!r} in {seen!r}"
            seen += os.read(self.read_end, 1 << 16).decode()


def full_pipe() -> Held:
    read_end, write_end = os.pipe()
    size = fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write_end, b"\n" * size)
    return Held(read_end, write_end, lambda: None)


def stopped_terminal() -> Held:
    read_end, write_end = pty.openpty()
    tty.setcbreak(write_end)
    os.write(read_end, STOP)
    return Held(read_end, write_end, lambda: os.write(read_end, GO))


@pytest.fixture(params=[full_pipe, stopped_terminal], ids=lambda kind: kind.__name__)
def held(request: pytest.FixtureRequest) -> Iterator[Held]:
    held = request.param()
    yield held
    os.close(held.read_end)
    os.close(held.write_end)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a daemon with its runtime directory below tmp_path."""
    with ExitStack() as started:

        def start(module: str, *options: str, **streams: int) -> subprocess.Popen[bytes]:
            stdout, stderr = streams.get("stdout"), streams.get("stderr", subprocess.DEVNULL)
            environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
            if module == "remoted":
                environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
            command = [sys.executable, "-m", module, "--name=vm", f"--runtime-dir={tmp_path}", *options]
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environ
            )
            started.callback(process.wait)
            started.callback(process.kill)
            return process

        yield start


def connect(path: Path) -> Client:
    """As soon as the device listens."""
    found: list[Client] = []

    def try_to() -> bool:
        try:
            found.append(Client.connect(str(path), END_SECONDS))
        except PeerGone:
            return False
        return True

    wait_until(try_to, f"something listens at {path}")
    return found[0]


def vendor(client: Client) -> int:
    return client.request(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 2))


def end(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(END_SECONDS)


def test_a_held_stderr_costs_no_device_anything(
    held: Held, start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = start("remoted", "--device=edu,id=edu0", "--device=edu,id=edu1", stderr=held.write_end)
    good = connect(tmp_path / "edu1.sock")
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as bad:
            bad.settimeout(END_SECONDS)
            bad.connect(str(tmp_path / "edu0.sock"))
            bad.sendall(HEADER.pack(99, 0))
            assert bad.recv(100) == b""
        assert vendor(good) == 0x1234
    held.read_until("edu0: ")
    good.close()
    assert end(process) == 0


def test_a_held_stderr_does_not_delay_the_end(
    held: Held, start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = start("remoted", "--device=edu,id=edu0", stderr=held.write_end)
    connect(tmp_path / "edu0.sock").close()
    assert end(process) == 0


def test_a_held_stderr_does_not_hold_proxyd(
    held: Held, start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = start("proxyd", "--vm=soft", "--device=id=edu0,addr=05.0", stderr=held.write_end)
    wait_until((tmp_path / "proxyd.varlink").exists, "proxyd listens")
    status = call(tmp_path / "proxyd.varlink", "org.iohub.Proxyd.Status")
    assert status["pid"] == process.pid
    held.read_until("edu0: ")
    assert end(process) == 0


def test_a_device_that_prints_waits_for_nobody(
    held: Held, start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    (tmp_path / "talker.py").write_text(MODEL)
    process = start("remoted", "--device=talker:Talker,id=talker0", stdout=held.write_end)
    client = connect(tmp_path / "talker0.sock")
    for _ in range(100):
        assert vendor(client) == 0x1234
    held.read_until("talk talk")
    client.close()
    assert end(process) == 0


def test_a_service_manager_that_is_held_up_costs_nothing_and_hears_of_it_later(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    manager.fill()
    process = start("remoted", "--device=edu,id=edu0")
    client = connect(tmp_path / "edu0.sock")
    assert vendor(client) == 0x1234
    assert manager.receive() == "READY=1"
    manager.fill()
    assert end(process) == 0
    client.close()
    manager.close()
