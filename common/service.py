# SPDX-License-Identifier: GPL-2.0-or-later
"""The service manager's side of a daemon's life (sd_notify(3))."""

from __future__ import annotations

import contextlib

from systemd import daemon

__all__ = ["notify"]


def notify(state: str) -> None:
    """Tells the manager, if there is one; one that doesn't listen (any more) is no reason to fail."""
    with contextlib.suppress(OSError):
        daemon.notify(state)
