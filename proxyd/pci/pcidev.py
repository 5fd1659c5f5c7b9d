# SPDX-License-Identifier: GPL-2.0-or-later
"""The PCI proxy of one function: as QEMU's hw/remote/proxy.c, without the interrupts which that loses.

It forwards config and BAR accesses over the link, keeps a copy of what the guest programs, and assigns the
irqfd to the GSI that the function's interrupt pin is routed to.

While the remote is gone reads give all ones, writes are lost, and nothing is asserted. A new connection gets
back what the guest had programmed (BARs, command, interrupt line) and a fresh pair of eventfds.

Three threads use it: the vCPU's (accesses, routes), the control thread's (attach, teardown), and one for each
connection that is being made, which may take many round trips. One lock guards the link and the pair. It is
never held for longer than one access takes, and never by the thread that connects.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from common import mpqemu, pci
from common.amiss import Amiss
from common.errors import PeerGone, PeerTooSlow, ProtocolError
from common.journal import RateLimited
from common.link import Client
from common.messages import Event
from common.mpqemu import Command
from common.peer import PeerCredentials
from proxyd.kvm.irqchip import Irqchip
from proxyd.pci.bars import Window, decoded_windows
from proxyd.pci.intxpair import IntxPair
from proxyd.pci.ram import Ram
from proxyd.pci.remoteconfig import Identity, identify, read_registers, write_registers
from proxyd.pci.waitbudget import WaitBudget

__all__ = ["PciProxy"]

_ALL_ONES = 0xFFFFFFFFFFFFFFFF
_NO_ROUTES = (None,) * 4


class _Found(NamedTuple):
    """What connect() leaves for attach()."""

    identity: Identity
    generation: int
    """how many resets of the machine there were: after another one, what was found is out of date"""
    registers: bytearray | None
    """the registers that a guest programs, as a reset has left them; None if the guest's own were restored"""


