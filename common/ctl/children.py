# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons as child processes: started, known to be ready, ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import IohubError

__all__ = ["Child", "ChildFailed"]

_END_SECONDS = 20.0

_LAUNCHER = """\
import ctypes, os, runpy, signal, sys
parent, module, *arguments = sys.argv[1:]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
if os.getppid() != int(parent):  # it has ended before that
    sys.exit(1)
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""runs a module as __main__ in a process that is killed when its parent ends, in whatever way"""


def _launcher() -> str:
    """With what only this process has in sys.path, where an installed program has put iohub's folder."""
    return f"import sys\nsys.path[:0] = [each for each in {sys.path!r} if each not in sys.path]\n{_LAUNCHER}"


def _starting(module: str) -> list[str]:
    """The module to run and its arguments: a package that PYTHONPATH leads to must not be taken for a daemon."""
    return ["qemu_iohub", module] if module in ("proxyd", "remoted") else [module]


class ChildFailed(IohubError):
    """A daemon that didn't start, or died."""


class Child:
    """One daemon, ``python -m MODULE``, that says READY=1 (sd_notify(3)) when it serves.

    It is killed when the thread that has started it ends, also if that is by SIGKILL (PR_SET_PDEATHSIG, prctl(2)).
    Ctrl+C in a terminal does not reach it: its parent ends it.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], directory: Path, deadline: float = 20.0
    ) -> None:
        """Starts it and waits until it is ready; its log goes to ``MODULE.log`` in the directory.

        Raises ChildFailed, with the log's last line, when it ends instead or isn't ready in time.
        """
        self.module = module
        self.log = directory / f"{module}.log"
        address = directory / f"{module}.notify"
        with contextlib.suppress(FileNotFoundError):
            address.unlink()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
            self.log.open("ab") as log,
        ):
            notify.bind(str(address))
            self.process = subprocess.Popen(
                [sys.executable, "-c", _launcher(), str(os.getpid()), *_starting(module), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": str(address)},
                process_group=0,
            )
            try:
                self._await_ready(notify, deadline)
            except BaseException:
                self.kill()
                raise
            finally:
                address.unlink()

    def kill(self) -> None:
        """SIGKILL, and waits."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """SIGTERM, and waits; SIGKILL if it takes too long. Returns the exit status, negative for a signal."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def _await_ready(self, notify: socket.socket, deadline: float) -> None:
        expires = time.monotonic() + deadline
        pidfd = os.pidfd_open(self.process.pid)
        try:
            while (remaining := expires - time.monotonic()) > 0:
                ready, _, _ = select.select([notify.fileno(), pidfd], [], [], remaining)
                if notify.fileno() in ready:
                    if b"READY=1" in notify.recv(4096).split(b"\n"):
                        return
                elif pidfd in ready:
                    raise ChildFailed(
                        f"{self.module} ended with status {self.process.wait()}: {self.last_line()}"
                    )
        finally:
            os.close(pidfd)
        raise ChildFailed(f"{self.module} isn't ready after {deadline:g} s: {self.last_line()}")

    def last_line(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
