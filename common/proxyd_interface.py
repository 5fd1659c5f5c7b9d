# SPDX-License-Identifier: GPL-2.0-or-later
"""org.iohub.Proxyd: the Varlink interface of the daemon on a VM's side.

As in common.remoted_interface, annotations are objects, and the description is made of types and docstrings.
"""

from dataclasses import dataclass
from typing import TypedDict

from asyncvarlink import VarlinkInterface, varlinkmethod

__all__ = ["Function", "Proxyd", "StatusReply"]


@dataclass(slots=True, kw_only=True)
class Function:
    """One function; see Proxyd."""

    id: str
    addr: str
    pin: int | None
    gsi: int | None
    connected: bool
    decoded: bool | None
    reconnects: int
    remote_pid: int | None = None
    remote_name: str | None = None
    reason: str | None = None
    answer_mean_us: int | None = None
    answer_max_us: int | None = None
    polled_ms: int | None = None
    amiss: list[str]


class StatusReply(TypedDict):
    """What Status returns; see Proxyd."""

    vm: str
    pid: int
    kind: str
    irqchip: str
    tsc_khz: int | None
    attached: str | None
    reason: str | None
    amiss: list[str]
    functions: list[Function]


class Proxyd(VarlinkInterface, name="org.iohub.Proxyd"):
    """The interrupt lines of one VM, as the daemon on the VM's side sees them.

    Of the VM:
    vm: its name. pid: the daemon's process. kind: the way to the VM, as --vm has it.
    irqchip: who raises the interrupts, kvm, qemu or soft.
    tsc_khz: frequency of the guest's time stamp counter, null where it is unknown.
    attached: where QEMUs come and go, the one that has the functions, as in qemu-system-x86[42].
    reason: why there is none at present, in words.
    amiss: what else an operator should act on that concerns no single function, in words; empty if nothing.

    Of a function:
    id: its device's id. addr: its address, SLOT.FUNCTION, as in 05.0.
    connected: whether there is a link to remoted, or in QEMU one that is good.
    decoded: whether the guest has placed and enabled a BAR, without which no driver reaches the device; null
    without BARs, while that is unknown, and where QEMU knows it.
    pin: its interrupt pin register, 1 to 4 for INTA to INTD, 0: no interrupt; null while it is unknown: never
    connected so far, or QEMU owns the function.
    gsi: where the irqfd is assigned to at present; null while the guest has the pin routed nowhere, while the
    function is not connected, and where QEMU assigns it.
    reconnects: how often a lost link was replaced by a new one.
    remote_pid, remote_name: the process that listens at the device's socket; null while not connected.
    reason: why it is not connected, in words; null while it is.
    answer_mean_us, answer_max_us: for how long the guest's CPU has waited for an answer in the last minute or two,
    in microseconds; null if it has asked nothing, and where QEMU asks.
    polled_ms: milliseconds for which it has looked for answers before it slept; null where QEMU asks, and with
    pid:.
    amiss: what else an operator should act on, in words; empty if nothing.
    """

    @varlinkmethod
    def Status(self) -> StatusReply:
        """The VM, and every function's route and link."""
        raise NotImplementedError
