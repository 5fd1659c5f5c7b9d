# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's monitor: one QMP connection (docs/interop/qmp-spec in QEMU), one command at a time.

The protocol is spoken by the qemu.qmp library. What that leaves open is here: fds that are sent with their
command, deadlines, events that are handled as they come instead of being kept for ever, and one kind of error for
all that a peer's input can make the library raise, failed assertions among them.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Mapping
from typing import Any

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate

from common.disposal import Disposal, receive_urgent_inline, refuse_fds
from common.errors import IohubError, PeerGone, UntrustedError, UsageError
from common.peer import PeerCredentials, peer_credentials
from common.trust import TRUST

__all__ = ["CommandError", "Monitor", "MonitorAbsent"]

_MAX_MESSAGE = 1 << 20
_GREETING_SECONDS = 5.0
_MAX_WORDS = 200
"""characters of an error's text, of which QEMU may have chosen any number"""
_COMMAND_SECONDS = 10.0
"""how long QEMU's main loop may be busy with something else"""

_disposal = Disposal()

# Its loggers report what the exceptions raised here say anyway.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class MonitorAbsent(IohubError):
    """Nobody listens at the monitor's socket: QEMU hasn't started, or has left its socket behind."""


class CommandError(IohubError):
    """QEMU refused a command; ``error_class`` is QMP's class of the error."""

    def __init__(self, text: str, error_class: str) -> None:
        super().__init__(text)
        self.error_class = error_class


class _Client(QMPClient):
    """The library's client, with one command's fd sent by the very sendmsg() that sends the command.

    Its own send_fd_scm() sends the fd apart, past asyncio's buffer: between two halves of a message, if that
    buffer isn't empty, and to be thrown away by QEMU if another fd comes before the command is carried out.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(readbuflen=_MAX_MESSAGE)
        self._monitor_socket = sock
        self._ending: asyncio.Task[Exception] | None = None
        self.passenger: int | None = None
        """the fd that the next message takes along"""

    async def end(self) -> Exception:
        """Ends the session, if that hasn't ended yet. Returns what ended it: an EOFError for the peer or a call of
        this. Any number of callers may wait here at once.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        return await asyncio.shield(self._ending)

    async def _end(self) -> Exception:
        # Ends whatever the library waits for. disconnect() alone waits for a peer that may read no more.
        with contextlib.suppress(OSError):
            self._monitor_socket.shutdown(socket.SHUT_RDWR)
        try:
            await self.disconnect()
        except Exception as error:  # noqa: BLE001  what ended its reader or its writer, of whatever kind
            return error
        return EOFError()

    async def _do_recv(self) -> Message:
        line = await self._readline()
        try:
            return Message(line, eager=True)
        except Exception as error:
            # The library's own errors carry the message, and print it: as deep and as long as it is.
            raise QMPError(f"{type(error).__name__} in a message") from error

    async def _on_message(self, msg: Message) -> None:
        tag: Any = msg.get("id")
        if "event" not in msg and tag in self._pending and self._pending[tag].full():
            # The library would wait for room, and read no more.
            raise QMPError("two answers to one command")
        await super()._on_message(msg)

    def _cb_inbound(self, msg: Message) -> Message:
        return msg  # the library formats each message for a log, as deep as it is

    def _do_send(self, msg: Message) -> None:
        fd, self.passenger = self.passenger, None
        if fd is None:
            super()._do_send(msg)
            return
        data = bytes(msg)
        # Every earlier command has been answered, so nothing of it is waiting in asyncio's buffer.
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        if self._monitor_socket.sendmsg([data], rights) != len(data):
            raise OSError(f"{len(data)} bytes don't fit into an empty socket")


