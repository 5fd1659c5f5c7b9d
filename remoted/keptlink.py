# SPDX-License-Identifier: GPL-2.0-or-later
"""A kept link of mpqemu, whose requests are done exactly once, whenever the process is killed.

The state file (remoted.state) has room for two requests, a slot for even serial numbers and one for odd ones. A
request goes these steps:

1. It is looked at (MSG_PEEK): bytes and fds stay in the socket.
2. The function handles it.
3. It is taken out of the socket, by a single read into the slot of its number.
4. The slot of the next number is cleared.
5. State, reply and serial number become valid together (FunctionState.commit_reply()).
6. The reply is written into the pipe, and from there spliced into the socket.

A successor finds out how far its predecessor came. Up to step 3 the socket still has the request. From there up to
step 5 it is in the slot of the number after the valid one: the successor does it again, before it receives
anything or judges an EOI. After that, a socket can't tell whether the reply was sent; the pipe is empty exactly
when it was.

Step 3 is where it is for speed. The sender may sleep in recvmsg(2). When a buffer is freed, the kernel wakes
whoever sleeps at the socket that it was sent from, also a reader (sock_wfree() in net/core/sock.c,
unix_write_space() in net/unix/af_unix.c); a sender in poll(2), as proxyd, isn't woken. If the request is taken
after step 5, the sender's CPU wakes up too late for the reply. If it is taken before step 2, the wake-up delays
the interrupts of the function, and the CPU may be idle again when the reply comes.

What has no reply (SYNC_SYSMEM, SET_IRQFD) may be done twice. It is taken out of the socket, into no slot, once the
fd store has its files.
"""

from __future__ import annotations

import os
import socket
from typing import ClassVar

from common import mpqemu
from common.disposal import ANCILLARY_SIZE, Disposal, count_unread, received_fds
from common.errors import PeerGone, ProtocolError
from common.splice_h import SPLICE_F_NONBLOCK
from remoted.keptframelink import KeptFrameLink
from remoted.state import FunctionState

__all__ = ["KeptLink"]

_FLAGS = int(socket.MSG_CMSG_CLOEXEC)  # as an int: an operator of IntFlag is a function in Python
_SIZES = {command: rule.size for command, rule in mpqemu.RULES.items() if not rule.max_fds}
"""bytes of payload of the requests that have a reply, which are those without fds, by command"""
_REPLY_SIZE = mpqemu.HEADER.size + mpqemu.RET.size
_pack_value = mpqemu.RET.pack_into


class KeptLink(KeptFrameLink):
    """Receives requests and sends replies as common.link.Link does."""

    HEADER_SIZE = mpqemu.HEADER.size
    CAPACITY = mpqemu.HEADER.size + mpqemu.MAX_PAYLOAD
    LOOK_AHEAD: ClassVar[int] = CAPACITY
    MAX_FDS = mpqemu.MAX_FDS

    def __init__(
        self, sock: socket.socket, pipe: tuple[int, int], state: FunctionState, disposal: Disposal
    ) -> None:
        """As KeptFrameLink."""
        self.taken = -1
        """the command of a request that an earlier process has taken, but not done; -1: there is none

        ``payload`` is its payload. It is to be handled before the first receive().
        """
        self._recv_into = sock.recv_into
        self._reply = bytearray(mpqemu.reply_frame(0))
        super().__init__(sock, pipe, state, disposal)

    def reply(self, value: int) -> None:
        """Makes the function's state valid, and sends a RET with a u64.

        Raises PeerGone; ProtocolError when the peer floods without reading its replies.
        """
        state = self._state
        if self._frame:
            self._take()
        state.clear_slot(state.serial + 2)
        state.commit_reply(value)
        self._fill_pipe()
        self._empty_pipe()

    def _catch_up(self) -> None:
        state = self._state
        if state.sent != state.serial:
            if count_unread(self._pipe[0]):
                state.sent = state.serial
            else:
                self._fill_pipe()
        if count_unread(self._pipe[0]):
            self._empty_pipe()
        self.taken = self._find_taken()

    def _find_taken(self) -> int:
        """The command of the request that was taken and not done, now in the buffer; -1 if there is none.

        Raises PeerGone and ProtocolError.
        """
        slot = self._state.slots[self._state.serial + 1 & 1]
        command, size = mpqemu.HEADER.unpack_from(slot)
        if _SIZES.get(command) == size:
            length = mpqemu.HEADER.size + size
            if slot[length - 1] != 0xFF or not self._is_cut_short(slot):
                self._view[:length] = slot[:length]
                return int(command)
        self._state.clear_slot(self._state.serial + 1)
        return -1

    def _is_cut_short(self, slot: memoryview) -> bool:
        """Whether the socket still has the request of which the slot seems not to have the last byte.

        A kill while the kernel waits for the slot's memory ends its copy early. Raises ProtocolError if the socket
        has a part of the request: it takes several reads if only some of its bytes came with fds.
        """
        if not count_unread(self._sock.fileno()):
            return False
        _, _, _, fds = self._look(mpqemu.HEADER.size)
        self._disposal.close_fds(fds)
        if self._view[: mpqemu.HEADER.size] != slot[: mpqemu.HEADER.size]:
            raise ProtocolError("the previous process was killed within a message")
        return True

    def _check_header(self) -> tuple[int, int]:
        command, payload = mpqemu.HEADER.unpack_from(self._buffer)
        mpqemu.check_request(command, payload)
        return command, mpqemu.HEADER.size + payload

    def _takes_fds(self, command: int, length: int) -> bool:
        return command not in _SIZES

    def _consume(self) -> None:
        length, self._frame = self._frame, 0
        self._read(self._view[:length])

    def _take(self) -> None:
        """As _consume(), into the slot."""
        length, self._frame = self._frame, 0
        slot = self._state.slots[self._state.serial + 1 & 1]
        count = 0
        if self._is_bare:
            try:
                count = self._recv_into(slot, length)
            except OSError as error:
                raise PeerGone(f"reading the link: {error.strerror}") from error
        if count < length:
            self._read(slot[count:length])

    def _read(self, content: memoryview) -> None:
        """Reads so many bytes, which are in the socket, and closes the fds that come with them."""
        count = 0
        while count < len(content):
            try:
                more, ancillary, _, _ = self._recvmsg_into([content[count:]], ANCILLARY_SIZE, _FLAGS)
            except OSError as error:
                raise PeerGone(f"reading the link: {error.strerror}") from error
            if ancillary:
                self.discard(received_fds(ancillary))
            if not more:
                raise PeerGone("the peer closed the link within a frame")
            count += more

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
