# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own remote process, ``-machine x-remote``, with one pci-serial."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.monitorclient import MonitorClient

__all__ = ["StockRemote"]


class StockRemote:
    """One process that serves a connected socket.

    It answers requests from the moment its machine is made, and only then resets it, which would forget a BAR
    that was programmed meanwhile. Its monitor answers from the main loop, which begins after that reset.
    """

    def __init__(self, directory: Path, link: socket.socket, args: Sequence[str] = ()) -> None:
        """Takes ownership of the socket; returns when the reset is over. A monitor's socket is left behind."""
        monitor = directory / "x-remote.qmp"
        monitor.unlink(missing_ok=True)
        with link:
            self.process = subprocess.Popen(
                [
                    *("qemu-system-x86_64", "-machine", "x-remote", "-display", "none", "-monitor", "none"),
                    *("-serial", "none", "-qmp", f"unix:{monitor},server=on,wait=off"),
                    *("-chardev", "null,id=null", "-device", "pci-serial,id=d,chardev=null"),
                    *("-object", f"x-remote-object,id=r,devid=d,fd={link.fileno()}", *args),
                ],
                pass_fds=[link.fileno()],
                stderr=subprocess.DEVNULL,
            )
        try:
            with MonitorClient(monitor) as client:
                client.execute("query-status")
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
