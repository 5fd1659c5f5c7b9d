# SPDX-License-Identifier: GPL-2.0-or-later
"""A remoted that has nothing to do does nothing: no timer, no poll, no wake-up."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.link import Client
from common.mpqemu import CONFIG, Command
from common.notifier import EventNotifier
from common.pci import format_devfn
from tests.support.asleep import switches, wait_asleep
from tests.support.checkout import ROOT

FUNCTIONS = 256
CLIENTS = 128
DEADLINE = 60.0
SECONDS = 5.0
SAMPLE_SECONDS = 1.5
"""more than the time between two samples of the watchdog"""


@pytest.fixture
def remoted(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon with 256 devices, once it is ready. It starts with room for far fewer fds than it needs."""
    devices = [f"--device=edu,id=edu{devfn},addr={format_devfn(devfn)}" for devfn in range(FUNCTIONS)]
    command = [sys.executable, "-m", "remoted", "--name=idle", f"--runtime-dir={tmp_path}/run", *devices]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        open(tmp_path / "log", "wb") as log,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE)
        process = subprocess.Popen(
            ["sh", "-c", 'ulimit -S -n 128 && exec "$@"', "sh", *command],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=log,
        )
        try:
            assert manager.recv(100) == b"READY=1"
            yield process
        finally:
            process.kill()
            process.wait()


def test_idle_remoted_with_256_functions_is_never_woken(
    remoted: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Half of them with a client that has nothing to say."""
    with contextlib.ExitStack() as stack:
        for number in range(CLIENTS):
            client = Client.connect(f"{tmp_path}/run/edu{number}.sock", DEADLINE)
            stack.callback(client.close)
            pair = EventNotifier.create(), EventNotifier.create()
            client.send(Command.SET_IRQFD, fds=[notifier.fd for notifier in pair])
            for notifier in pair:
                notifier.close()
            assert client.request(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4)) == 0x11E81234
        before = wait_asleep(remoted.pid, SAMPLE_SECONDS)
        pidfd = os.pidfd_open(remoted.pid)
        # This wait is the measurement itself.
        ended = select.select([pidfd], [], [], SECONDS)[0]
        os.close(pidfd)
        assert not ended
        assert switches(remoted.pid) == before
    remoted.send_signal(signal.SIGTERM)
    assert remoted.wait(DEADLINE) == 0, (tmp_path / "log").read_text()
    assert os.listdir(tmp_path / "run") == []
