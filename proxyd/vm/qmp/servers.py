# SPDX-License-Identifier: GPL-2.0-or-later
"""Which devices are serving a client: asked for functions that are found plugged in QEMU.

remoted is asked first, at its control socket: to it, a connection to a device's socket would be a client that has
to be refused. A device that remoted doesn't have is asked at its own socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping

from asyncvarlink import VarlinkErrorReply

from common.control import call
from common.errors import IohubError
from common.peer import PeerCredentials, peer_credentials
from proxyd.vm.bounded import run_bounded
from proxyd.vm.qmp.handover import find_server

__all__ = ["find_servers", "find_successor", "wait_for_remoted"]

_REMOTED_SECONDS = 2.0
_SUCCESSOR_SECONDS = 5.0
"""how long the service manager may take to start the next remoted"""
_POLL_SECONDS = 0.05


async def find_servers(control: str, paths: Mapping[str, str]) -> dict[str, PeerCredentials | None]:
    """Who serves each device, by its id; None for one that is serving nobody.

    ``control`` is remoted's control socket, ``paths`` are the devices' sockets by id. Takes four seconds at most,
    however many there are.
    """
    servers = await asyncio.to_thread(_ask_remoted, control)
    others = [name for name in paths if name not in servers]
    found = await asyncio.gather(*(asyncio.to_thread(find_server, paths[name]) for name in others))
    return servers | dict(zip(others, found, strict=True))


async def wait_for_remoted(control: str) -> dict[str, PeerCredentials | None]:
    """What remoted says of its devices, as soon as it answers; nothing if it doesn't within five seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SUCCESSOR_SECONDS):
            while not (servers := await asyncio.to_thread(_ask_remoted, control)):
                await asyncio.sleep(_POLL_SECONDS)
            return servers
    return {}


async def find_successor(control: str, name: str) -> PeerCredentials | None:
    """The remoted that goes on with a device's link after the one before it has ended; None if none does.

    Its first answer tells: it takes its links from the fd store before it answers at its control socket.
    """
    return (await wait_for_remoted(control)).get(name)


def _ask_remoted(control: str) -> dict[str, PeerCredentials | None]:
    """What remoted says of its devices, nothing if it doesn't answer."""

    def ask() -> dict[str, PeerCredentials | None]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_REMOTED_SECONDS)
            sock.connect(control)
            remoted = peer_credentials(sock)
        functions = call(control, "org.iohub.Remoted.Status")["functions"]
        return {
            str(function["id"]): remoted if function["link"] == "connected" else None
            for function in functions
        }

    try:
        return run_bounded("ask remoted", _REMOTED_SECONDS, ask)
    except (IohubError, OSError, VarlinkErrorReply, LookupError, TypeError, ValueError):
        return {}
