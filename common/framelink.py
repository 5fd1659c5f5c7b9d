# SPDX-License-Identifier: GPL-2.0-or-later
"""The answering end of a link of any protocol: whole requests with their fds, out of a UNIX stream socket.

A request is a header and a payload; fds ride on the header's bytes. Which request do fds belong to? recvmsg never
reads past bytes that carried fds, so within one read they belong to its last bytes, but the kernel doesn't say
where these begin. So the first read asks for so few bytes that a request which may carry fds is never followed by
more than a part of a header. Of the requests in it the first one that may carry fds is the only one that can claim
them without being wrong anyway. Once a header has begun, a read asks for the rest of that request alone: two reads
could otherwise bring the fds of two requests.
"""

from __future__ import annotations

import abc
import socket
from collections.abc import Callable, Mapping, Sequence
from struct import Struct
from typing import ClassVar

from common.disposal import ANCILLARY_SIZE, Disposal, receive_urgent_inline, received_fds
from common.errors import PeerGone, ProtocolError, ShortageError

__all__ = ["FrameLink"]

# As ints: an operator of IntFlag is a function in Python.
_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)


class FrameLink(abc.ABC):
    """Receives requests without ever blocking. A subclass knows the header of its protocol.

    ``payload`` is a view of the buffer that holds the last received request's payload, valid until the next
    receive(); ``fds`` are its file descriptors: a handler takes them with take_fds(), what is left is closed.
    """

    HEADER_SIZE: ClassVar[int]
    READ_AHEAD: ClassVar[int]
    """how many bytes the first read of a request asks for"""
    CAPACITY: ClassVar[int]
    """bytes of the longest request"""
    MAX_FDS: ClassVar[int]
    """in one request"""
    COMMAND_AND_SIZE: ClassVar[Struct]
    """of a header"""
    SIZES: ClassVar[Mapping[int, int]]
    """what the header's size is in requests that usually come alone and in one read, by command"""
    EXTRA: ClassVar[int]
    """how many bytes such a request has beyond what its header's size tells"""

    def __init__(self, sock: socket.socket, disposal: Disposal) -> None:
        """Takes ownership of a connected UNIX stream socket; ``disposal`` closes it, and fds that came over it."""
        sock.setblocking(False)
        receive_urgent_inline(sock)
        self._disposal = disposal
        self._sock = sock
        self._send = sock.send
        self._recvmsg_into = sock.recvmsg_into
        self._buffer = bytearray(self.CAPACITY)
        self._view = memoryview(self._buffer)
        self._whole = [self._view[: self.READ_AHEAD]]
        self._header_size = self.HEADER_SIZE
        self._unpack: Callable[[bytearray], tuple[int, int]] = self.COMMAND_AND_SIZE.unpack_from
        self._sizes = self.SIZES
        self._extra = self.EXTRA
        self.payload = self._view[self.HEADER_SIZE :]
        # Of a request that came whole and alone, both are 0.
        self._have = 0  # bytes in the buffer
        self._frame = 0  # length of the request last handed out, still in the buffer
        self.fds: list[int] = []
        self.is_partial = False
        """whether a request has begun but not ended: the peer owes its rest"""
        self.closed = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> int:
        """The command of the next whole request, or -1 when it isn't here yet. Never blocks.

        Raises ProtocolError and ShortageError (after which the stream is out of step) and PeerGone.
        """
        buffers = self._whole
        if self._have:
            command, missing = self._advance()
            if not missing:
                return command
            if self._have:
                buffers = [self._view[self._have : self._have + missing]]
        try:
            count, ancillary, flags, _ = self._recvmsg_into(buffers, ANCILLARY_SIZE, _FLAGS)
        except BlockingIOError:
            return -1
        except OSError as error:
            raise PeerGone(f"reading the link: {error.strerror}") from error
        if not (ancillary or flags & _TRUNCATED or self._have) and count >= self._header_size:
            # Nearly always: the bytes are one whole request.
            command, size = self._unpack(self._buffer)
            if count == self._extra + size and size == self._sizes.get(command):
                return command
        if ancillary:
            self._take_ancillary(received_fds(ancillary), wanted=self._have < self._header_size)
        if flags & _TRUNCATED:
            # The control buffer takes all that fit into a message, so there was no fd left for the rest.
            raise ShortageError("a message's file descriptors are lost: too many files are open here")
        if not count:
            raise PeerGone("the peer closed the link" + (" within a frame" if self._have else ""))
        self._have += count
        command, missing = self._parse()
        return -1 if missing else command

    def take_fds(self) -> list[int]:
        """The fds of the last received request, now the caller's."""
        fds, self.fds = self.fds, []
        return fds

    def discard(self, fds: Sequence[int]) -> None:
        """Closes fds that came over the link.

        Raises ProtocolError for one that may take long, when too many such are still to be closed.
        """
        if self._disposal.close_fds(fds) and self._disposal.is_full:
            raise ProtocolError("too many file descriptors that take long to close")

    def close(self) -> None:
        """Ends the link, and closes every fd that nobody took; a second call does nothing."""
        self.closed = True
        self._disposal.close_fds(self.take_fds())
        self._disposal.hang_up(self._sock)

    @abc.abstractmethod
    def _check_header(self) -> tuple[int, int, bool]:
        """The command of the header in the buffer, the request's whole length, whether it may carry fds.

        Raises ProtocolError for one after which the stream can't be trusted to be in step.
        """

    def _parse(self) -> tuple[int, int]:
        """The command of the request in the buffer (-1 without a header) and how many bytes to ask for."""
        have = self._have
        self.is_partial = have > 0
        if have < self._header_size:
            return -1, self._header_size - have
        command, length, takes_fds = self._check_header()
        if have < length:
            return command, length - have
        self.is_partial = have > length
        if self.fds and not takes_fds and have == length:
            # No bytes of the next request are here, so the fds belong to this one.
            self.discard(self.take_fds())
        self._frame = length
        return command, 0

    def _advance(self) -> tuple[int, int]:
        """Drops the request last handed out; as _parse() for what lies behind it."""
        if self._frame:
            rest = self._have - self._frame
            self._buffer[:rest] = self._buffer[self._frame : self._have]
            self._have, self._frame = rest, 0
            if self.fds and not rest:
                self.discard(self.take_fds())
        return self._parse()

    def _take_ancillary(self, received: Sequence[int], *, wanted: bool) -> None:
        if not wanted:  # they came with a payload's bytes
            self.discard(received)
            return
        self.fds.extend(received)
        if len(self.fds) > self.MAX_FDS:
            raise ProtocolError(f"more than {self.MAX_FDS} file descriptors in one message")
