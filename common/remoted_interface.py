# SPDX-License-Identifier: GPL-2.0-or-later
"""org.iohub.Remoted: the Varlink interface of the daemon that runs a VM's devices.

asyncvarlink reads the types from the annotations, which therefore are objects here, and the description that
clients can ask for (org.varlink.service.GetInterfaceDescription) from types and docstrings.
"""

import enum
from dataclasses import dataclass
from typing import TypedDict

from asyncvarlink import TypedVarlinkErrorReply, VarlinkInterface, varlinkmethod

__all__ = ["Function", "Link", "NoSuchDevice", "NotDrivable", "Polling", "Remoted", "Stalled", "StatusReply"]


class Link(enum.Enum):
    """Whether a device has a client."""

    waiting = "waiting"
    connected = "connected"
    closed = "closed"


@dataclass(slots=True, kw_only=True)
class Function:
    """One device; see Remoted."""

    id: str
    addr: str
    model: str
    level: bool
    asserted: bool
    raised: int
    resamples: int
    reasserts: int
    rejected: int
    refused: int
    accesses: int
    quiet_seconds: int
    errors: int
    has_irqfd: bool
    transport: str
    interrupts: str | None = None
    vectors: int
    messages: int
    link: Link
    client_pid: int | None = None
    client_name: str | None = None
    client_gone: bool | None = None
    amiss: list[str]
    counters: dict[str, int]


@dataclass(slots=True, kw_only=True)
class Polling:
    """How the loop waits for events; see Remoted."""

    window_us: int
    found: int
    missed: int
    spent_ms: int


class StatusReply(TypedDict):
    """What Status returns; see Remoted."""

    vm: str
    pid: int
    polling: Polling
    amiss: list[str]
    functions: list[Function]


class NoSuchDevice(TypedVarlinkErrorReply, interface="org.iohub.Remoted"):
    """There is no device with this id or address."""

    class Parameters:
        """As in the interface."""

        device: str


class NotDrivable(TypedVarlinkErrorReply, interface="org.iohub.Remoted"):
    """The model drives its line itself."""

    class Parameters:
        """As in the interface."""

        device: str
        model: str


class Stalled(TypedVarlinkErrorReply, interface="org.iohub.Remoted"):
    """The code of this device has not returned for seconds, in which no call is answered."""

    class Parameters:
        """As in the interface."""

        device: str
        reason: str


class Remoted(VarlinkInterface, name="org.iohub.Remoted"):
    """The devices of one VM, as the daemon that runs them sees them.

    Of the VM:
    vm: its name. pid: the daemon's process.
    amiss: what an operator should act on that concerns no single device, in words; empty if nothing.
    polling: how the loop waits for messages. window_us: for how many microseconds it polls at present before it
    sleeps, which adapts to what comes. found: waits that polling ended. missed: waits that it did not end.
    spent_ms: milliseconds of CPU time that polling has taken.

    Of a function:
    id: its device's id. model: what the device is. addr: its address, SLOT.FUNCTION, as in 05.0.
    level: what the device drives. asserted: what reaches the interrupt line, false while INTX_DISABLE is set.
    Counters begin with the daemon. raised: rises of the line. resamples: acknowledgements (EOI) that KVM reported.
    reasserts: irqfd writes for a line that was high already. rejected: messages that broke the protocol.
    refused: clients turned away because another was served. accesses: messages handled, most of them the guest's
    accesses. quiet_seconds: for how long at least that number has been the same; this is known only as far back as
    Status was called. errors: exceptions in the device's code.
    has_irqfd: there is an eventfd that asserts the line in the guest.
    transport: what its clients speak, mpqemu or vfio-user. interrupts: how interrupts reach the guest at present:
    INTx, MSI or MSI-X; null while the client has attached no eventfd. vectors: how many have one; 1 for INTx.
    messages: MSI and MSI-X messages sent.
    link: waiting: listening, no client; connected: a client is served; closed: the inherited connection has ended.
    client_pid, client_name: the process that has connected; the name is null when that had gone before it could
    be read. client_gone: that process has ended, and the link lives on in another. All three are null without a
    client.
    amiss: what an operator should act on and the other fields don't tell, in words; empty if nothing.
    counters: what its model counts by itself. Of a pci-serial, in bytes: dropped_output, which nobody was there to
    take, and dropped_input, which the guest didn't read. Of an nvme: reads, writes, failed_commands, and
    media_errors, of which the image was the cause.
    """

    errors = (NoSuchDevice, NotDrivable, Stalled)

    @varlinkmethod
    def Status(self) -> StatusReply:
        """Every function's line, counters and link."""
        raise NotImplementedError

    @varlinkmethod
    def Raise(self, *, device: str) -> None:
        """Asserts the INTx line of a device whose model allows it, such as irq-line, named by id or address."""
        raise NotImplementedError

    @varlinkmethod
    def Lower(self, *, device: str) -> None:
        """Deasserts such a line."""
        raise NotImplementedError
