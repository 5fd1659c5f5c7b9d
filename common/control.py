# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket of a daemon: a Varlink service (varlink.org) on the daemon's own event loop.

asyncvarlink describes interfaces, converts types and finds methods; its transport needs an asyncio loop and bounds
neither messages nor replies, so the transport is here. A message is a JSON object that ends with a zero byte. One
message is answered per pass of the loop, whoever sent it, and the next one of a client only when its reply has
left: a client that floods, or doesn't read, waits for itself. An invalid call costs its sender the connection.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
from select import EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING, Any, cast

from asyncvarlink import (
    GenericVarlinkErrorReply,
    VarlinkErrorReply,
    VarlinkInterface,
    VarlinkInterfaceRegistry,
    VarlinkMethodCall,
    VarlinkMethodReply,
)
from asyncvarlink.conversion import ConversionError
from asyncvarlink.serviceinterface import InvalidParameter, VarlinkServiceInterface

from common.disposal import Disposal, refuse_fds
from common.errors import PeerGone, ProtocolError, UntrustedError, UsageError
from common.journal import RateLimited
from common.listen import UnixListener
from common.loop import Loop
from common.messages import Event
from common.peer import peer_credentials
from common.socketpath import SocketInUse
from common.trust import TRUST, Trust
from common.version import package_version

if TYPE_CHECKING:
    from asyncvarlink.types import JSONObject

__all__ = ["MAX_MESSAGE", "ControlServer", "call"]

MAX_MESSAGE = 4 << 10
"""bytes of the longest call, without its zero byte: a call has to name a device at most, and parsing takes time"""

MAX_REPLY = 4 << 20
"""bytes of the longest reply that call() takes, without its zero byte; 256 functions, all amiss, need less"""

_MAX_CLIENTS = 16

_REFUSAL_SECONDS = 0.1
"""how long refuse() waits for a client's call"""

_CALL_SECONDS = 5.0
"""how long call() takes at most"""


class ControlServer:
    """Answers calls to one interface at a listening socket, for several clients at once."""

    def __init__(self, loop: Loop, path: str, interface: VarlinkInterface, log: logging.Logger) -> None:
        """``log``'s name is the product's in org.varlink.service.GetInfo.

        Raises UsageError when the path can't be listened at, or is that of a daemon that runs already. A daemon
        that creates this before all else does not disturb that one.
        """
        self.disposal = Disposal()
        self._loop = loop
        self._log = RateLimited(log)
        self._registry = VarlinkInterfaceRegistry()
        self._registry.register_interface(
            VarlinkServiceInterface("iohub", log.name, package_version() or "unknown", "", self._registry)
        )
        self._registry.register_interface(interface)
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
        if not self._callers:
            self._loop.call_later(0, self._answer_next)
        self._callers[client] = None

    def answer(self, message: bytes) -> bytes:
        """The reply to one message, with its zero byte; empty for a one-way call. Raises ProtocolError."""
        call = _parse(message)
        try:
            reply = self._call(call)
        except VarlinkErrorReply as error:
            reply = error.toreply()
        return b"" if call.oneway else json.dumps(reply.tojson()).encode() + b"\0"

    def refuse(self, error: VarlinkErrorReply) -> None:
        """Answers the call of each client that waits to be accepted with an error, and hangs up.

        For another thread to call while the loop's thread is busy. Clients that were accepted before have to wait.
        """
        reply = json.dumps(error.tojson()).encode() + b"\0"
        for _ in range(_MAX_CLIENTS):
            with contextlib.suppress(OSError, UntrustedError):
                sock = self._listener.accept()
                if sock is None:
                    return
                with sock:
                    TRUST.check_peer(sock)
                    sock.settimeout(_REFUSAL_SECONDS)
                    if sock.recv(MAX_MESSAGE):
                        sock.sendall(reply)

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

    def _call(self, call: VarlinkMethodCall) -> VarlinkMethodReply:
        """Raises VarlinkErrorReply, the interface's own errors and those of org.varlink.service."""
        method, signature = self._registry.lookup_method(call)
        try:
            parameters = signature.parameter_type.fromjson(call.parameters)
        except ConversionError as error:
            raise InvalidParameter(parameter=str(error.location[0])) from error
        result = method(**parameters)
        return VarlinkMethodReply(signature.return_type.tojson(result.parameters))

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
        events = EPOLLOUT if self._output else 0 if self._end >= 0 else EPOLLIN
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


def _parse(message: bytes) -> VarlinkMethodCall:
    """Raises ProtocolError for anything but a call."""
    if not message.lstrip().startswith(b"{"):  # told without parsing what may be a flood of something else
        raise ProtocolError(f"a message that is not an object ({len(message)} bytes)")
    try:
        call = json.loads(message.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a message that is not JSON ({len(message)} bytes)") from error
    if call.get("parameters", {}) is None:
        del call["parameters"]  # as absent, which asyncvarlink takes for an error
    try:
        return VarlinkMethodCall.fromjson(call)
    except (TypeError, ValueError) as error:
        raise ProtocolError("a message that is not a call") from error


def call(
    path: str | os.PathLike[str], method: str, trust: Trust | None = None, /, **parameters: object
) -> dict[str, Any]:
    """Calls a daemon's method, ``INTERFACE.NAME``, at its socket's path; with ``trust`` only if that is trusted.

    Returns the reply's parameters as JSON, with types that are not checked. The daemon is not trusted to be
    honest: the size of its reply and the time of the whole call are bounded.

    Raises PeerGone when nobody answers in time, ProtocolError when the answer is no reply, UntrustedError, and
    VarlinkErrorReply for the daemon's errors.
    """
    request = VarlinkMethodCall(method, cast("JSONObject", parameters))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        expires = time.monotonic() + _CALL_SECONDS
        try:
            refuse_fds(sock)
            sock.settimeout(_CALL_SECONDS)
            if trust is None:
                sock.connect(os.fspath(path))
            else:
                trust.connect(sock, path)
            sock.sendall(json.dumps(request.tojson()).encode() + b"\0")
            message = _receive_reply(sock, expires)
        except TimeoutError as error:
            raise PeerGone(f"{path}: no answer within {_CALL_SECONDS:g} s") from error
        except OSError as error:
            raise PeerGone(f"{path}: {error.strerror or error}") from error
        except ProtocolError as error:
            raise ProtocolError(f"{path}: {error}") from error
    try:
        reply = VarlinkMethodReply.fromjson(json.loads(message.decode()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"{path}: the answer is not a reply to {method}") from error
    if reply.error is not None:
        raise GenericVarlinkErrorReply(reply.error, reply.parameters)
    return dict(reply.parameters)


def _receive_reply(sock: socket.socket, expires: float) -> bytes:
    """The first message, without its zero byte.

    Raises OSError, TimeoutError when it isn't whole at ``expires`` (on the monotonic clock), and ProtocolError
    when it is too long.
    """
    received = bytearray()
    disposal = Disposal()
    while True:
        remaining = expires - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        sock.settimeout(remaining)
        data = disposal.receive(sock, 1 << 16)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection without an answer")
        end = data.find(0)
        received += data if end < 0 else data[:end]
        if len(received) > MAX_REPLY:
            raise ProtocolError(f"a reply of more than {MAX_REPLY} bytes")
        if end >= 0:
            return bytes(received)
