# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's monitor: one QMP connection (docs/interop/qmp-spec in QEMU), one command at a time.

The protocol's machinery is the qemu.qmp library's. What it leaves open is here: fds that ride with their
command, deadlines, and events that are handled as they come instead of being kept for ever.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable, Mapping
from typing import Any

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate

from common.errors import IohubError, PeerGone, UsageError
from common.link import peer_credentials

__all__ = ["CommandError", "Monitor", "MonitorAbsent"]

_MAX_MESSAGE = 1 << 20
_GREETING_SECONDS = 5.0
_COMMAND_SECONDS = 10.0
"""how long QEMU's main loop may be busy with something else"""

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
        self.passenger: int | None = None
        """the fd that the next message takes along"""

    def hang_up(self) -> None:
        """Ends the stream: whatever the library waits for comes to its end."""
        with contextlib.suppress(OSError):
            self._monitor_socket.shutdown(socket.SHUT_RDWR)

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

    def __init__(self, client: _Client, name: str) -> None:
        self.name = name
        """who listens at the socket, by name and pid"""
        self._client = client
        self._turn = asyncio.Lock()

    @classmethod
    async def connect(
        cls, path: str, on_event: Callable[[str, Mapping[str, Any]], None], on_silence: Callable[[str], None]
    ) -> Monitor:
        """Connects and negotiates capabilities.

        ``on_event(name, data)`` is called for each event from then on. ``on_silence(line)`` is called when
        the greeting takes long; this goes on waiting, since QEMU greets its next client when it loses one.

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
            name = str(peer_credentials(sock))
            greeting = asyncio.create_task(client.connect(sock))
        except BaseException:
            sock.close()
            raise
        try:
            await asyncio.wait({greeting}, timeout=_GREETING_SECONDS)
            if not greeting.done():
                on_silence(
                    f"QEMU's monitor {path} doesn't answer: it serves one client at a time and may have one; "
                    "give iohub-proxyd one of its own (-qmp unix:PATH,server=on,wait=off)"
                )
            await asyncio.shield(greeting)
        except ConnectError as error:
            raise PeerGone(f"{path}: {_cause(error)}") from error
        except asyncio.CancelledError:
            # The library doesn't bear to be cancelled while it cleans up; it does bear the end of the stream.
            client.hang_up()
            await asyncio.gather(greeting, return_exceptions=True)
            await cls(client, name).close()
            raise
        finally:
            if client.runstate is not Runstate.RUNNING:
                sock.close()
        return cls(client, name)

    async def execute(self, command: str, **arguments: object) -> Any:
        """Carries out a command and gives its result.

        Raises CommandError, and PeerGone when the connection ends or QEMU doesn't answer in time.
        """
        return await self._execute(command, arguments, None)

    async def getfd(self, name: str, fd: int) -> None:
        """Gives QEMU a duplicate of an fd, by a name that then means no other. Raises as execute()."""
        await self._execute("getfd", {"fdname": name}, fd)

    async def wait_closed(self) -> None:
        """Returns when the connection has ended."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def close(self) -> None:
        """Ends the connection. Doesn't wait for QEMU, which may read no more: disconnect() alone would."""
        self._client.hang_up()
        # What has ended the reader comes up here once more; nothing that QEMU says may end more than that.
        with contextlib.suppress(Exception):
            await self._client.disconnect()

    async def _execute(self, command: str, arguments: Mapping[str, object], fd: int | None) -> Any:
        async with self._turn:
            self._client.passenger = fd
            try:
                async with asyncio.timeout(_COMMAND_SECONDS):
                    return await self._client.execute(command, arguments)
            except ExecuteError as error:
                raise CommandError(str(error), error.error_class) from error
            except ExecInterruptedError as error:
                raise PeerGone(f"QEMU has closed its monitor during {command}") from error
            except TimeoutError as error:
                raise PeerGone(f"QEMU hasn't answered {command} within {_COMMAND_SECONDS:g} s") from error
            except QMPError as error:
                raise PeerGone(f"QEMU's monitor: {command}: {error}") from error
            finally:
                self._client.passenger = None


def _connect(path: str) -> socket.socket:
    """A connected, non-blocking socket; asyncio would take EAGAIN, a full queue, for being connected."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        sock.close()
        if _is_no_socket(path):
            raise UsageError(f"--vm qmp:{path}: exists and is no socket") from error
        raise MonitorAbsent(f"{path}: {error.strerror}") from error
    except BlockingIOError as error:
        sock.close()
        raise PeerGone(f"QEMU's monitor {path} is busy: others are waiting for it already") from error
    except (OSError, ValueError) as error:
        sock.close()
        raise UsageError(f"--vm qmp:{path}: {getattr(error, 'strerror', None) or error}") from error
    return sock


def _is_no_socket(path: str) -> bool:
    try:
        return not stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _cause(error: ConnectError) -> str:
    cause = error.exc
    if isinstance(cause, EOFError):
        return "QEMU has closed its monitor"
    return getattr(cause, "strerror", None) or str(cause) or repr(cause)