class Monitor:
    """A connected monitor. It is out of order after a PeerGone, and only close() makes sense then."""

    def __init__(self, client: _Client, peer: PeerCredentials) -> None:
        self.peer = peer
        """who listens at the socket"""
        self.name = str(peer)
        """the same, by name and pid"""
        self._client = client
        self._asked: float | None = None  # when the command that isn't answered yet was sent
        self._turn = asyncio.Lock()

    @classmethod
    async def connect(
        cls,
        path: str,
        on_event: Callable[[str, Mapping[str, Any]], None],
        on_silence: Callable[[PeerCredentials], None],
    ) -> Monitor:
        """Connects and negotiates capabilities.

        ``on_event(name, data)`` is called for each event from then on. ``on_silence(peer)`` is called every five
        seconds that the greeting takes; this goes on waiting, since QEMU greets its next client when it loses one.

        Raises MonitorAbsent, PeerGone, and UsageError for a path that can't be a monitor's.
        """
        sock = _connect(path)
        client = _Client(sock)

        def dispatch(event: Message) -> bool:
            data = event.get("data")
            on_event(str(event["event"]), data if isinstance(data, dict) else {})
            return False  # what this accepts, the library keeps for ever

        client.events.event_filter = dispatch
        try:
            peer = peer_credentials(sock)
            greeting = asyncio.create_task(client.connect(sock))
        except BaseException:
            sock.close()
            raise
        try:
            while not (await asyncio.wait({greeting}, timeout=_GREETING_SECONDS))[0]:
                on_silence(peer)
            await asyncio.shield(greeting)
        except ConnectError as error:
            raise PeerGone(f"{path}: {_words(error.exc)}") from error
        except Exception as error:
            # The library asserts that a session is still there when connect() returns.
            raise PeerGone(f"{path}: {_words(await client.end())}") from error
        except asyncio.CancelledError:
            # The library can't be cancelled while it cleans up; the end of the stream ends it, too.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            await asyncio.gather(greeting, return_exceptions=True)
            await client.end()
            raise
        finally:
            if client.runstate is not Runstate.RUNNING:
                sock.close()
        return cls(client, peer)

    @property
    def silent_for(self) -> float:
        """The seconds since a command was sent that isn't answered yet; 0 if there is none."""
        return 0.0 if self._asked is None else time.monotonic() - self._asked

    async def execute(self, command: str, **arguments: object) -> Any:
        """Carries out a command and gives its result.

        Raises CommandError, and PeerGone when the connection ends or QEMU doesn't answer in time.
        """
        return await self._execute(command, arguments, None, _COMMAND_SECONDS)

    async def wait_for(self, command: str) -> Any:
        """As execute(), but waits for as long as QEMU takes; see ``silent_for``."""
        return await self._execute(command, {}, None, None)

    async def getfd(self, name: str, fd: int) -> None:
        """Gives QEMU a duplicate of an fd, by a name that then means no other. Raises as execute()."""
        await self._execute("getfd", {"fdname": name}, fd, _COMMAND_SECONDS)

    async def wait_closed(self) -> None:
        """Returns when QEMU has closed the connection. Raises PeerGone when it ended in another way."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        cause = await self._client.end()
        if not isinstance(cause, EOFError):
            raise PeerGone(_words(cause)) from cause

    async def close(self) -> None:
        """Ends the connection. Doesn't wait for QEMU."""
        await self._client.end()

    async def _execute(
        self, command: str, arguments: Mapping[str, object], fd: int | None, seconds: float | None
    ) -> Any:
        async with self._turn:
            self._client.passenger = fd
            self._asked = time.monotonic()
            try:
                async with asyncio.timeout(seconds):
                    return await self._client.execute(command, arguments)
            except ExecuteError as error:
                raise CommandError(str(error), error.error_class) from error
            except ExecInterruptedError as error:
                raise PeerGone(f"{command}: {_words(await self._client.end())}") from error
            except TimeoutError as error:
                raise PeerGone(f"QEMU hasn't answered {command} within {seconds:g} s") from error
            except Exception as error:
                raise PeerGone(f"{command}: {_words(error)}") from error
            finally:
                self._client.passenger = None
                self._asked = None


class _Socket(socket.socket):
    """A socket for asyncio, whose thread waits for the close of no fd that comes over it."""

    def recv(self, bufsize: int, _flags: int = 0) -> bytes:
        return _disposal.receive(self, bufsize)

    def close(self) -> None:
        if self.fileno() != -1:
            _disposal.hang_up(socket.socket(fileno=self.detach()))


def _connect(path: str) -> socket.socket:
    """A connected, non-blocking socket; asyncio would take EAGAIN, a full queue, for being connected."""
    try:
        sock = _Socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise PeerGone(f"{path}: {error.strerror}") from error
    try:
        refuse_fds(sock)
        receive_urgent_inline(sock)
        TRUST.connect(sock, path)
    except UntrustedError as error:
        sock.close()
        raise UsageError(f"--vm qmp:{path}: {error}") from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        sock.close()
        if _is_no_socket(path):
            raise UsageError(f"--vm qmp:{path}: exists and is not a socket") from error
        raise MonitorAbsent(f"{path}: {error.strerror}") from error
    except BlockingIOError as error:
        sock.close()
        raise PeerGone(f"{path} takes no connection: others wait for it already") from error
    except (OSError, ValueError) as error:
        sock.close()
        raise UsageError(f"--vm qmp:{path}: {getattr(error, 'strerror', None) or error}") from error
    return sock


def _is_no_socket(path: str) -> bool:
    try:
        return not stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _words(error: Exception) -> str:
    """What ended a session, or kept one from beginning."""
    if isinstance(error, EOFError):
        return "QEMU has closed its monitor"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # Not str(): it may contain all of a message.
    text = error.args[0] if error.args and isinstance(error.args[0], str) else ""
    return f"QEMU's monitor sent an invalid message: {text[:_MAX_WORDS] or type(error).__name__}"
