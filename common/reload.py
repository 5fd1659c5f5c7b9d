# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGHUP: the configuration is read again, and its devices become those that the daemon has."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from common.config import VmConfig
from common.errors import IohubError, UsageError
from common.journal import RateLimited
from common.loop import Loop
from common.messages import Event
from common.service import notify

__all__ = ["reload_on_sighup"]


def reload_on_sighup(
    loop: Loop,
    log: RateLimited,
    config: VmConfig,
    reread: Callable[[], VmConfig],
    change: Callable[[VmConfig], None],
) -> None:
    """Lets SIGHUP call ``change`` with what ``reread`` returns, if ``config`` has come from a file.

    Otherwise SIGHUP ends the process, as ever. Either may raise IohubError or OSError: then the daemon goes on as
    it was, with the reason in its log. The service manager is told as systemd.service(5) has it for notify-reload.
    """

    def reload() -> None:
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            changed = reread()
            _check_same_vm(config, changed)
            change(changed)
        except (IohubError, OSError) as error:
            log.error("not reloaded: %s", error, event=Event.NOT_RELOADED)
        else:
            log.info("reloaded: %s", ", ".join(device.id for device in changed.devices), event=Event.RELOADED)
        notify("READY=1")

    if config.is_from_file:
        loop.on_signal(signal.SIGHUP, reload)


def _check_same_vm(old: VmConfig, new: VmConfig) -> None:
    if not new.devices:
        raise UsageError("no devices: stop the daemon instead")
    for key, before, after in (
        ("name", old.name, new.name),
        ("runtime-dir", old.runtime_dir, new.runtime_dir),
        ("vm", old.vm, new.vm),
        ("allow-users", old.allow_users, new.allow_users),
    ):
        if before != after:
            raise UsageError(f"{key} can't change while the daemon runs: restart it")
