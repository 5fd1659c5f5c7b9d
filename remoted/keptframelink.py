# SPDX-License-Identifier: GPL-2.0-or-later
"""The answering end of a kept link of any protocol: its socket and its pipe for replies outlive the process.

Both are in the service manager's fd store. A request is looked at (MSG_PEEK), with all its fds, before it is taken
out of the socket: what a killed process had not taken out is there for its successor.
"""

from __future__ import annotations

import abc
import os
import socket
from collections.abc import Sequence
from typing import ClassVar

from common.disposal import ANCILLARY_SIZE, Disposal, receive_urgent_inline, received_fds
from common.errors import IohubError, PeerGone, ProtocolError, ShortageError
from remoted.state import FunctionState

__all__ = ["KeptFrameLink"]

# As an int: an operator of IntFlag is a function in Python.
_PEEK = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_PEEK)
_TRUNCATED = int(socket.MSG_CTRUNC)
_SO_PEEK_OFF = 42  # include/uapi/asm-generic/socket.h; Python has no name for it


class KeptFrameLink(abc.ABC):
    """Receives requests without ever blocking, as common.framelink.FrameLink. A subclass knows the protocol."""

    HEADER_SIZE: ClassVar[int]
    CAPACITY: ClassVar[int]
    """bytes of the longest request"""
    LOOK_AHEAD: ClassVar[int]
    """how many bytes the first look at a request asks for"""
    MAX_FDS: ClassVar[int]
    """in one request"""

    def __init__(
        self, sock: socket.socket, pipe: tuple[int, int], state: FunctionState, disposal: Disposal
    ) -> None:
        """Takes ownership of the connected socket and of the pipe's ends, the reading one first.

        Finishes what an earlier process had begun to answer. Raises PeerGone and ProtocolError, and has closed
        socket and pipe then.
        """
        sock.setblocking(False)
        receive_urgent_inline(sock)
        sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)  # a killed process may have left another value
        self._sock = sock
        self._pipe = pipe
        self._state = state
        self._disposal = disposal
        self._buffer = bytearray(self.CAPACITY)
        self._view = memoryview(self._buffer)
        self.payload = self._view[self.HEADER_SIZE :]
        self._ahead = [self._view[: self.LOOK_AHEAD]]
        self._recvmsg_into = sock.recvmsg_into
        self._frame = 0  # length of the request last handed out, still in the socket
        self._fds: list[int] = []
        self._is_bare = False
        """whether the request last handed out was seen to have no fds, and to be the only one"""
        self.is_partial = False
        """whether a request has begun but not ended: the peer owes its rest"""
        self.closed = False
        try:
            self._catch_up()
        except IohubError:
            self.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> int:
        """The command of the next whole request, or -1 when it isn't here yet. Never blocks.

        The request stays in the socket until the next call, at most. Raises ProtocolError and ShortageError (after
        which the stream is out of step) and PeerGone.
        """
        if self._frame:
            self._consume()
        try:
            count, ancillary, flags, _ = self._recvmsg_into(self._ahead, ANCILLARY_SIZE, _PEEK)
        except OSError:
            return self._receive_any()
        if ancillary:
            self._disposal.close_fds(received_fds(ancillary))  # copies: they come again
        elif count >= self.HEADER_SIZE and not flags & _TRUNCATED:
            # Nearly always: one whole request without fds.
            command, length = self._check_header()
            if length == count:
                self._frame = length
                self._fds = []
                self._is_bare = True
                self.is_partial = False
                return command
        self._is_bare = False
        return self._receive_any()

    def _receive_any(self) -> int:
        """As receive(), for whatever is in the socket."""
        command, length, count, fds = self._look(self.LOOK_AHEAD)
        if (fds and count > length) or self.LOOK_AHEAD == count < length:
            # Some fds may be those of a request behind it.
            self.discard(fds)
            command, length, count, fds = self._look(length)
        self.is_partial = count < length
        if self.is_partial:
            self.discard(fds)
            return -1
        self._frame = length
        if fds and not self._takes_fds(command, length):
            self.discard(fds)
        elif len(fds) > self.MAX_FDS:
            self._disposal.close_fds(fds)
            raise ProtocolError(f"more than {self.MAX_FDS} file descriptors in one message")
        else:
            self._fds = fds
        return command

    def take_fds(self) -> list[int]:
        """The fds of the last received request, now the caller's."""
        fds, self._fds = self._fds, []
        return fds

    def discard(self, fds: Sequence[int]) -> None:
        """Closes fds that came over the link. Raises ProtocolError, as FrameLink.discard()."""
        if self._disposal.close_fds(fds) and self._disposal.is_full:
            raise ProtocolError("too many file descriptors that take long to close")

    def close(self) -> None:
        """Ends the link, and closes every fd that nobody took; a second call does nothing."""
        if not self.closed:
            self._disposal.hang_up(self._sock)
            self._close_copies()

    def leave(self) -> None:
        """Closes what this process has of the link, which goes on in its successor."""
        if not self.closed:
            self._disposal.close_socket(self._sock)
            self._close_copies()

    def _close_copies(self) -> None:
        self.closed = True
        self._disposal.close_fds(self.take_fds())
        for fd in self._pipe:
            os.close(fd)

    @abc.abstractmethod
    def _catch_up(self) -> None:
        """Ends what an earlier process was killed in, as far as that is the link's. Raises as __init__()."""

    @abc.abstractmethod
    def _check_header(self) -> tuple[int, int]:
        """The command of the request in the buffer, and the request's length. Raises ProtocolError."""

    @abc.abstractmethod
    def _takes_fds(self, command: int, length: int) -> bool:
        """Whether such a request may bring fds."""

    @abc.abstractmethod
    def _consume(self) -> None:
        """Takes the request out of the socket. Its fds are here already, by other numbers. Raises PeerGone."""

    def _look(self, size: int) -> tuple[int, int, int, list[int]]:
        """Looks at the next ``size`` bytes: command (-1 without a header), the request's length, bytes, fds."""
        fds: list[int] = []
        try:
            count = self._peek(size, fds)
            if count < self.HEADER_SIZE:
                return -1, self.HEADER_SIZE if count else 0, count, fds
            command, length = self._check_header()
        except IohubError:
            self._disposal.close_fds(fds)
            raise
        return command, length, count, fds

    def _peek(self, size: int, fds: list[int]) -> int:
        """Copies up to ``size`` bytes, and all their fds, and leaves them in the socket. Returns how many bytes.

        One read ends with the bytes that fds came with; the next one begins behind them by SO_PEEK_OFF.
        """
        count = 0
        try:
            while count < size:
                more, ancillary, flags, _ = self._sock.recvmsg_into(
                    [self._view[count:size]], ANCILLARY_SIZE, _PEEK
                )
                fds += received_fds(ancillary)
                if flags & _TRUNCATED:
                    raise ShortageError("a message's file descriptors are lost: too many files are open here")
                if not more and not count:
                    raise PeerGone("the peer closed the link")
                count += more
                if not ancillary:
                    break
                self._sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, count)
        except BlockingIOError:
            pass
        except OSError as error:
            raise PeerGone(f"reading the link: {error.strerror}") from error
        finally:
            if fds:
                self._sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)
        return count
