# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket of a daemon, on the daemon's own event loop: connections, and whose turn it is.

A message ends with a zero byte. One message is answered per pass of the loop, whoever sent it, and the next one of
a client only when its reply has left: a client that floods, or doesn't read, waits for itself. An invalid call
costs its sender the connection.

What answers (common.control, with asyncvarlink, which imports asyncio) takes as long to load as all the rest of a
daemon, and half as much memory. So the first call has it loaded, in a thread, and waits until it is there.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from select import EPOLLET, EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING

from common.disposal import Disposal
from common.errors import ProtocolError, UsageError
from common.journal import RateLimited
from common.listen import UnixListener
from common.loop import Loop
from common.messages import Event
from common.peer import peer_credentials
from common.socketpath import SocketInUse

if TYPE_CHECKING:
    from asyncvarlink import VarlinkInterface

__all__ = ["MAX_MESSAGE", "ControlServer"]

MAX_MESSAGE = 4 << 10
"""bytes of the longest call, without its zero byte: a call has to name a device at most, and parsing takes time"""

_MAX_CLIENTS = 16

_REFUSAL_SECONDS = 0.1
"""how long refuse() waits for a client's call"""

_SWITCH_SECONDS = 1e-4
"""how long the loop's thread waits for the interpreter while another one loads modules; Python's own are 5 ms"""


