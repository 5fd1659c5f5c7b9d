# SPDX-License-Identifier: GPL-2.0-or-later
"""iohub-proxyd: the VM's side; gives each device's interrupt line to the VM."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol, runtime_checkable

from common import eventsignal
from common.config import Transport, VmConfig, parse_proxyd
from common.errors import IohubError, UsageError
from common.fdstore import FdStore
from common.journal import RateLimited, device_log, report_failure, setup
from common.loop import Loop
from common.messages import Event
from common.output import OutputError, complain
from common.pci import format_devfn
from common.privilege import renounce
from common.reload import reload_on_sighup
from common.service import (
    dump_stacks_on_crash,
    feed_watchdog,
    freeze_heap,
    notify,
    pause_before_restart,
    raise_fd_limit,
)
from common.trust import TRUST

__all__ = ["main"]

PROGRAM = "iohub-proxyd"


class Vm(Protocol):
    """A way to a VM."""

    def run(self) -> int:
        """Says READY=1 and serves until the loop is stopped. Returns the exit status.

        Raises UsageError for a VM that can't be served.
        """

    def describe(self) -> str:
        """The state in one line, for the service manager."""

    def close(self) -> None:
        """Releases the VM."""


@runtime_checkable
class ReloadableVm(Vm, Protocol):
    """A way to a VM whose devices may change while it runs."""

    def reload(self, config: VmConfig) -> None:
        """Makes the devices those of the configuration. Raises UsageError."""


def open_vm(config: VmConfig, loop: Loop, store: FdStore | None) -> Vm:
    """The way that --vm names. ``store`` is that of the unit. Raises UsageError, OSError."""
    kind, _, _argument = config.vm.partition(":")
    if kind != "qmp":
        _refuse_vfio_user(config, kind)
    if kind != "pid" and store is not None:
        store.drop_inherited()  # the unit's VM was another one
    # Each way is imported alone: none needs what the others are made of.
    if kind == "embedded":
        from proxyd.vm.embedded.embedded import Embedded

        return Embedded(PROGRAM, config, loop)
    if kind == "soft":
        from proxyd.vm.soft.soft import Soft

        return Soft(PROGRAM, config, loop)
    if kind == "qmp":
        from proxyd.vm.qmp.plugger import QemuPlugger

        return QemuPlugger(PROGRAM, config, loop, has_store=store is not None)
    from proxyd.vm.pid.attached import Attached

    return Attached(PROGRAM, config, loop, store)


def _refuse_vfio_user(config: VmConfig, kind: str) -> None:
    for device in config.devices:
        if device.transport is Transport.VFIO_USER:
            raise UsageError(f"device {device.id}: --vm {kind} has no transport=vfio-user: qmp:SOCKET has it")


def _tell_unseen(config: VmConfig) -> None:
    """Warns of functions that guests don't look for: those without a function 0 (PCI 3.0, 3.2.2.3.4)."""
    if config.vm.startswith("pid:"):
        return
    devfns = {device.devfn for device in config.devices}
    for device in config.devices:
        first = device.devfn & ~7
        if first not in devfns:
            RateLimited(device_log(PROGRAM, device.id, device.devfn)).warning(
                "%s: guests don't look for it without %s",
                format_devfn(device.devfn),
                format_devfn(first),
                event=Event.FUNCTION_UNSEEN,
            )


def _refuse_change(config: VmConfig) -> None:
    raise UsageError(f"the devices of --vm {config.vm} can't change while it runs: restart the daemon")


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status: 0, 1 when the guest died, or exit_status() of a failure."""
    with ExitStack() as opened:
        try:
            dump_stacks_on_crash()
            renounce()
            raise_fd_limit()
            eventsignal.prepare()
            config = parse_proxyd(argv)
            setup(PROGRAM, config.name, verbose=config.verbose)
            if not config.devices:
                raise UsageError("no devices: --device gives one, or --config a file with some")
            TRUST.allow(config.allow_users)
            config.make_runtime_dir()
            _tell_unseen(config)
            loop = Loop()
            opened.callback(loop.close)
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.stop_on_signal(signum)
            log = RateLimited(logging.getLogger(PROGRAM))
            store = FdStore.open(loop, log, os.environ)
            if store is not None:
                opened.callback(store.close)
            vm = open_vm(config, loop, store)
            opened.callback(vm.close)
        except OutputError as error:
            complain(PROGRAM, error)
            return error.status
        except (IohubError, OSError) as error:
            return pause_before_restart(report_failure(PROGRAM, error))
        try:
            change = vm.reload if isinstance(vm, ReloadableVm) else _refuse_change
            reload_on_sighup(loop, log, config, lambda: parse_proxyd(argv), change)
            feed_watchdog(loop, vm.describe)
            freeze_heap()
            return vm.run()
        except UsageError as error:
            return report_failure(PROGRAM, error)
        finally:
            notify("STOPPING=1")
