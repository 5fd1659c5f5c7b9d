# SPDX-License-Identifier: GPL-2.0-or-later
"""org.iohub.Proxyd: what the VM's side answers at its control socket."""

# No `from __future__ import annotations`: asyncvarlink reads the methods' types.
import contextlib
import os
import socket

from asyncvarlink import varlinkmethod

from common.amiss import one_line
from common.errors import UntrustedError
from common.pci import format_devfn
from common.peer import PeerCredentials, peer_credentials
from common.proxyd_interface import Function, Proxyd, StatusReply
from common.trust import TRUST
from proxyd.vmstate import FunctionState, VmState

__all__ = ["ProxydService"]


class ProxydService(Proxyd):
    """The interface's methods."""

    def __init__(self, state: VmState) -> None:
        """``state`` is read at each call."""
        self._state = state

    @varlinkmethod
    def Status(self) -> StatusReply:
        """The VM, and every function's route and link."""
        state = self._state
        return {
            "vm": state.vm,
            "pid": os.getpid(),
            "kind": state.kind,
            "irqchip": state.irqchip,
            "tsc_khz": state.tsc_khz,
            "attached": state.attached,
            "reason": None if state.reason is None else one_line(state.reason),
            "amiss": state.amiss.texts(),
            "functions": [self._function_status(function) for function in state.functions],
        }

    def _function_status(self, proxy: FunctionState) -> Function:
        remote = proxy.remote  # read once: another thread may lose the link meanwhile
        if remote is not None and self._state.remoted is not None and _has_ended(remote.pid):
            # The service manager has kept the link: the next remoted goes on with it.
            remote = _find_listener(self._state.remoted) or remote
        return _make_status(proxy, remote)


def _has_ended(pid: int) -> bool:
    """Whether there is no such process any more; False for one in another PID namespace."""
    try:
        os.kill(pid, 0) if pid else None
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _find_listener(path: str) -> PeerCredentials | None:
    """Who listens at a socket; None if nobody does. Never blocks."""
    with (
        contextlib.suppress(OSError, UntrustedError),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock,
    ):
        TRUST.connect(sock, path)
        return peer_credentials(sock)
    return None


def _make_status(proxy: FunctionState, remote: PeerCredentials | None) -> Function:
    status = Function(
        id=proxy.name,
        addr=format_devfn(proxy.devfn),
        pin=proxy.pin,
        gsi=proxy.gsi,
        connected=remote is not None,
        decoded=proxy.is_decoded,
        reconnects=proxy.reconnects,
        amiss=proxy.amiss.texts(),
    )
    times = proxy.answer_times
    if times is not None:
        status.answer_mean_us, status.answer_max_us = (round(seconds * 1e6) for seconds in times)
    if proxy.polled_seconds is not None:
        status.polled_ms = round(proxy.polled_seconds * 1e3)
    if remote is None:
        status.reason = one_line(proxy.reason or "not connected yet")
    else:
        status.remote_pid = remote.pid
        status.remote_name = remote.name
    return status
