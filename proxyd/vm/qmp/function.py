# SPDX-License-Identifier: GPL-2.0-or-later
"""One configured function, and QEMU's proxy of it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from select import EPOLLIN, EPOLLRDHUP

from common.amiss import Amiss
from common.config import DeviceConfig, Transport
from common.journal import Log, RateLimited
from common.loop import Loop
from common.messages import Event
from common.peer import PeerCredentials
from proxyd.vm.qmp.handover import Handover
from proxyd.vm.qmp.qemu import DRIVERS

__all__ = ["NOT_ATTACHED", "Function"]

NOT_ATTACHED = "not known: no QEMU is attached"
_STUCK = "QEMU would abort at the unplug of a device that shows MSI-X (msix=off hides it)"
_AT_RISK_STUCK = (
    "QEMU aborts if the guest is reset, or changes its memory map, and at the unplug as well, since the device "
    "shows MSI-X: shut the guest down"
)
_AT_RISK = "QEMU aborts if the guest is reset, or changes its memory map, before it has ejected the function"


class Function:
    """One configured device, and QEMU's proxy of it.

    QEMU's proxy keeps the link that it was created with. A duplicate of it is kept here to see it end; it is
    closed as soon as QEMU's is, since the other side would wait for both. A function that was found plugged has no
    such duplicate, nor has one whose link QEMU has made itself (vfio-user): there the process that serves its
    device is watched instead.
    """

    pin = None
    gsi = None
    answer_times = polled_seconds = None
    is_decoded = None
    """all of them are QEMU's to know"""

    def __init__(self, config: DeviceConfig, path: str, loop: Loop, log: Log) -> None:
        """``path`` is its device's socket."""
        self.config = config
        self.name = config.id
        self.devfn = config.devfn
        self.path = path
        self.reconnects = 0
        self.reason = NOT_ATTACHED
        """the last problem, in words"""
        self.amiss = Amiss()
        self.amiss.add(self._amiss)
        self.remote: PeerCredentials | None = None
        """the process at the other end of QEMU's link; None unless the function is plugged and its link good"""
        self.is_plugged = False
        self.was_plugged = False
        """whether it was when the monitor of this QEMU was lost"""
        self.is_asked = False
        """whether QEMU was told to unplug it, by this daemon or by the one before it"""
        self.is_noted = False
        """whether QEMU has a note of that"""
        self.is_gone = False
        """whether QEMU has unplugged it since the inventory was taken, which may still have it"""
        self.is_out = False
        """whether somebody else has unplugged it"""
        self.handover: Handover | None = None
        """the link, from its examination until QEMU has closed its copy"""
        self.server: PeerCredentials | None = None
        """who will serve QEMU's link, if QEMU makes it itself"""
        self.find_server: Callable[[], Awaitable[PeerCredentials]] | None = None
        """finds who that is; raises PeerGone if nobody will"""
        self.is_broken = False
        """whether QEMU's link was ended from here"""
        self.is_stuck = False
        """whether QEMU aborts when it is unplugged: QEMU 11.1 does if the guest sees MSI-X over vfio-user
        (vfio_user_instance_finalize() of hw/vfio-user/pci.c)"""
        self.find_successor: Callable[[], Awaitable[PeerCredentials | None]] | None = None
        """where the service manager keeps links: finds the process that goes on with this one"""
        self.has_lost_server = False
        """whether it was adopted, and the process that served it has ended: another one may go on with the link"""
        self.log = RateLimited(log)
        self.on_change: Callable[[], None] = lambda: None
        self._loop = loop
        self._watched = -1

    @property
    def driver(self) -> str:
        """QEMU's device for it."""
        return DRIVERS[self.config.transport]

    @property
    def is_ready(self) -> bool:
        """Whether it can be plugged."""
        return self.handover is not None or self.server is not None

    @property
    def is_sound(self) -> bool:
        """Whether it is plugged and its link is good, as far as that can be seen from here."""
        return self.is_plugged and self.remote is not None

    @property
    def fdname(self) -> str:
        """The name that the link has in QEMU from getfd until device_add."""
        return f"iohub-{self.name}"

    def warn(self, text: str, event: Event) -> None:
        """Logs a problem, and keeps it for Status."""
        self.reason = text
        self.log.warning("%s", text, event=event)

    def plugged(self) -> None:
        """QEMU has it now, with a duplicate of the link, whose end is watched, or with a link of its own."""
        self.is_plugged = True
        self.is_asked = False
        self.is_broken = False
        if self.handover is not None:
            self.remote = self.handover.client.peer
            # Not EPOLLIN: every reply to QEMU would wake this process.
            self._watch(self.handover.client.fileno(), EPOLLRDHUP)
        elif self.server is not None:
            self.adopt(self.server)

    def adopt(self, server: PeerCredentials) -> None:
        """QEMU had a proxy already: watches the process that serves it, if that can be watched."""
        self.is_plugged = True
        self.remote = server
        try:
            fd = os.pidfd_open(server.pid)
        except ProcessLookupError:
            self._on_end(0)
        except OSError as error:  # among others: it is in another PID namespace, and has the pid 0 here
            self._warn_unwatched(error)
        else:
            self._watch(fd, EPOLLIN)

    async def follow(self) -> None:
        """Adopts the process that goes on with the link, if one does after that which served it has ended."""
        if self.has_lost_server and self.find_successor is not None:
            server = await self.find_successor()
            self.has_lost_server = False
            if self.is_plugged and server is not None:
                self.log.info("%s goes on with its link", server, event=Event.ADOPTED)
                self.adopt(server)
            elif self.is_plugged:
                self._warn_unlinked()

    def unplugged(self) -> None:
        """QEMU has no proxy of it any more."""
        self.is_plugged = False
        self.release()
        if self.is_asked:
            self.reason = "unplugged"
            self.log.info("unplugged", event=Event.UNPLUGGED)
        else:
            self.leave_out()

    def leave_out(self) -> None:
        """Somebody else has unplugged it."""
        self.is_out = True
        self.warn(
            "unplugged, not by this daemon: it is not plugged again until iohub-proxyd is restarted",
            Event.UNPLUGGED_BY_OTHERS,
        )

    def detach(self) -> None:
        """The monitor of this QEMU is lost."""
        self.was_plugged = self.is_plugged
        self.is_plugged = self.is_gone = False
        self.release()
        self.reason = NOT_ATTACHED

    def forget(self) -> None:
        """The QEMU that it was plugged in is gone."""
        self.was_plugged = self.is_asked = self.is_noted = self.is_out = self.is_broken = False
        self.has_lost_server = False

    def release(self) -> None:
        """Forgets the link, and closes what of it is here."""
        self.remote = self.server = None
        fd, self._watched = self._watched, -1
        handover, self.handover = self.handover, None
        if fd != -1:
            self._loop.remove(fd)
            if handover is None:
                os.close(fd)
        if handover is not None:
            handover.client.close_own_copy()

    def break_link(self) -> None:
        """Ends the link for QEMU, too, which may be waiting for an answer from it."""
        if self.handover is not None:
            self.handover.client.shutdown()
            self.is_broken = True

    def _amiss(self) -> Iterator[str]:
        if self.is_sound and self.is_asked:
            yield "the guest was asked to eject it and has not done so yet; it is plugged again after that"
        if self.is_sound and self.handover is not None:
            yield from self.handover.defects

    def _watch(self, fd: int, events: int) -> None:
        """Watches the link, or the process that serves it, whose pidfd is closed if it can't be watched."""
        try:
            self._loop.add(fd, self._on_end, events)
        except OSError as error:
            self._warn_unwatched(error)
            if self.handover is None:
                os.close(fd)
        else:
            self._watched = fd

    def _warn_unwatched(self, error: OSError) -> None:
        self.log.warning(
            "%s can't be watched (%s): should it end, start this daemon again",
            self.remote,
            error.strerror,
            event=Event.LINK_UNWATCHED,
        )

    def _on_end(self, _events: int) -> None:
        self.has_lost_server = self.handover is None and self.find_successor is not None
        if self.has_lost_server:
            self.reason = f"{self.remote} has ended: waiting for the one that goes on with its link"
            self.log.info("%s", self.reason)
        else:
            self._warn_unlinked()
        self.release()
        self.on_change()

    def lose_link(self) -> None:
        """QEMU's link has ended, although the process that served it goes on."""
        if self.is_sound:
            self._warn_unlinked()
            self.release()
            self.on_change()

    def warn_unlinked(self, what: str) -> None:
        """Logs that there is no link, and what is at stake."""
        if self.config.transport is Transport.VFIO_USER:
            risk = _AT_RISK_STUCK if self.is_stuck else _AT_RISK
            self.warn(f"{what}: the guest reads all ones, and {risk}", Event.PLUGGED_AT_RISK)
        else:
            stake = "QEMU's proxy can't take a new one, the guest reads all ones"
            self.warn(f"{what}: {stake}", Event.PLUGGED_WITHOUT_LINK)

    def warn_stuck(self) -> None:
        """Logs that it stays plugged; not if worse was told already."""
        if self.is_sound:
            self.warn(f"it stays plugged: {_STUCK}", Event.NOT_EJECTED)

    def warn_not_ejected(self, seconds: float) -> None:
        """Logs that the guest hasn't ejected it in time."""
        text = f"the guest has not ejected it within {seconds:g} s; it is replaced as soon as the guest ejects it"
        at_risk = self.config.transport is Transport.VFIO_USER and not self.is_sound
        self.warn(f"{text}; {_AT_RISK}" if at_risk else f"{text} or is reset", Event.NOT_EJECTED)

    def _warn_unlinked(self) -> None:
        remote = "the process before" if self.remote is None else self.remote
        self.warn_unlinked(f"the link to {remote} has ended")
