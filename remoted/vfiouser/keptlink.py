# SPDX-License-Identifier: GPL-2.0-or-later
"""A vfio-user link whose requests are done exactly once, whenever the process is killed: compare remoted.keptlink.

A request is taken out of the socket once it is done. A client may send further requests before it has read a
reply, and requests that have none. So what the socket holds after a kill doesn't tell whether the last request
that was done is still there. When it is taken out, its header is received into memory that outlives the process,
where its complement lay before: either of the two is found there. A reply that brings fds can't go through a pipe.
If the process is killed when such a reply may or may not have been sent, the link ends.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Sequence
from typing import ClassVar

from common import vfiouser
from common.disposal import ANCILLARY_SIZE, Disposal, count_unread, received_fds
from common.errors import PeerGone, ProtocolError
from common.splice_h import SPLICE_F_NONBLOCK
from common.vfiouser import HEADER
from remoted.keptframelink import KeptFrameLink
from remoted.state import FunctionState
from remoted.vfiouser.clientstate import ClientState, Request

__all__ = ["KeptVfioUserLink"]

_FLAGS = socket.MSG_CMSG_CLOEXEC
_COMPLEMENT = (1 << 8 * HEADER.size) - 1


class KeptVfioUserLink(KeptFrameLink):
    """Receives requests and sends replies as VfioUserLink does."""

    HEADER_SIZE = HEADER.size
    CAPACITY: ClassVar[int] = vfiouser.MAX_SIZE
    LOOK_AHEAD: ClassVar[int] = HEADER.size + vfiouser.REGION_ACCESS.size + 4
    """a write of 4 bytes"""
    MAX_FDS = vfiouser.MAX_FDS

    def __init__(
        self,
        sock: socket.socket,
        pipe: tuple[int, int],
        state: FunctionState,
        client: ClientState,
        store_tables: Callable[[int, memoryview, Callable[[], None]], tuple[int, int] | None],
        disposal: Disposal,
    ) -> None:
        """As KeptFrameLink. ``client`` holds what is valid of the client.

        ``store_tables(command, payload, done)`` notes what a request has changed of interrupts and RAM, and
        returns the numbers of the table and the change to be valid from then on; None if files are on their way
        into the store: ``done()`` is called when they are there.
        """
        self._client = client
        self._store_tables = store_tables
        self._command = -1
        self._is_divided = False
        self._unsent = count_unread(pipe[0])
        self._unfinished: tuple[bytes, tuple[int, ...]] | None = None
        self.hold: Callable[[], None] = _nothing
        """called when a request waits for the fd store"""
        self.stored: Callable[[], None] = _nothing
        """called when it may go on, with finish_stored()"""
        self.is_negotiated = client.request(state.serial).is_negotiated
        """whether the client's VERSION was accepted"""
        super().__init__(sock, pipe, state, disposal)
        self.frame = self._view

    @property
    def has_unsent(self) -> bool:
        """Whether a part of a reply waits for room."""
        return self._unsent > 0

    def receive(self) -> int:
        self._command = super().receive()
        if self._command >= 0:
            header = int.from_bytes(self._view[: HEADER.size], "little") ^ _COMPLEMENT
            self._client.received[:] = header.to_bytes(HEADER.size, "little")
            self._is_divided = bool(self._fds) and self._first_read(self._frame) < self._frame
        return self._command

    def send(self, message: bytes, fds: Sequence[int] = ()) -> bool:
        """Makes the state valid, and sends a reply; or what is left of one, while there is.

        False when the client has left so many replies unread that there is no room. Raises PeerGone.
        """
        if self._frame:
            self._finish(message, tuple(fds))
        elif self.has_unsent:
            self._empty_pipe()
        return not self.has_unsent

    def finish(self) -> None:
        """The request has been handled: makes the state valid, if send() hasn't done so."""
        if self._frame and self._unfinished is None:
            self._finish(b"", ())

    def finish_stored(self) -> None:
        """Does what has waited for the fd store. Raises PeerGone and ProtocolError."""
        if self._unfinished is not None:
            (message, fds), self._unfinished = self._unfinished, None
            self._finish(message, fds)

    def _finish(self, message: bytes, fds: tuple[int, ...]) -> None:
        tables = self._store_tables(self._command, self._view[HEADER.size :], self.stored)
        if tables is None:
            self._unfinished = message, fds
            self.hold()
            return
        state, header = self._state, bytes(self._view[: HEADER.size])
        has_fds = bool(fds) or len(message) > vfiouser.MAX_SIZE
        request = Request(header, len(message), has_fds, self._is_divided, self.is_negotiated, True, *tables)
        self._client.note(state.serial + 1, request, b"" if has_fds else message)
        state.commit_reply(0)
        self._consume()
        self._client.consumed = state.serial
        if has_fds:
            self._send_with_fds(message, fds)
            state.sent = state.serial
        elif message:
            self._fill_pipe()
            self._empty_pipe()
        else:
            state.sent = state.serial

    def _consume(self) -> None:
        """Takes the request out of the socket, its header into the memory that outlives the process."""
        length, self._frame = self._frame, 0
        buffers = [self._client.received, self._view[HEADER.size : length]]
        while length:
            try:
                count, ancillary, _, _ = self._sock.recvmsg_into(buffers, ANCILLARY_SIZE, _FLAGS)
            except OSError as error:
                raise PeerGone(f"reading the link: {error.strerror}") from error
            if ancillary:
                self.discard(received_fds(ancillary))
            if not count:
                raise PeerGone("the peer closed the link within a frame")
            length -= count
            buffers = [self._view[:length]]

    def _catch_up(self) -> None:
        state, client = self._state, self._client
        request = client.request(state.serial)
        if client.consumed != state.serial:
            if client.received == request.header:
                if request.is_divided:
                    raise ProtocolError("the previous process was killed within a message")
            else:
                _, self._frame, _, fds = self._look(HEADER.size)
                self._disposal.close_fds(fds)
                if self._view[: HEADER.size] != request.header:
                    raise ProtocolError("the socket doesn't hold the request of the previous process")
                self._consume()
            client.consumed = state.serial
        if state.sent != state.serial:
            if request.has_fds:
                raise ProtocolError("the previous process was killed while it sent a reply with an fd")
            if request.reply_size and not self.has_unsent:
                self._fill_pipe()
            state.sent = state.serial
        if self.has_unsent:
            self._empty_pipe()

    def _first_read(self, size: int) -> int:
        """How many of so many bytes one read would bring."""
        try:
            count, ancillary, _, _ = self._sock.recvmsg_into(
                [self._view[:size]], ANCILLARY_SIZE, _FLAGS | socket.MSG_PEEK
            )
        except OSError as error:
            raise PeerGone(f"reading the link: {error.strerror}") from error
        self.discard(received_fds(ancillary))
        return count

    def _check_header(self) -> tuple[int, int]:
        _, command, size, flags, _ = HEADER.unpack_from(self._buffer)
        vfiouser.check_header(command, size, flags)
        return command, size

    def _takes_fds(self, command: int, length: int) -> bool:
        rule = vfiouser.RULES.get(command)
        return rule is not None and rule.max_fds > 0

    def _fill_pipe(self) -> None:
        self._unsent = os.write(self._pipe[1], self._client.reply(self._state.serial))
        self._state.sent = self._state.serial

    def _empty_pipe(self) -> None:
        try:
            while self.has_unsent:
                self._unsent -= os.splice(
                    self._pipe[0], self._sock.fileno(), self._unsent, flags=SPLICE_F_NONBLOCK
                )
        except BlockingIOError:
            pass
        except OSError as error:
            raise PeerGone(f"writing the link: {error.strerror}") from error

    def _send_with_fds(self, message: bytes, fds: tuple[int, ...]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([message], rights)
        except BlockingIOError:
            raise ProtocolError("the peer doesn't read its replies") from None
        except OSError as error:
            raise PeerGone(f"writing the link: {error.strerror}") from error


def _nothing() -> None:
    pass