class ControlServer:
    """Answers calls to one interface at a listening socket, for several clients at once."""

    def __init__(
        self, loop: Loop, path: str, make_interface: Callable[[], VarlinkInterface], log: logging.Logger
    ) -> None:
        """``make_interface()`` is called once, in a thread, when the first call has come.

        ``log``'s name is the product's in org.varlink.service.GetInfo.

        Raises UsageError when the path can't be listened at, or is that of a daemon that runs already. A daemon
        that creates this before all else does not disturb that one.
        """
        self.disposal = Disposal()
        self._loop = loop
        self._log = RateLimited(log)
        self._product = log.name
        self._make_interface = make_interface
        self._answer: Callable[[bytes], bytes] | None = None
        self._is_loading = False
        self._clients: dict[_Client, None] = {}  # the one that has been silent for longest comes first
        self._callers: dict[_Client, None] = {}  # those with a call to be answered, in their order
        try:
            self._listener = UnixListener(loop, path, self._on_client, self._log, self.disposal)
        except SocketInUse as error:
            raise UsageError(
                f"{error.owner} runs in {os.path.dirname(path)} already: stop it, or choose another --runtime-dir"
            ) from error

    def close(self) -> None:
        """Hangs up on everyone and unlinks the socket."""
        self._listener.close()
        for client in list(self._clients):
            client.close()

    def enqueue(self, client: _Client) -> None:
        """A client has a whole message; its answer() is called when it is its turn."""
        if self._answer is None:
            self._start_loading()
        elif not self._callers:
            self._loop.call_later(0, self._answer_next)
        self._callers[client] = None

    def answer(self, message: bytes) -> bytes:
        """The reply to one message, with its zero byte; empty for a one-way call. Raises ProtocolError."""
        return b"" if self._answer is None else self._answer(message)

    def refuse(self, make_reply: Callable[[], bytes]) -> None:
        """Answers the call of each client that waits to be accepted with ``make_reply()``, and hangs up.

        For another thread to call while the loop's thread is busy. Clients that were accepted before have to wait.
        """
        for _ in range(_MAX_CLIENTS):
            with contextlib.suppress(OSError):
                sock = self._listener.accept()
                if sock is None:  # nobody waits, or who did is not trusted: it doesn't tell which
                    continue
                with sock:
                    sock.settimeout(_REFUSAL_SECONDS)
                    if sock.recv(MAX_MESSAGE):
                        sock.sendall(make_reply())

    def rejected(self, client: _Client, error: ProtocolError) -> None:
        """A client broke the protocol."""
        self._log.warning("control socket: %s", error, event=Event.CONTROL_BROKE_PROTOCOL, peer=client.name)

    def forget(self, client: _Client) -> None:
        """A client has gone."""
        del self._clients[client]
        self._callers.pop(client, None)

    def _answer_next(self) -> None:
        client = next(iter(self._callers), None)
        if client is not None:
            del self._callers[client], self._clients[client]
            self._clients[client] = None
            if self._callers:
                self._loop.call_later(0, self._answer_next)
            client.answer()

    def _start_loading(self) -> None:
        if not self._is_loading:
            self._is_loading = True
            try:
                threading.Thread(target=self._load, name="control", daemon=True).start()
            except RuntimeError as error:  # no thread can be started now
                self._loop.call_later(0, partial(self._not_loaded, error))

    def _load(self) -> None:
        """In a thread."""
        interval, collects = sys.getswitchinterval(), gc.isenabled()
        sys.setswitchinterval(_SWITCH_SECONDS)
        gc.disable()  # a collection would hold up the loop, for as long as there are new modules
        try:
            from common.control import Service

            done = partial(self._loaded, Service(self._product, self._make_interface()).answer)
        except Exception as error:  # noqa: BLE001  the files may be gone, or those of another version
            done = partial(self._not_loaded, error)
        finally:
            sys.setswitchinterval(interval)
            if gc.get_freeze_count():
                gc.freeze()  # as freeze_heap() has done with what was there then
            if collects:
                gc.enable()
        self._loop.call_soon_threadsafe(done)

    def _loaded(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer
        if self._callers:
            self._answer_next()

    def _not_loaded(self, error: Exception) -> None:
        """The clients can come again, and have it tried again."""
        self._is_loading = False
        self._log.warning(
            "control socket: no call can be answered: %s", error, event=Event.CONTROL_NOT_LOADED
        )
        for client in list(self._callers):
            client.close()

    def _on_client(self, sock: socket.socket) -> None:
        if len(self._clients) >= _MAX_CLIENTS:
            # A new client is more likely to need an answer than the one that has been silent for longest.
            next(iter(self._clients)).close()
        self._clients[_Client(self._loop, sock, self)] = None


class _Client:
    """One connection: its half message, its unsent reply."""

    def __init__(self, loop: Loop, sock: socket.socket, server: ControlServer) -> None:
        """Takes ownership of the non-blocking socket."""
        self.name = str(peer_credentials(sock))
        self._loop = loop
        self._sock = sock
        self._server = server
        self._input = bytearray()
        self._end = -1  # where the zero byte of the first message in it is
        self._output = bytearray()
        self._events = EPOLLIN
        loop.add(sock.fileno(), self._on_ready, in_turn=True)

    def close(self) -> None:
        """Hangs up. Called once."""
        self._loop.remove(self._sock.fileno())
        self._server.disposal.hang_up(self._sock)
        self._server.forget(self)

    def answer(self) -> None:
        """Answers the first message of those that are here."""
        message = bytes(self._input[: self._end])
        del self._input[: self._end + 1]
        self._end = self._input.find(0)
        try:
            self._output += self._server.answer(message)
        except ProtocolError as error:
            self._reject(error)
            return
        self._go_on()

    def _on_ready(self, _events: int) -> None:
        # The end of the stream is noticed even while a message waits for its turn: that comes within a few passes.
        if self._end < 0 and not self._output:
            try:
                if not self._receive():
                    self.close()
                    return
            except OSError:
                self.close()
                return
            except ProtocolError as error:
                self._reject(error)
                return
        self._go_on()

    def _go_on(self) -> None:
        """Sends pending replies, then asks for a turn, and reads on only when it has had it."""
        try:
            self._flush()
        except OSError:
            self.close()
            return
        if self._end >= 0 and not self._output:
            self._server.enqueue(self)
        # While a call waits, the end of the stream is reported once only: what answers may not be loaded yet.
        events = EPOLLOUT if self._output else EPOLLET if self._end >= 0 else EPOLLIN
        if events != self._events:
            self._events = events
            self._loop.modify(self._sock.fileno(), events)

    def _reject(self, error: ProtocolError) -> None:
        self._server.rejected(self, error)
        self.close()

    def _receive(self) -> bool:
        """Reads at most the rest of one message of full length. False at the end of the stream."""
        have = len(self._input)
        try:
            data = self._server.disposal.receive(self._sock, MAX_MESSAGE + 1 - have)
        except BlockingIOError:
            return True
        self._input += data
        self._end = self._input.find(0, have)
        if self._end < 0 and len(self._input) > MAX_MESSAGE:
            raise ProtocolError(f"a message of more than {MAX_MESSAGE} bytes")
        return bool(data)

    def _flush(self) -> None:
        if self._output:
            with contextlib.suppress(BlockingIOError):
                del self._output[: self._sock.send(self._output)]
