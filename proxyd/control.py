# SPDX-License-Identifier: GPL-2.0-or-later
"""org.iohub.Proxyd: what the VM's side answers at its control socket."""

# No `from __future__ import annotations`: asyncvarlink reads the methods' types.
import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Protocol

from asyncvarlink import varlinkmethod

from common.amiss import Amiss, one_line
from common.errors import UntrustedError
from common.lostlines import LOST
from common.pci import format_devfn
from common.peer import PeerCredentials, peer_credentials
from common.proxyd_interface import Function, Proxyd, StatusReply
from common.trust import TRUST

__all__ = ["FunctionState", "ProxydService", "describe"]


class FunctionState(Protocol):
    """What Status tells of a function; the fields' meanings are in the interface's definition."""

    name: str
    devfn: int
    reconnects: int
    reason: str
    """why there is no link, or why there was none before this one; empty before the first attempt"""
    amiss: Amiss

    @property
    def pin(self) -> int | None: ...

    @property
    def answer_times(self) -> tuple[float, float] | None: ...

    @property
    def is_decoded(self) -> bool | None: ...

    @property
    def gsi(self) -> int | None: ...

    @property
    def remote(self) -> PeerCredentials | None: ...


class ProxydService(Proxyd):
    """The interface's methods."""

    def __init__(
        self,
        vm: str,
        kind: str,
        irqchip: str,
        tsc_khz: int | None,
        proxies: Sequence[FunctionState],
        remoted: str | None = None,
    ) -> None:
        """``kind`` and ``irqchip`` as in the interface; ``tsc_khz`` of the guest, None when unknown.

        What is public may be set when it is known; ``proxies`` is read at each call. ``remoted`` is the control
        socket of remoted.
        """
        self.irqchip = irqchip
        self.tsc_khz = tsc_khz
        self.amiss = Amiss()
        """what concerns no single function"""
        self.amiss.add(LOST.amiss)
        self.attached: str | None = None
        self.reason: str | None = None
        self._vm = vm
        self._kind = kind
        self._proxies = proxies
        self._remoted = remoted

    @varlinkmethod
    def Status(self) -> StatusReply:
        """The VM, and every function's route and link."""
        return {
            "vm": self._vm,
            "pid": os.getpid(),
            "kind": self._kind,
            "irqchip": self.irqchip,
            "tsc_khz": self.tsc_khz,
            "attached": self.attached,
            "reason": None if self.reason is None else one_line(self.reason),
            "amiss": self.amiss.texts(),
            "functions": [self._function_status(proxy) for proxy in self._proxies],
        }

    def _function_status(self, proxy: FunctionState) -> Function:
        remote = proxy.remote  # read once: another thread may lose the link meanwhile
        if remote is not None and self._remoted is not None and _has_ended(remote.pid):
            # The service manager has kept the link: the next remoted goes on with it.
            remote = _find_listener(self._remoted) or remote
        return _make_status(proxy, remote)


def describe(functions: Sequence[FunctionState]) -> str:
    """How many functions there are, and how many have their links."""
    linked = sum(function.remote is not None for function in functions)
    return f"{len(functions)} functions, {linked} of them linked"


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
    if remote is None:
        status.reason = one_line(proxy.reason or "not connected yet")
    else:
        status.remote_pid = remote.pid
        status.remote_name = remote.name
    return status