class PciProxy:
    """One function of the guest's bus whose device is behind an mpqemu link."""

    def __init__(
        self,
        name: str,
        devfn: int,
        path: str,
        irqchip: Irqchip,
        log: logging.Logger | logging.LoggerAdapter[logging.Logger],
        on_lost: Callable[[PciProxy], None],
        *,
        deadline: float,
        hung: set[int] | None = None,
        poll_limit: float = 0.0,
        ram: Ram | None = None,
        is_powered_on: bool = False,
    ) -> None:
        """``path`` is the device's socket. A round trip lasts ``deadline`` seconds at most; ``hung`` is for
        WaitBudget, ``poll_limit`` for Client. The function may reach ``ram``.

        ``on_lost`` is called, by whichever thread notices, when an established link is lost. The link's fd
        stays open, and its number taken, until the control thread has forgotten it and calls reap().

        The function is reset when it is linked for the first time, as at a guest's power-on. It isn't with
        ``is_powered_on``: then the guest continues from the saved state of another VM.
        """
        self.name = name
        self.devfn = devfn
        self.identity: Identity | None = None
        self.windows: tuple[Window, ...] = ()
        """where the function's BARs are decoded at present"""
        self.reconnects = 0
        self.reason = ""
        """why there is no link, or was none before this one"""
        self.amiss = Amiss()
        self.path = path
        self._deadline = deadline
        self._poll_limit = poll_limit
        self._polled = 0.0  # seconds, over links that have ended
        self._ram = ram
        self.log = RateLimited(log)
        self._on_lost = on_lost
        self._budget = WaitBudget(hung=hung)
        self.amiss.add(self._budget.amiss)
        self._lock = threading.RLock()
        self._client: Client | None = None
        self._connecting: Client | None = None
        self._found: _Found | None = None
        self._lost: Client | None = None
        self._peer = ""  # the process linked last, for the log: its name can be read only while it lives
        self._aborted = False
        self._was_linked = False
        self._pair = IntxPair(irqchip)
        self._routes: tuple[int | None, ...] = _NO_ROUTES
        self._shadow = bytearray(pci.PCI_CONFIG_SIZE)
        self._generation = 0  # how many resets there were
        self._reset_due = not is_powered_on  # the remote has not seen the last one

    @property
    def remote(self) -> PeerCredentials | None:
        """The process that listens at the link's other end; None without a link."""
        client = self._client
        return None if client is None else client.peer

    @property
    def pin(self) -> int | None:
        """The remote's interrupt pin register, 0 without an interrupt; None before the first connection."""
        return self.identity.pin if self.identity is not None else None

    @property
    def gsi(self) -> int | None:
        """The GSI that the irqfd is assigned to."""
        return self._pair.gsi

    @property
    def is_decoded(self) -> bool | None:
        """Whether the guest has placed and enabled a BAR, so that its driver can reach the device.

        None for a function without BARs, and before the first connection.
        """
        identity = self.identity
        return bool(self.windows) if identity is not None and identity.bars else None

    @property
    def answer_times(self) -> tuple[float, float] | None:
        """Seconds that the guest's CPU has waited for an answer, on average and at most, in the last two minutes.

        None if it has asked nothing.
        """
        return self._budget.times

    @property
    def polled_seconds(self) -> float:
        """For how long the guest's CPU has looked for answers before it slept; more while a link is being lost."""
        client = self._client  # the vCPU's thread may lose it at any time
        return self._polled + (0.0 if client is None else client.polling.seconds)

    def fileno(self) -> int:
        """The link's fd; readable without a request under way it has ended, or should."""
        client = self._client  # the vCPU's thread may lose it at any time
        return -1 if client is None else client.fileno()

    def connect(self) -> None:
        """Connects, gives the function RAM, identifies it, and resets it or gives it its registers back.

        To be called in a thread of its own while there is no link: it takes many round trips. attach() or
        reap() is to follow, in the control thread. Raises PeerGone when nobody listens, or answers in time, and
        ProtocolError when the remote is another function than before.
        """
        with self._lock:
            generation, reset_due, shadow = self._generation, self._reset_due, self._shadow[:]
        self._budget.check()
        client = Client.connect(self.path, self._deadline, self._poll_limit)
        self._connecting = client
        if self._aborted:
            raise PeerGone("the daemon ends")
        # The guest doesn't wait for these, so they have a budget of their own. A remote that uses it up would use
        # up the guest's as well.
        request = partial(WaitBudget().request, client)
        if self._ram is not None:
            client.send(Command.SYNC_SYSMEM, self._ram.sysmem, (self._ram.fd,))
        identity = identify(request)
        if self.identity not in (None, identity):
            raise ProtocolError("the device is not the same function as before the link was lost")
        if reset_due:
            request(Command.DEVICE_RESET, b"")
        if reset_due or self.identity is None:
            registers = read_registers(request)
        else:
            registers = None
            write_registers(request, shadow)
        self._found = _Found(identity, generation, registers)

    def attach(self) -> None:
        """Puts the link into use that connect() has made, with a fresh irqfd pair.

        Raises PeerGone and ProtocolError; reap() is to follow then.
        """
        client, found = self._connecting, self._found
        self._found = None
        if client is None or found is None:
            raise PeerGone("not connected")
        with self._lock:
            if found.generation != self._generation:
                raise PeerGone("the machine was reset while connecting")
            self.identity = found.identity
            try:
                if self.pin:
                    self._pair.create()
                    self._pair.assign(self._route)
                    self._pair.send(client)
            except OSError as error:
                self._pair.close()
                raise PeerGone(f"no irqfd: {error.strerror or error}") from error
            except BaseException:
                self._pair.close()
                raise
            self.reconnects += self._was_linked
            self._was_linked = True
            if found.registers is not None:
                self._shadow = found.registers
            self._reset_due = False
            self._client, self._connecting = client, None
            self._budget.trust(client.peer.pid)
            self._peer = str(client.peer)
            self._update_windows()
        self.log.info(
            "linked to %04x:%04x at %s",
            found.identity.vendor,
            found.identity.device,
            pci.format_devfn(self.devfn),
            event=Event.LINK_UP,
            peer=self._peer,
        )

    def close(self) -> None:
        """Takes the irqfd out of KVM, then closes the pair, then the link. A second call does nothing."""
        with self._lock:
            self._pair.close()
            self._lost, self._client = self._client or self._lost, None
            self.reap()

    def reap(self) -> None:
        """Closes a lost link, and one that was not put into use."""
        self._found = None
        lost, self._lost = self._lost, None
        connecting, self._connecting = self._connecting, None
        for client in (lost, connecting):
            if client is not None:
                client.close()

    def config_read(self, offset: int, size: int) -> int:
        """``size`` (1, 2 or 4) bytes of the function's config space."""
        value = self._request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(offset, 0, size))
        return value & ((1 << 8 * size) - 1)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Writes ``size`` (1, 2 or 4) bytes of the function's config space."""
        value &= (1 << 8 * size) - 1
        with self._lock:
            self._request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(offset, value, size))
            if self._client is None or offset >= pci.PCI_STD_HEADER_SIZE:
                return
            was_disabled = self._is_intx_disabled()
            self._shadow[offset : offset + size] = value.to_bytes(size, "little")
            self._update_windows()
            if self._is_intx_disabled() and not was_disabled:
                # The remote asserts the line no more; KVM still holds what it had asserted.
                self._reassign()

    def bar_read(self, memory: bool, addr: int, size: int) -> int:
        """``size`` bytes at a bus address that one of ``windows`` covers."""
        value = self._request(Command.BAR_READ, mpqemu.BAR.pack(addr, 0, size, memory))
        return value & ((1 << 8 * size) - 1)

    def bar_write(self, memory: bool, addr: int, size: int, value: int) -> None:
        """Writes ``size`` bytes at a bus address that one of ``windows`` covers."""
        self._request(Command.BAR_WRITE, mpqemu.BAR.pack(addr, value, size, memory))

    def set_routes(self, gsis: Sequence[int | None]) -> None:
        """The GSIs that pins A to D of the slot are routed to from now on; None where the router has none.

        A level that is high at this moment arrives on the new GSI.
        """
        with self._lock:
            before = self._route
            self._routes = tuple(gsis)
            if self._route != before:
                self._reassign()

    def abort(self) -> None:
        """Ends the round trips that other threads are waiting in, for good: links are lost. Takes no lock."""
        self._aborted = True
        for client in (self._client, self._connecting):
            if client is not None:
                client.shutdown()

    def quiesce(self) -> None:
        """Takes the irqfd out of the irqchip, lowering the line: first step of a reset, and before a save."""
        with self._lock:
            self._pair.deassign()

    def reset(self) -> None:
        """Resets the remote function and forgets what the guest had programmed; to be called while quiesced.

        A remote without a link, or whose link is lost meanwhile, is reset when it is linked again.
        """
        with self._lock:
            self._generation += 1
            self._reset_due = True
            self._pair.deassign()
            self._routes = _NO_ROUTES
            self._shadow = bytearray(pci.PCI_CONFIG_SIZE)
            if self._client is not None:
                request = partial(self._budget.request, self._client)
                try:
                    request(Command.DEVICE_RESET, b"")
                    self._shadow = read_registers(request)
                    self._reset_due = False
                except (PeerGone, ProtocolError) as error:
                    self._lose(error)
            self._update_windows()

    def check_link(self) -> None:
        """To be called when fileno() is readable: drops a link that has ended, or has an unexpected message."""
        with self._lock:
            if self._client is not None:
                try:
                    self._client.check_quiet()
                except (PeerGone, ProtocolError) as error:
                    self._lose(error)

    def _request(self, command: Command, payload: bytes) -> int:
        with self._lock:
            if self._client is None:
                return _ALL_ONES
            try:
                return self._budget.request(self._client, command, payload)
            except (PeerGone, ProtocolError) as error:
                self._lose(error)
                return _ALL_ONES

    def _lose(self, error: Exception) -> None:
        self.reason = f"link lost: {error}"
        event = Event.REMOTE_TOO_SLOW if isinstance(error, PeerTooSlow) else Event.LINK_LOST
        self.log.warning("%s", self.reason, event=event, peer=self._peer)
        self._pair.close()
        self._polled = self.polled_seconds
        self._lost, self._client = self._client, None
        self._on_lost(self)

    def _reassign(self) -> None:
        try:
            self._pair.assign(self._route)
        except OSError as error:  # a new link gets a new pair, and tries again
            self._lose(error)

    @property
    def _route(self) -> int | None:
        """The GSI that the pin is routed to at present."""
        return self._routes[self.pin - 1] if self.pin else None

    def _is_intx_disabled(self) -> bool:
        return bool(self._shadow[pci.PCI_COMMAND + 1] << 8 & pci.PCI_COMMAND_INTX_DISABLE)

    def _update_windows(self) -> None:
        bars = self.identity.bars if self.identity is not None else ()
        self.windows = decoded_windows(bars, self._shadow)
