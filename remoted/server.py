# SPDX-License-Identifier: GPL-2.0-or-later
"""Serves one device: at a socket by path, or on an inherited connection; one client at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

from common.disposal import Disposal
from common.errors import IohubError, ShortageError, UsageError
from common.journal import RateLimited
from common.listen import UnixListener
from common.loop import Loop
from common.messages import Event
from common.peer import peer_credentials
from remoted.function import PciFunction
from remoted.iohub import Line, Pirq
from remoted.msi import VectorKind
from remoted.session import Session

if TYPE_CHECKING:
    from common.fdstore import FdStore
    from remoted.keeper import Keeper
    from remoted.ramfiles import RamFiles
    from remoted.vfiouser.keeper import VfioUserKeeper
    from remoted.vfiouser.session import VfioUserSession
    from remoted.vfiouser.vectors import Vectors

__all__ = ["DeviceServer", "adopt_connection"]

_KINDS = {VectorKind.MSI: "MSI", VectorKind.MSIX: "MSI-X"}


class DeviceServer:
    """Owns a function, its listening socket (or none) and its session (or none)."""

    def __init__(
        self, loop: Loop, function: PciFunction, interrupts: Pirq | Vectors, on_idle: Callable[[], None]
    ) -> None:
        """``interrupts`` are the function's: a Pirq for mpqemu, Vectors for vfio-user.

        ``on_idle`` is called when a client has gone.
        """
        self.function = function
        self.interrupts = interrupts
        self.session: Session | VfioUserSession | None = None
        self.refused = 0
        """clients refused because another one was being served"""
        self._rejected = 0  # in sessions that have ended
        self._accesses = 0  # likewise
        self._seen_accesses = 0  # by the last call of quiet_seconds(), since _quiet_since
        self._quiet_since = loop.time()
        self._is_refusal_told = False
        self._loop = loop
        self._on_idle = on_idle
        self._listener: UnixListener | None = None
        self._log = RateLimited(function.host.log)
        self._disposal = Disposal(lambda: function.host.memory.fds)
        self.line.close_fds = self._disposal.close_fds
        self._keeper: Keeper | None = None
        if not isinstance(interrupts, Pirq):
            self._open_vfiouser = self._vfiouser_opener(interrupts)
        function.amiss.add(self._amiss)

    @property
    def line(self) -> Line:
        """The function's INTx line."""
        return self.interrupts if isinstance(self.interrupts, Pirq) else self.interrupts.line

    @property
    def messages(self) -> int:
        """How many MSI and MSI-X messages were sent."""
        return 0 if isinstance(self.interrupts, Pirq) else self.interrupts.sent

    @property
    def interrupts_in_use(self) -> tuple[str | None, int]:
        """How interrupts reach the guest at present, by name, and how many eventfds there are for that.

        The name is None if there are none.
        """
        if not isinstance(self.interrupts, Pirq) and (kind := self.interrupts.kind_in_use) is not None:
            return _KINDS[kind], self.interrupts.attached(kind)
        return ("INTx", 1) if self.line.has_irqfd else (None, 0)

    @property
    def is_listening(self) -> bool:
        return self._listener is not None

    @property
    def rejected(self) -> int:
        """How many messages broke the protocol, in all sessions."""
        return self._rejected + (self.session.rejected if self.session is not None else 0)

    @property
    def accesses(self) -> int:
        """How many messages were handled, in all sessions."""
        return self._accesses + (self.session.accesses if self.session is not None else 0)

    def quiet_seconds(self) -> float:
        """For how long no message has come, as far as this was asked: the hot path reads no clock."""
        accesses, now = self.accesses, self._loop.time()
        if accesses != self._seen_accesses:
            self._seen_accesses, self._quiet_since = accesses, now
        return now - self._quiet_since

    def listen(self, path: str) -> None:
        """Takes clients at a path. Raises UsageError."""
        self._listener = UnixListener(
            self._loop, path, self._on_client, self._log, self._disposal, takes_fds=True
        )
        self._order_clients()
        self.function.host.log.info("listening on %s", path)

    def serve(self, sock: socket.socket) -> None:
        """Serves a connected socket, which it owns from here on. Raises ShortageError."""
        self._log.info("connected", event=Event.CLIENT_CONNECTED, peer=self._begin_session(sock))

    def _vfiouser_opener(self, vectors: Vectors) -> Callable[[socket.socket], VfioUserSession]:
        """What begins a session of vfio-user on a connected socket."""
        from remoted.vfiouser.irqs import Irqs  # only where it is used
        from remoted.vfiouser.session import VfioUserSession

        irqs = Irqs(vectors, self.function)

        def open_session(sock: socket.socket) -> VfioUserSession:
            keeper = cast("VfioUserKeeper | None", self._keeper)
            return VfioUserSession(
                self._loop, sock, self.function, irqs, self._on_end, self._log, self._disposal, keeper
            )

        return open_session

    def _open_session(self, sock: socket.socket) -> Session | VfioUserSession:
        if not isinstance(self.interrupts, Pirq):
            return self._open_vfiouser(sock)
        return Session(
            self._loop,
            sock,
            self.function,
            self.interrupts,
            self._on_end,
            self._log,
            self._disposal,
            self._keeper,
        )

    def _begin_session(self, sock: socket.socket) -> str:
        """Returns who the client is."""
        self.session = self._open_session(sock)
        self._order_clients()
        self._is_refusal_told = False
        return self.session.client

    def keep(self, store: FdStore, ram_files: RamFiles, devfn: int) -> None:
        """Continues with what the previous process left, and keeps state and link for the next one.

        It resets the function if nothing was left. Raises OSError.
        """
        # Each only where it is used.
        if isinstance(self.interrupts, Pirq):
            from remoted.keeper import Keeper

            self._keeper = Keeper(store, ram_files, devfn, self.function, self.line, self._disposal)
        else:
            from remoted.vfiouser.keeper import VfioUserKeeper

            self._keeper = VfioUserKeeper(
                store, ram_files, devfn, self.function, self.interrupts, self._disposal
            )
        sock = self._keeper.take_socket()
        if sock is not None:
            client = str(peer_credentials(sock))
            try:
                self._begin_session(sock)
            except IohubError as error:
                self._log.info(
                    "the link of the previous process has ended: %s",
                    error,
                    event=Event.RESUME_FAILED,
                    peer=client,
                )
            else:
                self._log.info(
                    "continues the link of the previous process", event=Event.TAKEN_UP, peer=client
                )
        self._keeper.go_on()

    def stop_listening(self) -> None:
        """Takes no further client, and unlinks the socket."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def retire(self) -> None:
        """Takes no further client; the device is to be removed when the present one has gone."""
        self.stop_listening()
        if self.session is not None:
            self._log.info("is removed when its client has gone", peer=self.session.client)

    def discard(self) -> None:
        """Closes the device for good, with its line low; nothing of it is kept. It must have no client."""
        self.function.full_reset()
        if self._keeper is not None:
            self._keeper.discard()
        self.close()
        self._log.info("removed")

    def hang_up(self) -> None:
        """Ends the session and unlinks the socket. A link that is kept goes on in the next process."""
        self.stop_listening()
        if self.session is not None:
            self.session.leave()

    def close(self) -> None:
        """Ends the session, unlinks the socket and closes the device."""
        self.hang_up()
        self._disposal.close_fds(self.function.shut_down())
        if self._keeper is not None:
            self._keeper.close()

    def _order_clients(self) -> None:
        """The end of a client is handled before a next client that is reported in the same pass."""
        if self._listener is not None and self.session is not None:
            self._loop.order(self._listener.fileno(), after=self.session.fileno())

    def _amiss(self) -> Iterator[str]:
        if self.session is not None and self.session.ram_refusal:
            yield f"DMA is impossible, the guest's RAM was refused: {self.session.ram_refusal}"
        if complaint := self.function.host.memory.complaint:
            yield f"DMA is impossible: {complaint}"
        if self.line.level and not self.function.is_decoded:
            yield "its line is high, but the guest has its BARs disabled: no driver can acknowledge it"

    def _on_client(self, sock: socket.socket) -> None:
        if self.session is None:
            client = str(peer_credentials(sock))
            try:
                self.serve(sock)
            except ShortageError as error:
                self._log.warning("can't be served: %s", error, event=Event.SHORTAGE, peer=client)
            return
        self.refused += 1
        if not self._is_refusal_told:  # once a session: a refused client may try again each second
            self._is_refusal_told = True
            client = str(peer_credentials(sock))
            self._log.warning(
                "refused: %s is being served", self.session.client, event=Event.CLIENT_BUSY, peer=client
            )
        self._disposal.hang_up(sock)

    def _on_end(self) -> None:
        self._rejected, self._accesses = self.rejected, self.accesses
        self.session = None
        self._on_idle()


def adopt_connection(fd: int, device: str) -> socket.socket:
    """The connected UNIX stream socket that was inherited as ``fd``. Raises UsageError."""
    where = f"--device id={device}: fd={fd}"
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}") from error
    try:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise UsageError(f"{where} is not a UNIX stream socket")
        sock.getpeername()
    except OSError as error:
        sock.close()
        raise UsageError(f"{where} is not connected") from error
    except UsageError:
        sock.close()
        raise
    return sock
