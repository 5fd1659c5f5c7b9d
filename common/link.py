# SPDX-License-Identifier: GPL-2.0-or-later
"""One connected mpqemu socket: frames and their fds in, frames and fds out.

Link is the end that answers (the remote device): it never blocks. Client is the end that asks (the proxy):
every round trip has a deadline.

A read of the answering end asks for 40 bytes at most, the size of the longest request that is answered, so it can
reach into the next header.
"""

from __future__ import annotations

import array
import contextlib
import select
import socket
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import ClassVar

from common import mpqemu
from common.disposal import ANCILLARY_SIZE, Disposal, receive_urgent_inline, received_fds, refuse_fds
from common.errors import PeerGone, PeerTooSlow, ProtocolError, UntrustedError
from common.framelink import FrameLink
from common.mpqemu import HEADER, Command
from common.peer import peer_credentials
from common.polling import Events, Polling
from common.trust import TRUST

__all__ = ["Client", "Link"]

# As ints: an operator of IntFlag is a function in Python.
_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)
_HEADER_SIZE = HEADER.size
_pack_value = mpqemu.RET.pack_into
_RET_SIZE = HEADER.size + mpqemu.RET.size
_RET_HEADER = HEADER.pack(Command.RET, mpqemu.RET.size)
_request_frame = mpqemu.request_frame
_unpack_value = mpqemu.RET.unpack_from


class Link(FrameLink):
    """The answering end of one link."""

    HEADER_SIZE = HEADER.size
    READ_AHEAD = HEADER.size + mpqemu.BAR.size
    CAPACITY = HEADER.size + mpqemu.MAX_PAYLOAD
    MAX_FDS = mpqemu.MAX_FDS
    COMMAND_AND_SIZE = HEADER
    SIZES: ClassVar[Mapping[int, int]] = {command: rule.size for command, rule in mpqemu.RULES.items()}
    EXTRA = HEADER.size
    taken: ClassVar[int] = -1
    """no request was taken by an earlier process"""

    def __init__(self, sock: socket.socket, disposal: Disposal) -> None:
        """Takes ownership of a connected UNIX stream socket; ``disposal`` closes it, and fds that came over it."""
        super().__init__(sock, disposal)
        self._reply = bytearray(mpqemu.reply_frame(0))

    def reply(self, value: int) -> None:
        """Sends a RET with a u64.

        Raises PeerGone; ProtocolError when the peer floods without reading its replies.
        """
        _pack_value(self._reply, _HEADER_SIZE, value)
        try:
            self._send(self._reply)
        except BlockingIOError:
            raise ProtocolError("the peer doesn't read its replies") from None
        except OSError as error:
            raise PeerGone(f"writing the link: {error.strerror}") from error

    def _check_header(self) -> tuple[int, int, bool]:
        command, size = HEADER.unpack_from(self._buffer)
        rule = mpqemu.check_request(command, size)
        return command, _HEADER_SIZE + size, rule.max_fds > 0


