# SPDX-License-Identifier: GPL-2.0-or-later
"""One vfio-user client served: request -> function -> reply.

Requests are handled one by one in the order in which they came, posted writes among them. A request that is wrong,
or asks for something that does not exist, is answered with an errno, and changes nothing. What ends a session is
told in remoted.clientsession. The client decodes BARs by itself: an access names a region and an offset in it.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Mapping
from select import EPOLLIN, EPOLLOUT
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple, cast

from common import vfiouser
from common.disposal import Disposal
from common.errors import PeerGone, ProtocolError, ShortageError
from common.journal import RateLimited
from common.loop import Loop, Timer
from common.messages import Event
from common.vfiouser import HEADER, Command, DeviceFlag, DmaFlag, Flag, RefusedError, UnmapFlag
from remoted.clientsession import HALF_MESSAGE_SECONDS, ClientLink, ClientSession
from remoted.function import PciFunction
from remoted.memory import MapError
from remoted.vfiouser.irqs import Irqs
from remoted.vfiouser.link import VfioUserLink
from remoted.vfiouser.regions import Regions
from remoted.vfiouser.version import reply_to_version

if TYPE_CHECKING:
    from remoted.vfiouser.keeper import VfioUserKeeper
    from remoted.vfiouser.keptlink import KeptVfioUserLink

__all__ = ["VfioUserSession"]

_ACCESS = Struct(HEADER.format + vfiouser.REGION_ACCESS.format.removeprefix("<"))
_unpack_access = _ACCESS.unpack_from
_pack_access = _ACCESS.pack
# As ints: an operator of IntFlag is a function in Python.
_TYPE = 0xF
_REPLY = int(Flag.REPLY)
_NO_REPLY = int(Flag.NO_REPLY)
_EVENTS: dict[int, Event] = {Command.DEVICE_SET_IRQS: Event.IRQFD_REFUSED, Command.DMA_MAP: Event.RAM_REFUSED}
_RAM_SECONDS = 1.0
"""how long a client may map regions without fds before that is taken for all of its RAM"""


class _Request(NamedTuple):
    """The header of a request that is being handled."""

    id: int
    command: int
    size: int
    flags: int
    error: int


class _Handlers(dict[int, Callable[[], None]]):
    """Handlers by command, and one for all other commands."""

    def __init__(self, other: Callable[[], None]) -> None:
        super().__init__()
        self._other = other

    def __missing__(self, _command: int) -> Callable[[], None]:
        return self._other


class VfioUserSession(ClientSession):
    """Serves one vfio-user client of one function until either end closes the link."""

    _link: VfioUserLink | KeptVfioUserLink

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        function: PciFunction,
        irqs: Irqs,
        on_end: Callable[[], None],
        log: RateLimited,
        disposal: Disposal,
        keeper: VfioUserKeeper | None = None,
    ) -> None:
        """As ClientSession; ``irqs`` are the function's."""
        self._irqs = irqs
        self._regions = Regions(function)
        self._request = _Request(0, 0, 0, 0, 0)
        self._unsent: tuple[bytes, tuple[int, ...]] | None = None
        """a reply, and fds that go with it, for which there is no room"""
        self._reply_fds: tuple[int, ...] = ()
        """what goes with the reply to the request"""
        self._refused_ram = -1
        """the address of the RAM that was refused last"""
        self._ram_timer: Timer | None = None
        self._is_complaint_told = False
        self._client_keeper = keeper
        super().__init__(loop, sock, function, on_end, log, disposal, keeper)
        self._frame = self._link.frame
        self._link_send = self._link.send
        if self._link.is_negotiated:
            self._begin()
            self._order_eoi(irqs.line.unmaskfd)
        if self._link.has_unsent:
            self._wait_for_room(b"", ())

    def _open_link(self, sock: socket.socket) -> tuple[ClientLink, Mapping[int, Callable[[], None]]]:
        self._requests: dict[int, Callable[[], bytes]] = {Command.VERSION: self._version}
        link: VfioUserLink | KeptVfioUserLink
        if self._client_keeper is None:
            link = VfioUserLink(sock, self._disposal)
        else:
            link = kept = self._client_keeper.client_link(sock)
            kept.hold, kept.stored = self._hold, lambda: self._go_on(kept)
        self._table = _Handlers(self._finished(self._serve, link))
        return link, self._table

    def _go_on(self, link: KeptVfioUserLink) -> None:
        """The fd store has the files of the last request: that is answered, and the next one is handled."""
        if link.closed:
            return
        try:
            link.finish_stored()
        except (PeerGone, ProtocolError, ShortageError) as error:
            self._end(error)
            return
        self._stored()
        if link.has_unsent:
            self._wait_for_room(b"", ())

    def _drop_interrupts(self) -> None:
        if self._ram_timer is not None:
            self._ram_timer.cancel()
        self._irqs.drop()

    @staticmethod
    def _finished(handler: Callable[[], None], link: ClientLink) -> Callable[[], None]:
        if isinstance(link, VfioUserLink):
            return handler
        finish = cast("KeptVfioUserLink", link).finish

        def handle() -> None:
            handler()
            finish()

        return handle

    def _serve(self) -> None:
        """Handles any request but the accesses to regions, which have handlers of their own after VERSION."""
        self._request = request = _Request._make(HEADER.unpack_from(self._frame))
        if request.flags & _TYPE:
            vfiouser.check_header(request.command, request.size, request.flags)  # not done for all
        try:
            reply = self._reply_to(request)
        except RefusedError as error:
            self._refuse(error)
        else:
            self._reply(reply)

    def _reply_to(self, request: _Request) -> bytes:
        handler, rule = self._requests.get(request.command), vfiouser.RULES.get(request.command)
        if handler is None or rule is None:
            if Command.DEVICE_RESET not in self._requests:
                raise RefusedError(errno.EINVAL, "comes before VERSION")
            if request.command == Command.VERSION:
                raise RefusedError(errno.EINVAL, "comes a second time")
            # DEVICE_FEATURE: as the kernel answers to features that a device doesn't have.
            raise RefusedError(errno.EINVAL if request.command == Command.DEVICE_FEATURE else errno.ENOTSUP)
        size = request.size - HEADER.size
        if not rule.least <= size <= rule.most:
            raise RefusedError(errno.EINVAL, f"{size} bytes of payload")
        return handler()

    @property
    def _payload(self) -> memoryview:
        return self._link.payload[: self._request.size - HEADER.size]

    def _reply(self, payload: bytes) -> None:
        request = self._request
        fds, self._reply_fds = self._reply_fds, ()
        if not request.flags & Flag.NO_REPLY:
            size = HEADER.size + len(payload)
            self._send(HEADER.pack(request.id, request.command, size, Flag.REPLY, 0) + payload, fds)

    def _refuse(self, error: RefusedError) -> None:
        request, text = self._request, str(error)
        if text:
            event = _EVENTS.get(request.command, Event.CLIENT_BROKE_PROTOCOL)
            self._reject(ProtocolError(f"{vfiouser.command_name(request.command)}: {text}"), event)
        if not request.flags & Flag.NO_REPLY:
            flags = Flag.REPLY | Flag.ERROR
            self._send(HEADER.pack(request.id, request.command, HEADER.size, flags, error.code))

    def _send(self, message: bytes, fds: tuple[int, ...] = ()) -> None:
        """Sends a reply, or keeps it while there is no room: then no further request is read until there is.

        The client may have sent many requests before it reads their replies.
        """
        if not self._link_send(message, fds):
            self._wait_for_room(message, fds)

    def _wait_for_room(self, message: bytes, fds: tuple[int, ...]) -> None:
        self._unsent = message, fds
        self._receive = self._receive_later
        self._is_edge_triggered = False
        self._loop.modify(self._link.fileno(), EPOLLOUT)

    def _receive_later(self) -> int:
        """Sends the reply that is kept, and goes on with the next request; -1 while there still is no room."""
        if self._unsent is not None:
            if not self._link_send(*self._unsent):
                return -1
            self._unsent = None
            self._receive = self._link.receive
            self._loop.modify(self._link.fileno(), EPOLLIN)
        return self._receive()

    def _half_message_expired(self) -> None:
        if self._unsent is None:
            super()._half_message_expired()
        else:  # the rest of the message may be here, but isn't read
            self._partial = self._loop.call_later(HALF_MESSAGE_SECONDS, self._half_message_expired)

    def _version(self) -> bytes:
        reply = reply_to_version(self._payload)
        self._begin()
        return reply

    def _begin(self) -> None:
        """After VERSION: all other requests are served."""
        self._link.is_negotiated = True
        self._requests = {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._get_info,
            Command.DEVICE_GET_REGION_INFO: self._get_region_info,
            Command.DEVICE_GET_IRQ_INFO: self._get_irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.DEVICE_RESET: self._device_reset,
            Command.REGION_READ: self._read,
            Command.REGION_WRITE: self._write,
        }
        self._table[Command.REGION_READ] = self._finished(self._region_read, self._link)
        self._table[Command.REGION_WRITE] = self._finished(self._region_write, self._link)

    def _get_info(self) -> bytes:
        flags = DeviceFlag.RESET | DeviceFlag.PCI
        self._check_argsz(vfiouser.DEVICE_INFO)
        return vfiouser.DEVICE_INFO.pack(
            vfiouser.DEVICE_INFO.size, flags, vfiouser.NUM_REGIONS, vfiouser.NUM_IRQS
        )

    def _get_region_info(self) -> bytes:
        self._check_argsz(vfiouser.REGION_INFO)
        argsz, _, index, _, _, _ = vfiouser.REGION_INFO.unpack_from(self._payload)
        flags, size, areas, fd = self._regions.describe(index)
        offset = vfiouser.REGION_INFO.size if areas else 0
        needed = vfiouser.REGION_INFO.size + len(areas)
        head = vfiouser.REGION_INFO.pack(needed, flags, index, offset, size, 0)
        if argsz < needed:
            return head  # the client asks again, with the size that it needs
        if fd != -1:
            self._reply_fds = (fd,)
        return head + areas

    def _get_irq_info(self) -> bytes:
        self._check_argsz(vfiouser.IRQ_INFO)
        _, _, index, _ = vfiouser.IRQ_INFO.unpack_from(self._payload)
        flags, count = self._irqs.describe(index)
        return vfiouser.IRQ_INFO.pack(vfiouser.IRQ_INFO.size, flags, index, count)

    def _check_argsz(self, layout: Struct) -> None:
        """The first field of a structure tells how much room for it, and what may follow, the client has."""
        argsz = int.from_bytes(self._payload[:4], "little")
        if argsz < layout.size:
            raise RefusedError(errno.EINVAL, f"argsz {argsz} instead of {layout.size}")

    def _set_irqs(self) -> bytes:
        fds = self._link.take_fds()
        try:
            self._irqs.set(self._payload, fds)
        except (RefusedError, ShortageError):
            self._link.discard(fds)
            raise
        self._order_eoi(self._irqs.line.unmaskfd)
        if self._disposal.is_full:
            raise ProtocolError("too many eventfds whose close takes long")
        return b""

    def _device_reset(self) -> bytes:
        is_done = self._function.full_reset()
        self._irqs.line.device_was_reset()
        self._log.info("reset by its client", event=Event.DEVICE_RESET, peer=self.client)
        if not is_done:
            raise RefusedError(errno.EIO)
        return b""

    def _dma_map(self) -> bytes:
        fds = self._link.take_fds()
        argsz, flags, offset, address, size = vfiouser.DMA_MAP.unpack_from(self._payload)
        try:
            if argsz < vfiouser.DMA_MAP.size or not 0 < flags <= DmaFlag.READ | DmaFlag.WRITE:
                raise RefusedError(errno.EINVAL, f"argsz {argsz}, flags {flags:#x}")
            if len(fds) > 1:
                raise RefusedError(errno.EINVAL, f"{len(fds)} file descriptors instead of 1 at most")
            memory, fd = self._function.host.memory, fds[0] if fds else -1
            fds = memory.map(
                address,
                size,
                offset,
                fd,
                can_read=bool(flags & DmaFlag.READ),
                can_write=bool(flags & DmaFlag.WRITE),
            )
        except MapError as error:
            self.ram_refusal, self._refused_ram = str(error), address
            raise RefusedError(error.code, str(error)) from error
        finally:
            self._link.discard(fds)
        if address == self._refused_ram:
            self.ram_refusal = ""
        if fd == -1 and self._ram_timer is None and memory.complaint:
            self._ram_timer = self._loop.call_later(_RAM_SECONDS, self._complain)
        return b""

    def _complain(self) -> None:
        self._ram_timer = None
        complaint = self._function.host.memory.complaint
        if complaint and not self._is_complaint_told:
            self._is_complaint_told = True
            text = "DMA is impossible: %s"
            self._log.warning(text, complaint, event=Event.RAM_UNREACHABLE, peer=self.client)

    def _dma_unmap(self) -> bytes:
        argsz, flags, address, size = vfiouser.DMA_UNMAP.unpack_from(self._payload)
        memory = self._function.host.memory
        if argsz < vfiouser.DMA_UNMAP.size or flags & ~UnmapFlag.ALL:
            raise RefusedError(errno.EINVAL, f"argsz {argsz}, flags {flags:#x}")
        if flags and (address or size):
            raise RefusedError(errno.EINVAL, "a range besides the flag that stands for all of them")
        if flags or address == self._refused_ram:
            self.ram_refusal = ""
        try:
            fds = memory.unmap_all() if flags else memory.unmap(address, size)
        except MapError as error:
            raise RefusedError(error.code, str(error)) from error
        self._link.discard(fds)
        return bytes(self._payload)

    def _region_read(self) -> None:
        message, command, size, flags, _, offset, region, count = _unpack_access(self._frame)
        data = self._regions.read(region, offset, count) if size == _ACCESS.size and not flags else b""
        if data:
            self._send(_pack_access(message, command, size + count, _REPLY, 0, offset, region, count) + data)
        else:
            self._serve()

    def _read(self) -> bytes:
        """An access that _region_read() leaves."""
        offset, region, count = vfiouser.REGION_ACCESS.unpack_from(self._payload)
        data = self._regions.read(region, offset, count)
        if not data:
            raise RefusedError(errno.EINVAL)
        return bytes(self._payload) + data

    def _region_write(self) -> None:
        message, command, size, flags, _, offset, region, count = _unpack_access(self._frame)
        if size != _ACCESS.size + count or flags & _TYPE:
            self._serve()
            return
        code = self._regions.write(region, offset, self._frame[_ACCESS.size : size])
        if flags & _NO_REPLY:
            return
        if code:
            self._request = _Request(message, command, size, flags, 0)
            self._refuse(RefusedError(code))
        else:
            self._send(_pack_access(message, command, _ACCESS.size, _REPLY, 0, offset, region, count))

    def _write(self) -> bytes:
        """An access that _region_write() leaves."""
        count = vfiouser.REGION_ACCESS.unpack_from(self._payload)[2]
        raise RefusedError(
            errno.EINVAL, f"{len(self._payload)} bytes of payload, {count} of them to be written"
        )
