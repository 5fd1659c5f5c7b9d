# SPDX-License-Identifier: GPL-2.0-or-later
"""A link whose requests are done exactly once, whenever the process is killed.

The socket, and a pipe for replies, are in the service manager's fd store. A request goes these steps:

1. It is looked at (MSG_PEEK): bytes and fds stay in the socket.
2. The function handles it.
3. State and reply become valid together (FunctionState.commit_reply()).
4. The request is taken out of the socket.
5. The reply is written into the pipe, and from there spliced into the socket.

A successor finds out how far its predecessor came. Up to step 3 it does the request again. After it, and as long
as the client waits for the reply, the socket still holds that request or nothing. A socket can't tell whether a
reply was sent; the pipe is empty exactly when it was. What has no reply (SYNC_SYSMEM, SET_IRQFD) may be done
twice, and is taken out of the socket once the fd store has its files.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import ClassVar

from common import mpqemu
from common.disposal import ANCILLARY_SIZE, Disposal, count_unread, receive_urgent_inline, received_fds
from common.errors import IohubError, PeerGone, ProtocolError, ShortageError
from common.splice_h import SPLICE_F_NONBLOCK
from remoted.state import FunctionState

__all__ = ["KeptLink"]

# As ints: an operator of IntFlag is a function in Python.
_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_PEEK = _FLAGS | int(socket.MSG_PEEK)
_TRUNCATED = int(socket.MSG_CTRUNC)
_SO_PEEK_OFF = 42  # include/uapi/asm-generic/socket.h; Python has no name for it
_REPLY_SIZE = mpqemu.HEADER.size + mpqemu.RET.size
_pack_value = mpqemu.RET.pack_into

_Ancillary = list[tuple[int, int, bytes]]


class KeptLink:
    """The answering end of a link whose socket and pipe outlive the process; otherwise as common.link.Link."""

    HEADER_SIZE: ClassVar[int] = mpqemu.HEADER.size
    CAPACITY: ClassVar[int] = mpqemu.HEADER.size + mpqemu.MAX_PAYLOAD
    """bytes of the longest frame"""
    LOOK_AHEAD: ClassVar[int] = CAPACITY
    """how many bytes the first look at a frame asks for"""
    MAX_FDS: ClassVar[int] = mpqemu.MAX_FDS

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
        self._recv_into = sock.recv_into
        self._reply = bytearray(mpqemu.reply_frame(0))
        self._frame = 0  # length of the frame last handed out, still in the socket
        self._fds: list[int] = []
        self._is_bare = False
        """whether the frame was seen to have no fds"""
        self.is_partial = False
        """whether a frame has begun but not ended: the peer owes its rest"""
        self.closed = False
        try:
            self._catch_up()
        except IohubError:
            self.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> int:
        """The command of the next whole frame, or -1 when it isn't here yet. Never blocks.

        The frame stays in the socket until its reply() or the next receive(). Raises ProtocolError and
        ShortageError (after which the stream is out of step) and PeerGone.
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
            # Some fds may be those of a frame behind it.
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

    def reply(self, value: int) -> None:
        """Makes the function's state valid, and sends a RET with a u64.

        Raises PeerGone; ProtocolError when the peer floods without reading its replies.
        """
        state = self._state
        state.commit_reply(value)
        self._consume()
        state.consumed = state.serial
        self._fill_pipe()
        self._empty_pipe()

    def take_fds(self) -> list[int]:
        """The fds of the last received frame, now the caller's."""
        fds, self._fds = self._fds, []
        return fds

    def discard(self, fds: Sequence[int]) -> None:
        """Closes fds that came over the link. Raises ProtocolError, as Link.discard()."""
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

    def _catch_up(self) -> None:
        """Ends what the process before this one was killed in, from step 3 on."""
        state = self._state
        if state.consumed != state.serial:
            if count_unread(self._sock.fileno()):
                _, self._frame, _, fds = self._look(mpqemu.HEADER.size)
                self._disposal.close_fds(fds)
                self._consume()
            state.consumed = state.serial
        if state.sent != state.serial:
            if count_unread(self._pipe[0]):
                state.sent = state.serial
            else:
                self._fill_pipe()
        if count_unread(self._pipe[0]):
            self._empty_pipe()

    def _look(self, size: int) -> tuple[int, int, int, list[int]]:
        """Looks at the next ``size`` bytes: command (-1 without a header), the frame's length, bytes, fds."""
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

    def _check_header(self) -> tuple[int, int]:
        """The command of the frame in the buffer, and the frame's length. Raises ProtocolError."""
        command, payload = mpqemu.HEADER.unpack_from(self._buffer)
        mpqemu.check_request(command, payload)
        return command, mpqemu.HEADER.size + payload

    def _takes_fds(self, command: int, length: int) -> bool:
        """Whether such a frame may bring fds."""
        return mpqemu.check_request(command, length - mpqemu.HEADER.size).max_fds > 0

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

    def _consume(self) -> None:
        """Takes the frame out of the socket. Its fds are here already, by other numbers."""
        length, self._frame = self._frame, 0
        ancillary: _Ancillary = []
        while length:
            try:
                if self._is_bare:
                    count = self._recv_into(self._buffer, length)
                else:
                    count, ancillary, _, _ = self._recvmsg_into([self._view[:length]], ANCILLARY_SIZE, _FLAGS)
            except OSError as error:
                raise PeerGone(f"reading the link: {error.strerror}") from error
            if ancillary:
                self.discard(received_fds(ancillary))
            if not count:
                raise PeerGone("the peer closed the link within a frame")
            length -= count

    def _fill_pipe(self) -> None:
        _pack_value(self._reply, mpqemu.HEADER.size, self._state.reply)
        os.write(self._pipe[1], self._reply)
        self._state.sent = self._state.serial

    def _empty_pipe(self) -> None:
        try:
            os.splice(self._pipe[0], self._sock.fileno(), _REPLY_SIZE, None, None, SPLICE_F_NONBLOCK)
        except BlockingIOError:
            raise ProtocolError("the peer doesn't read its replies") from None
        except OSError as error:
            raise PeerGone(f"writing the link: {error.strerror}") from error