class Client:
    """The asking end of one link. One request at a time; not to be used by two threads at once.

    After any exception the link is out of step and only close() makes sense.
    """

    _disposals: ClassVar[defaultdict[str, Disposal]] = defaultdict(Disposal)
    """by the path of a device's socket"""

    def __init__(
        self,
        sock: socket.socket,
        deadline: float,
        disposal: Disposal,
        path: str = "",
        poll_limit: float = 0.0,
    ) -> None:
        """Takes ownership of a connected UNIX stream socket; ``deadline`` in seconds bounds a round trip.

        ``disposal`` closes it, and fds that came over it. ``path`` is the device's socket, for the error of one
        that hangs up before it has answered anything. For at most ``poll_limit`` seconds a request looks for its
        answer before it sleeps (common.polling); 0: never.
        """
        sock.setblocking(False)
        refuse_fds(sock)
        receive_urgent_inline(sock)
        self._disposal = disposal
        self.peer = peer_credentials(sock)
        self._sock = sock
        self.deadline = deadline
        """seconds that bound a round trip; may be set between two"""
        self._path = path
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._buffer = bytearray(_RET_SIZE + 1)
        self._view = memoryview(self._buffer)
        self._whole = [self._view]
        self._send = sock.send
        self._recvmsg_into = sock.recvmsg_into
        self._is_readable = self._poll.poll
        self.polling = Polling(self._look, time.monotonic, poll_limit)
        self._await = self.polling.wait if poll_limit else self._look

    @classmethod
    def connect(cls, path: str, deadline: float, poll_limit: float = 0.0) -> Client:
        """Connects to a device's socket; ``poll_limit`` as above.

        Raises PeerGone when nobody listens there, or an untrusted user may, when no fd is left, or too many from
        there are still to be closed.
        """
        disposal = cls._disposals[path]
        if disposal.is_full:
            raise PeerGone(f"{path}: too many file descriptors from there take long to close")
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(deadline)
                TRUST.connect(sock, path)
                return cls(sock, deadline, disposal, path, poll_limit)
            except BaseException:
                sock.close()
                raise
        except BlockingIOError as error:  # the queue is full; without a timeout, connect(2) would wait
            raise PeerGone(f"{path}: takes no connection: others wait already") from error
        except OSError as error:
            raise PeerGone(f"{path}: {error.strerror or error}") from error
        except UntrustedError as error:
            raise PeerGone(f"{path}: {error}") from error

    @classmethod
    def resume(cls, sock: socket.socket, path: str, deadline: float) -> Client:
        """Goes on with the connection of an earlier process to a device's socket, in which no answer is due.

        Takes ownership of it. Raises PeerGone, and has closed it then, if it leads elsewhere or has ended.
        """
        disposal = cls._disposals[path]
        try:
            if sock.getpeername() != path:
                raise PeerGone(f"{path}: the connection of the process before leads elsewhere")
            TRUST.check_peer(sock)
            return cls(sock, deadline, disposal)
        except OSError as error:
            disposal.hang_up(sock)
            raise PeerGone(f"{path}: {error.strerror}") from error
        except UntrustedError as error:
            disposal.hang_up(sock)
            raise PeerGone(f"{path}: {error}") from error
        except PeerGone:
            disposal.hang_up(sock)
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, command: Command, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Sends a message that has no reply. Raises PeerGone and ProtocolError."""
        if self._is_readable(0):
            self.check_quiet()
        frame = _request_frame(command, payload)
        try:
            if fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                sent = self._sock.sendmsg([frame], rights)
            else:
                sent = self._send(frame)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._gone(f"{command.name}: {error.strerror}") from error
        if sent != len(frame):
            # With one request outstanding at most, a full socket means a peer that has stopped reading.
            raise PeerGone(f"{command.name}: the peer doesn't read its link")

    def request(self, command: Command, payload: bytes = b"") -> int:
        """Sends a request and returns the u64 of its RET (mpqemu.ERROR when the peer reports one; 0 for an
        empty one).

        Raises PeerGone, also when the deadline passes, and ProtocolError for any answer but one clean RET.
        """
        expires = time.monotonic() + self.deadline
        self.send(command, payload)
        remaining = expires - time.monotonic()
        if remaining <= 0 or not self._await(remaining):
            raise self._too_slow(command, payload)
        have = self._read(self._whole)
        if have == _RET_SIZE and self._buffer.startswith(_RET_HEADER):  # nearly always
            self._path = ""
            return int(_unpack_value(self._buffer, _HEADER_SIZE)[0])
        if have == 0:
            raise self._gone(f"the peer closed the link instead of answering {command.name}")
        return self._receive_rest(max(have, 0), expires, command, payload)

    def shutdown(self) -> None:
        """Ends the link for both sides; a request that another thread waits in raises PeerGone."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the link for both sides, and closes the socket; a second call does nothing."""
        self._disposal.hang_up(self._sock)

    def close_own_copy(self) -> None:
        """Closes this copy of the socket; the link goes on for other copies. A second call does nothing."""
        self._disposal.close_socket(self._sock)

    def _receive_rest(self, have: int, expires: float, command: Command, payload: bytes) -> int:
        """The u64 of a RET of which so many bytes are here, or that is another one than request() expects."""
        wanted = _RET_SIZE
        while True:
            if have >= _HEADER_SIZE:
                reply, size = HEADER.unpack_from(self._buffer)
                mpqemu.check_reply(command, reply, size)
                wanted = _HEADER_SIZE + size
            if have >= wanted:
                break
            remaining = expires - time.monotonic()
            if remaining <= 0 or not self._is_readable(remaining * 1000):
                raise self._too_slow(command, payload)
            count = self._read([self._view[have:]])
            if count == 0:
                raise self._gone(f"the peer closed the link instead of answering {command.name}")
            have += max(count, 0)
        if have > wanted:
            raise ProtocolError(f"more than one RET to {command.name}")
        self._path = ""
        return 0 if wanted == _HEADER_SIZE else int(_unpack_value(self._buffer, _HEADER_SIZE)[0])

    def _too_slow(self, command: Command, payload: bytes) -> PeerTooSlow:
        request = mpqemu.describe_request(command, payload)
        return PeerTooSlow(f"no answer to {request} within {self.deadline:g} s")

    def check_quiet(self) -> None:
        """Checks that nothing is unread: without message ids it would be taken for the next answer.

        Raises PeerGone when the link has ended, and ProtocolError when the peer sent an unexpected message.
        """
        count = self._read(self._whole) if self._is_readable(0) else -1
        if count == 0:
            raise self._gone("the peer closed the link")
        if count > 0:
            raise ProtocolError("the peer sent an unexpected message")

    def _look(self, seconds: float | None) -> Events:
        return self._is_readable(None if seconds is None else seconds * 1000)

    def _gone(self, text: str) -> PeerGone:
        if self._path:
            return PeerGone(f"{self._path}: {self.peer} closed it at once: another client or transport?")
        return PeerGone(text)

    def _read(self, buffers: list[memoryview]) -> int:
        """How many bytes arrived, 0 at the end of the stream, -1 when none are here."""
        try:
            count, ancillary, flags, _ = self._recvmsg_into(buffers, ANCILLARY_SIZE, _FLAGS)
        except BlockingIOError:
            return -1
        except OSError as error:
            raise self._gone(f"reading the link: {error.strerror}") from error
        if ancillary or flags & _TRUNCATED:
            self._disposal.close_fds(received_fds(ancillary))
            raise ProtocolError("the peer sent file descriptors with a reply")
        return count
