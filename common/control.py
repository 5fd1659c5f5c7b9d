# SPDX-License-Identifier: GPL-2.0-or-later
"""What a control socket says: calls of Varlink (varlink.org) and their replies, at both ends.

A message is a JSON object that ends with a zero byte. asyncvarlink describes interfaces, converts types and finds
methods; its transport needs an asyncio loop and bounds neither messages nor replies, so the daemons have their own
(common.controlsocket), and so has the client here.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
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
from common.errors import PeerGone, ProtocolError
from common.trust import Trust
from common.version import package_version

if TYPE_CHECKING:
    from asyncvarlink.types import JSONObject

__all__ = ["Service", "call", "encode"]

MAX_REPLY = 4 << 20
"""bytes of the longest reply that call() takes, without its zero byte; 256 functions, all amiss, need less"""

_CALL_SECONDS = 5.0
"""how long call() takes at most"""


class Service:
    """Answers the calls to one interface, and to org.varlink.service."""

    def __init__(self, product: str, interface: VarlinkInterface) -> None:
        """``product`` is what org.varlink.service.GetInfo tells."""
        self._registry = VarlinkInterfaceRegistry()
        self._registry.register_interface(
            VarlinkServiceInterface("iohub", product, package_version() or "unknown", "", self._registry)
        )
        self._registry.register_interface(interface)

    def answer(self, message: bytes) -> bytes:
        """The reply to one message, with its zero byte; empty for a one-way call. Raises ProtocolError."""
        call = _parse(message)
        try:
            reply = self._call(call)
        except VarlinkErrorReply as error:
            reply = error.toreply()
        return b"" if call.oneway else encode(reply)

    def _call(self, call: VarlinkMethodCall) -> VarlinkMethodReply:
        """Raises VarlinkErrorReply, the interface's own errors and those of org.varlink.service."""
        method, signature = self._registry.lookup_method(call)
        try:
            parameters = signature.parameter_type.fromjson(call.parameters)
        except ConversionError as error:
            raise InvalidParameter(parameter=str(error.location[0])) from error
        result = method(**parameters)
        return VarlinkMethodReply(signature.return_type.tojson(result.parameters))


def encode(reply: VarlinkMethodReply) -> bytes:
    """A reply as it goes over the socket, with its zero byte."""
    return json.dumps(reply.tojson()).encode() + b"\0"


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
