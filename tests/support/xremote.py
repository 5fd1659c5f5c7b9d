# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own remote process, ``-machine x-remote``, with one pci-serial."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self

__all__ = ["StockRemote"]

_TIMEOUT = 60.0


class StockRemote:
    """One process that serves a connected socket.

    It answers requests from the moment its machine is made, and only then resets it, which would forget a BAR
    that was programmed meanwhile. Its monitor answers from the main loop, which begins after that reset.
    """

    def __init__(self, link: socket.socket, args: Sequence[str] = ()) -> None:
        """Takes ownership of the socket; returns when the reset is over.

        Raises EOFError or ConnectionError when the process has ended instead, as it does when its client goes.
        """
        ours, theirs = socket.socketpair()
        with link, ours, theirs:
            self.process = subprocess.Popen(
                [
                    *("qemu-system-x86_64", "-machine", "x-remote", "-display", "none", "-monitor", "none"),
                    *("-serial", "none", "-mon", "monitor,mode=control"),
                    *("-chardev", f"socket,id=monitor,fd={theirs.fileno()}"),
                    *("-chardev", "null,id=null", "-device", "pci-serial,id=d,chardev=null"),
                    *("-object", f"x-remote-object,id=r,devid=d,fd={link.fileno()}", *args),
                ],
                pass_fds=[theirs.fileno(), link.fileno()],
                stderr=subprocess.DEVNULL,
            )
            theirs.close()
            try:
                _wait_for_main_loop(ours)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.wait()


def _wait_for_main_loop(monitor: socket.socket) -> None:
    monitor.settimeout(_TIMEOUT)
    with monitor.makefile("r") as lines:
        lines.readline()
        for command in ("qmp_capabilities", "query-status"):
            monitor.sendall(json.dumps({"execute": command}).encode())
            while "return" not in (line := lines.readline()):
                if not line:
                    raise EOFError("QEMU's remote process has ended")
