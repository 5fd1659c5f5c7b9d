# SPDX-License-Identifier: GPL-2.0-or-later
"""The service manager's side of a daemon's life (sd_notify(3))."""

from __future__ import annotations

import contextlib
import gc
import resource

from systemd import daemon

__all__ = ["freeze_heap", "notify", "raise_fd_limit"]


def notify(state: str) -> None:
    """Tells the manager, if there is one; one that doesn't listen (any more) is no reason to fail."""
    with contextlib.suppress(OSError):
        daemon.notify(state)


def raise_fd_limit() -> None:
    """Raises the soft limit of open fds to the hard one: 256 functions with client and eventfds are over 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def freeze_heap() -> None:
    """Exempts what exists now from garbage collection: it lives as long as the daemon does.

    To look through it takes milliseconds, in which no interrupt is sent, or a VM that is attached to stands still.
    """
    gc.collect()
    gc.freeze()
