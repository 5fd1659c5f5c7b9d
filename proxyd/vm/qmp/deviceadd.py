# SPDX-License-Identifier: GPL-2.0-or-later
"""The two ways in which QEMU's device_add brings a device its link."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from common.errors import IohubError
from proxyd.vm.qmp.monitor import CommandError, Monitor

__all__ = ["NotReached", "add_by_fd", "add_by_path"]


class NotReached(IohubError):
    """QEMU could not connect to a device's socket, or got no fit answer there."""


async def add_by_fd(monitor: Monitor, arguments: Mapping[str, object], name: str, fd: int) -> None:
    """Hands a link over to QEMU, with the device for it. Raises CommandError."""
    await monitor.getfd(name, fd)
    try:
        await monitor.execute("device_add", **arguments, fd=name)
    except CommandError:
        with contextlib.suppress(CommandError):
            await monitor.execute("closefd", fdname=name)
        raise


async def add_by_path(monitor: Monitor, arguments: Mapping[str, object], path: str) -> None:
    """Lets QEMU connect to a socket. Raises CommandError, NotReached."""
    try:
        await monitor.execute("device_add", **arguments, socket={"type": "unix", "path": path})
    except CommandError as error:
        if path in str(error):
            raise NotReached(f"QEMU: {error}") from error
        raise
