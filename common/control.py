# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket of a daemon: a Varlink service (varlink.org) on the daemon's own event loop.

The varlink package parses interfaces, dispatches calls and makes them; its servers want a thread or a process
per client, so the transport is here. A message is a JSON object that ends with a zero byte. One message is
handled per client and pass of the loop, and the next one only when its reply has left: a client that floods,
or doesn't read, waits for itself. What is no call costs its sender the connection.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from pathlib import Path
from select import EPOLLIN, EPOLLOUT
from typing import Any

from varlink import Interface, Service, SimpleClientInterfaceHandler

from common.errors import PeerGone, ProtocolError, UsageError
from common.journal import RateLimited
from common.link import peer_credentials
from common.listen import SocketInUse, UnixListener
from common.loop import Loop

__all__ = ["INTERFACE_DIR", "MAX_MESSAGE", "ControlServer", "call"]

INTERFACE_DIR = Path(__file__).parent
"""where the interfaces' definitions are, ``NAME.varlink``"""

MAX_MESSAGE = 64 << 10
"""bytes of the longest call, without its zero byte"""

_MAX_CLIENTS = 16

_MAX_NESTING = 16
"""objects and arrays within each other; what Python itself bounds differs by version"""

_CALL_SECONDS = 5.0
"""how long call() waits: both for the daemon to take the connection and for its reply"""


class ControlServer:
    """Answers calls to one interface at a listening socket, for several clients at once."""

    def __init__(self, loop: Loop, path: str, interface: str, handler: object, log: logging.Logger) -> None:
        """``handler`` has a method for each of the interface's, and raises VarlinkError for its errors.

        Raises UsageError when the path can't be listened at, or is that of a daemon that runs already: whoever
        makes this before it takes anything else disturbs that one in nothing.
        """
        self._loop = loop
        self._log = RateLimited(log)
        self._service = Service(vendor="iohub", product=log.name, interface_dir=str(INTERFACE_DIR))
        self._service.interface(interface)(lambda: handler)
        self._clients: dict[_Client, None] = {}  # the one that has been silent for longest comes first
        try:
            self._listener = UnixListener(loop, path, self._on_client, self._log)
        except SocketInUse as error:
            raise UsageError(
                f"{error.owner} runs in {os.path.dirname(path)} already: stop it, or choose another --runtime-dir"
            ) from error

    def close(self) -> None:
        """Hangs up on everyone and unlinks the socket."""
        self._listener.close()
        for client in list(self._clients):
            client.close()

    def answer(self, client: _Client, message: bytes) -> bytes:
        """The reply to one message, with its zero byte; empty for a one-way call. Raises ProtocolError."""
        self._clients.pop(client)
        self._clients[client] = None
        one_way = _check_call(message)
        replies = b"".join(reply + b"\0" for reply in self._service.handle(message))
        return b"" if one_way else replies

    def rejected(self, client: _Client, error: ProtocolError) -> None:
        """A client broke the protocol."""
        self._log.warning("control socket: %s", error, peer=client.name)

    def forget(self, client: _Client) -> None:
        """A client has gone."""
        del self._clients[client]

    def _on_client(self, sock: socket.socket) -> None:
        if len(self._clients) >= _MAX_CLIENTS:
            # Whoever asks now is more likely to matter than whoever has been silent for longest.
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
        self._sock.close()
        self._server.forget(self)

    def _on_ready(self, _events: int) -> None:
        try:
            if self._end < 0 and not self._output and not self._receive():
                self.close()
                return
            self._flush()
            if self._end >= 0 and not self._output:
                self._answer()
                self._flush()
        except OSError:
            self.close()
            return
        except ProtocolError as error:
            self._server.rejected(self, error)
            self.close()
            return
        # A message that is here already waits for the socket to be writable: its reply needs that anyway.
        events = EPOLLOUT if self._output or self._end >= 0 else EPOLLIN
        if events != self._events:
            self._events = events
            self._loop.modify(self._sock.fileno(), events)

    def _receive(self) -> bool:
        """Reads at most the rest of one message of full length. False at the end of the stream."""
        have = len(self._input)
        try:
            data = self._sock.recv(MAX_MESSAGE + 1 - have)
        except BlockingIOError:
            return True
        self._input += data
        self._end = self._input.find(0, have)
        if self._end < 0 and len(self._input) > MAX_MESSAGE:
            raise ProtocolError(f"a message of more than {MAX_MESSAGE} bytes")
        return bool(data)

    def _answer(self) -> None:
        message = bytes(self._input[: self._end])
        del self._input[: self._end + 1]
        self._end = self._input.find(0)
        self._output += self._server.answer(self, message)

    def _flush(self) -> None:
        if self._output:
            with contextlib.suppress(BlockingIOError):
                del self._output[: self._sock.send(self._output)]


def _check_call(message: bytes) -> bool:
    """Raises ProtocolError unless Service.handle() can cope with the message. Whether the call is one-way."""
    try:
        call = json.loads(message.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a message that is no JSON ({len(message)} bytes)") from error
    if not isinstance(call, dict) or not isinstance(call.get("method"), str):
        raise ProtocolError("a message that is no call")
    if not isinstance(call.get("parameters", {}), dict | None):
        raise ProtocolError("a call whose parameters are no object")
    if _is_nested_deeper(call, _MAX_NESTING):
        raise ProtocolError(f"a call nested more than {_MAX_NESTING} deep")
    return bool(call.get("oneway"))


def _is_nested_deeper(value: object, levels: int) -> bool:
    """Whether JSON has objects and arrays within each other on more levels than that."""
    level = [value]
    for _ in range(levels + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return False
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return True


def call(path: str | os.PathLike[str], method: str, **parameters: object) -> dict[str, Any]:
    """Calls a daemon's method, ``INTERFACE.NAME``, at its socket's path. Returns the reply's parameters.

    Raises PeerGone when nobody answers there, ProtocolError when the answer is no reply, and VarlinkError for
    the errors that the interface defines.
    """
    name, _, member = method.rpartition(".")
    interface = Interface((INTERFACE_DIR / f"{name}.varlink").read_text(encoding="ascii"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_CALL_SECONDS)
        try:
            sock.connect(os.fspath(path))
            reply = getattr(SimpleClientInterfaceHandler(interface, sock), member)(**parameters)
        except TimeoutError as error:
            raise PeerGone(f"{path}: no answer within {_CALL_SECONDS:g} s") from error
        except OSError as error:
            raise PeerGone(f"{path}: {error.strerror or error}") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"{path}: the answer is no reply to {method}") from error
    return dict(reply)
