# SPDX-License-Identifier: GPL-2.0-or-later
"""iohub-remoted: runs a VM's devices outside of it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from common import eventsignal
from common.config import VmConfig, parse_remoted
from common.controlsocket import ControlServer
from common.errors import IohubError, UsageError
from common.fdstore import FdStore
from common.journal import RateLimited, report_failure, setup
from common.loop import Loop
from common.messages import Event
from common.output import OutputError, complain
from common.privilege import renounce
from common.rate import Rate
from common.reload import reload_on_sighup
from common.service import (
    dump_stacks_on_crash,
    feed_watchdog,
    freeze_heap,
    notify,
    pause_before_restart,
    raise_fd_limit,
)
from common.stdio import flush_stdio
from common.trust import TRUST
from remoted.guard import log_stray_errors
from remoted.roster import Roster
from remoted.watchdog import Doing, Watchdog

if TYPE_CHECKING:
    from remoted.control import RemotedService

__all__ = ["main"]

PROGRAM = "iohub-remoted"


class Remoted:
    """The daemon: hub, devices, servers.

    SIGTERM and SIGINT end it after the present pass of the loop. One that comes before the loop runs, or when the
    daemon is ending already, kills it: device code may keep the loop for ever.
    """

    def __init__(self, config: VmConfig) -> None:
        """Creates every device and starts to listen. Raises UsageError."""
        self._config = config
        self._loop = Loop(poll_limit=config.poll_max_us / 1e6)
        self._watchdog = Watchdog()
        self._roster = Roster(PROGRAM, self._loop, self._watchdog, self._on_idle)
        self._control: ControlServer | None = None
        self._store: FdStore | None = None
        log = logging.getLogger(PROGRAM)
        self._log = RateLimited(log)
        self._is_serving = False
        self._rate = Rate(self._loop.time)
        """of interrupts"""
        try:
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._loop.stop_on_signal(signum)
                signal.signal(signum, self._on_signal)
            log_stray_errors(log)
            self._watchdog.start()
            self._store = FdStore.open(self._loop, self._log, os.environ)
            path = config.own_socket_path("remoted.varlink")
            self._control = ControlServer(self._loop, path, self._make_interface, log)
            self._watchdog.while_stalled = self._refuse_calls
            self._roster.start(config, self._store)
        except BaseException:
            self.close()
            raise

    def run(self, reread: Callable[[], VmConfig]) -> None:
        """Serves until SIGTERM or SIGINT, or until the last inherited link has closed.

        ``reread()`` reads the configuration again; it raises UsageError.
        """
        reload_on_sighup(self._loop, self._log, self._config, reread, self._roster.change)
        self._is_serving = True
        notify("READY=1")
        feed_watchdog(self._loop, self._describe)
        freeze_heap()
        self._loop.run()
        self._is_serving = False
        notify("STOPPING=1")

    def close(self) -> None:
        """Ends sessions, unlinks sockets, closes devices and eventfds."""
        self._hang_up()
        self._roster.close()
        if self._store is not None:
            self._store.close()
        self._watchdog.close()
        self._loop.close()

    def _hang_up(self) -> None:
        if self._control is not None:
            self._control.close()
        for server in self._roster.servers:
            server.hang_up()

    def _make_interface(self) -> RemotedService:
        """What answers calls at the control socket, which is loaded when the first one comes."""
        from remoted.control import RemotedService

        return RemotedService(self._config.name, self._roster.devices, self._loop.polling)

    def _describe(self) -> str:
        """The state in one line, with the interrupts of the time since the line before."""
        servers = self._roster.servers
        rate = self._rate.update(
            sum(server.line.raised + server.line.reasserts + server.messages for server in servers)
        )
        linked = sum(server.session is not None for server in servers)
        return f"{len(servers)} functions, {linked} of them linked, {rate:.0f} interrupts/s"

    def _refuse_calls(self, doing: Doing, seconds: float) -> None:
        """Says at the control socket what keeps the loop from answering there; in the watchdog's thread."""
        guard = doing[0]
        hosts = [server.function.host for server in self._roster.servers]
        names = [host.name for host in hosts if host.guard is guard]

        def reply() -> bytes:
            from common.control import encode
            from common.remoted_interface import Stalled

            error = Stalled(device="".join(names), reason=guard.describe_stall(doing, seconds))
            return encode(error.toreply())

        if self._control is not None:
            self._control.refuse(reply)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self._is_serving and not self._loop.is_stopped:
            self._loop.stop()
            return
        # Whatever this interrupts may be anywhere: it is not expected to be in order.
        with contextlib.suppress(Exception):
            self._log.warning(
                "killed: a second signal, or one outside of the loop", event=Event.KILLED_WHILE_BUSY
            )
        with contextlib.suppress(Exception):
            self._hang_up()
        with contextlib.suppress(Exception):
            flush_stdio()
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    def _on_idle(self) -> None:
        """A client has gone: without listeners and links there is nothing left to do."""
        servers = self._roster.servers
        if self._is_serving and not any(server.is_listening or server.session for server in servers):
            self._loop.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status: 0, or that of a failure (exit_status())."""
    try:
        dump_stacks_on_crash()
        renounce()
        raise_fd_limit()
        eventsignal.prepare()
        config = parse_remoted(argv, _describe_models)
        if not config.devices:
            raise UsageError("no devices: --device gives one, or --config a file with some")
        setup(PROGRAM, config.name, verbose=config.verbose)
        TRUST.allow(config.allow_users)
        config.make_runtime_dir()
        remoted = Remoted(config)
    except OutputError as error:
        complain(PROGRAM, error)
        return error.status
    except (IohubError, OSError) as error:
        return pause_before_restart(report_failure(PROGRAM, error))
    try:
        remoted.run(lambda: parse_remoted(argv))
    finally:
        remoted.close()
    return 0


def _describe_models(as_json: bool) -> str:
    from remoted.modellist import describe_models

    return describe_models(as_json)
