# SPDX-License-Identifier: GPL-2.0-or-later
"""A remoted with an fd store that outlives it, as systemd gives to its unit, without systemd."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.support.checkout import ROOT
from tests.support.storemanager import StoreManager
from tests.support.wait import wait_until

__all__ = ["KeptRemoted"]

_LAUNCHER = """
import os, sys
fds = [os.dup(int(fd)) for fd in sys.argv[1].split(",") if fd]
high = [__import__("fcntl").fcntl(fd, 0, 1000) for fd in fds]
for target, fd in enumerate(high, 3):
    os.dup2(fd, target)
os.closerange(3 + len(high), 2000)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "remoted", *sys.argv[2:]])
"""


class KeptRemoted:
    """One process after the other. A context manager, which kills the last."""

    def __init__(self, directory: Path, arguments: Sequence[str]) -> None:
        self._directory = directory
        self._arguments = list(arguments)
        self._manager = StoreManager(directory)
        self._is_over = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()
        self._kill()
        self._manager.close()

    def start(self) -> None:
        """Starts a process with what is in the store, and waits until it is ready."""
        with self._lock:
            inherited = self._manager.hand_over()
            self._manager.states.clear()
        named = [(name, fd) for name, fds in inherited.items() for fd in fds]
        environ = {
            **os.environ,
            "NOTIFY_SOCKET": self._manager.address,
            "FDSTORE": "4096",
            "LISTEN_FDS": str(len(named)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in named),
        }
        fds = [fd for _, fd in named]
        with (self._directory / "remoted.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCHER, ",".join(map(str, fds)), *self._arguments],
                pass_fds=fds,
                env=environ,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        for fd in fds:
            os.close(fd)
        wait_until(lambda: any("READY" in state for state in self._manager.states), "remoted is ready")

    def kill(self) -> None:
        """Kills the process, and starts the next one."""
        self._kill()
        self.start()

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _serve(self) -> None:
        while not self._is_over:
            if select.select([self._manager.fileno()], [], [], 0.05)[0]:
                with self._lock:
                    self._manager.serve()
