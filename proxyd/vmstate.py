# SPDX-License-Identifier: GPL-2.0-or-later
"""What the control socket tells of the VM and its functions, as it is known at present."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.amiss import Amiss
from common.lostlines import LOST
from common.peer import PeerCredentials

__all__ = ["FunctionState", "VmState", "describe"]


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
    def polled_seconds(self) -> float | None: ...

    @property
    def is_decoded(self) -> bool | None: ...

    @property
    def gsi(self) -> int | None: ...

    @property
    def remote(self) -> PeerCredentials | None: ...


class VmState:
    """The VM, in the words of the interface; what may change is set by the way to the VM."""

    def __init__(
        self,
        vm: str,
        kind: str,
        irqchip: str,
        tsc_khz: int | None,
        functions: Sequence[FunctionState],
        remoted: str | None = None,
    ) -> None:
        """``kind`` and ``irqchip`` as in the interface; ``tsc_khz`` of the guest, None when unknown.

        ``functions`` is read at each call. ``remoted`` is the control socket of remoted.
        """
        self.vm = vm
        self.kind = kind
        self.irqchip = irqchip
        self.tsc_khz = tsc_khz
        self.functions = functions
        self.remoted = remoted
        self.amiss = Amiss()
        """what concerns no single function"""
        self.amiss.add(LOST.amiss)
        self.attached: str | None = None
        self.reason: str | None = None


def describe(functions: Sequence[FunctionState]) -> str:
    """How many functions there are, and how many have their links."""
    linked = sum(function.remote is not None for function in functions)
    return f"{len(functions)} functions, {linked} of them linked"
