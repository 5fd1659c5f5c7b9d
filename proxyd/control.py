# SPDX-License-Identifier: GPL-2.0-or-later
"""org.iohub.Proxyd: what the VM's side answers at its control socket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from common.amiss import Amiss, one_line
from common.link import PeerCredentials
from common.pci import format_devfn

__all__ = ["INTERFACE", "FunctionState", "ProxydInterface"]

INTERFACE = "org.iohub.Proxyd"


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
    def gsi(self) -> int | None: ...

    @property
    def remote(self) -> PeerCredentials | None: ...


class ProxydInterface:
    """The interface's methods, as common/org.iohub.Proxyd.varlink defines them."""

    def __init__(
        self, vm: str, kind: str, irqchip: str, tsc_khz: int | None, proxies: Sequence[FunctionState]
    ) -> None:
        """``kind`` and ``irqchip`` as in the interface; ``tsc_khz`` of the guest, None when unknown.

        What is public may be set when it is known; ``proxies`` is read at each call.
        """
        self.irqchip = irqchip
        self.tsc_khz = tsc_khz
        self.amiss = Amiss()
        """what concerns no single function"""
        self.attached: str | None = None
        self.reason: str | None = None
        self._vm = {"vm": vm, "pid": os.getpid(), "kind": kind}
        self._proxies = proxies

    def Status(self) -> dict[str, object]:
        """The VM, and every function's route and link."""
        functions = [_function_status(proxy) for proxy in self._proxies]
        status: dict[str, object] = {
            **self._vm,
            "irqchip": self.irqchip,
            "amiss": self.amiss.texts(),
            "functions": functions,
        }
        if self.tsc_khz is not None:
            status["tsc_khz"] = self.tsc_khz
        if self.attached is not None:
            status["attached"] = self.attached
        if self.reason is not None:
            status["reason"] = one_line(self.reason)
        return status


def _function_status(proxy: FunctionState) -> dict[str, object]:
    # Another thread may lose the link meanwhile: each is read once.
    gsi, remote, pin = proxy.gsi, proxy.remote, proxy.pin
    status: dict[str, object] = {
        "id": proxy.name,
        "addr": format_devfn(proxy.devfn),
        "connected": remote is not None,
        "reconnects": proxy.reconnects,
        "amiss": proxy.amiss.texts(),
    }
    times = proxy.answer_times
    if times is not None:
        status["answer_mean_us"], status["answer_max_us"] = (round(seconds * 1e6) for seconds in times)
    if pin is not None:
        status["pin"] = pin
    if gsi is not None:
        status["gsi"] = gsi
    if remote is None:
        status["reason"] = one_line(proxy.reason or "not connected yet")
    else:
        status["remote_pid"] = remote.pid
        name = remote.name
        if name is not None:
            status["remote_name"] = name
    return status
