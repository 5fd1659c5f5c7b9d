# SPDX-License-Identifier: GPL-2.0-or-later
"""org.iohub.Proxyd: what the VM's side answers at its control socket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from common.link import PeerCredentials
from common.pci import format_devfn

__all__ = ["INTERFACE", "FunctionState", "ProxydInterface"]

INTERFACE = "org.iohub.Proxyd"


class FunctionState(Protocol):
    """What Status tells of a function; the fields' meanings are in the interface's definition."""

    name: str
    devfn: int
    reconnects: int

    @property
    def pin(self) -> int: ...

    @property
    def gsi(self) -> int | None: ...

    @property
    def remote(self) -> PeerCredentials | None: ...


class ProxydInterface:
    """The interface's methods, as common/org.iohub.Proxyd.varlink defines them."""

    def __init__(
        self, vm: str, kind: str, irqchip: str, tsc_khz: int | None, proxies: Sequence[FunctionState]
    ) -> None:
        """``kind`` and ``irqchip`` as in the interface; ``tsc_khz`` of the guest, None when unknown."""
        self._vm = {"vm": vm, "pid": os.getpid(), "kind": kind, "irqchip": irqchip}
        if tsc_khz is not None:
            self._vm["tsc_khz"] = tsc_khz
        self._proxies = proxies

    def Status(self) -> dict[str, object]:
        """The VM, and every function's route and link."""
        return {**self._vm, "functions": [_function_status(proxy) for proxy in self._proxies]}


def _function_status(proxy: FunctionState) -> dict[str, object]:
    # Another thread may lose the link meanwhile: each is read once.
    gsi, remote = proxy.gsi, proxy.remote
    status: dict[str, object] = {
        "id": proxy.name,
        "addr": format_devfn(proxy.devfn),
        "pin": proxy.pin,
        "connected": remote is not None,
        "reconnects": proxy.reconnects,
    }
    if gsi is not None:
        status["gsi"] = gsi
    if remote is not None:
        status["remote_pid"] = remote.pid
        name = remote.name
        if name is not None:
            status["remote_name"] = name
    return status
