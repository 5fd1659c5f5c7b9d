# SPDX-License-Identifier: GPL-2.0-or-later
"""Which devices are serving a client: asked for functions that are found plugged in QEMU.

remoted is asked first, at its control socket: to it, a connection to a device's socket would be a client that has
to be refused. A device that remoted doesn't have is asked at its own socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple

from asyncvarlink import VarlinkErrorReply

from common.config import DeviceConfig, Transport
from common.control import call
from common.errors import IohubError, PeerGone, UntrustedError
from common.peer import PeerCredentials, peer_credentials
from common.trust import TRUST
from proxyd.vm.bounded import run_bounded
from proxyd.vm.qmp.handover import find_server

__all__ = ["find_servers", "find_successor", "find_unlinked", "find_waiting", "wait_for_remoted"]

_REMOTED_SECONDS = 2.0
_SUCCESSOR_SECONDS = 5.0
"""how long the service manager may take to start the next remoted"""
_POLL_SECONDS = 0.05
_UNSEEN = PeerCredentials(0, 0, 0)
"""a process of which nothing is known"""


class _Answer(NamedTuple):
    """What remoted says of its devices."""

    remoted: PeerCredentials
    links: dict[str, bool]
    """by the devices' ids, whether there is a client; none if it takes the call but doesn't answer"""
    transports: dict[str, str]
    """by the same, what the devices' clients speak"""

    @property
    def servers(self) -> dict[str, PeerCredentials | None]:
        return {name: self.remoted if is_linked else None for name, is_linked in self.links.items()}


async def find_servers(
    control: str, functions: Sequence[DeviceConfig], path_of: Callable[[DeviceConfig], str]
) -> dict[str, PeerCredentials | None]:
    """Who serves each device, by its id; None for one that is serving nobody.

    ``control`` is remoted's control socket, ``path_of()`` a device's own. Takes four seconds at most, however many
    there are.
    """
    answer = await asyncio.to_thread(_ask_remoted, control)
    servers = {} if answer is None else answer.servers
    asked = [each for each in functions if each.id not in servers and each.transport is Transport.MPQEMU]
    found = await asyncio.gather(*(asyncio.to_thread(find_server, path_of(each)) for each in asked))
    servers |= {each.id: server for each, server in zip(asked, found, strict=True)}
    for each in functions:
        # A vfio-user server that is connected to can't be told from one that serves its first client.
        if each.id not in servers and each.socket is not None:
            servers[each.id] = _UNSEEN
        elif each.id not in servers and answer is not None and not answer.links:
            servers[each.id] = answer.remoted
    return servers


async def find_waiting(control: str, name: str, path: str, *, is_others: bool) -> PeerCredentials:
    """The process that waits for QEMU to connect to the socket of a vfio-user device.

    The device may be another program's if ``is_others``. Raises PeerGone if nobody does, somebody untrusted, or
    one that speaks another protocol: QEMU would stand still for five seconds at each attempt, and abort at a later
    one (vfio_user_send_wait() in hw/vfio-user/proxy.c).
    """
    answer = await asyncio.to_thread(_ask_remoted, control)
    if answer is not None and name in answer.links:
        if answer.transports[name] != Transport.VFIO_USER:
            raise PeerGone(
                f"{path}: {answer.remoted} has the device with transport={answer.transports[name]}: give both "
                "daemons the same"
            )
        if answer.links[name]:
            raise PeerGone(f"{path}: {answer.remoted} serves another client there")
        peer = answer.remoted
    elif not is_others:
        raise PeerGone(f"{control}: no iohub-remoted answers that has the device")
    else:
        peer = _UNSEEN
    try:
        await asyncio.to_thread(TRUST.check_socket, path)
    except OSError as error:
        raise PeerGone(f"{path}: {error.strerror}") from error
    except UntrustedError as error:
        raise PeerGone(f"{path}: {error}") from error
    return peer


async def find_unlinked(control: str) -> set[str]:
    """The ids of remoted's devices that have no client; none if it doesn't answer."""
    answer = await asyncio.to_thread(_ask_remoted, control)
    return set() if answer is None else {name for name, is_linked in answer.links.items() if not is_linked}


async def wait_for_remoted(control: str) -> dict[str, PeerCredentials | None]:
    """What remoted says of its devices, as soon as it answers; nothing if it doesn't within five seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SUCCESSOR_SECONDS):
            while True:
                answer = await asyncio.to_thread(_ask_remoted, control)
                if answer is not None and answer.links:
                    return answer.servers
                await asyncio.sleep(_POLL_SECONDS)
    return {}


async def find_successor(control: str, name: str) -> PeerCredentials | None:
    """The remoted that goes on with a device's link after the one before it has ended; None if none does.

    Its first answer tells: it takes its links from the fd store before it answers at its control socket.
    """
    return (await wait_for_remoted(control)).get(name)


def _ask_remoted(control: str) -> _Answer | None:
    """What remoted says of its devices, None if it doesn't answer."""

    def ask() -> _Answer:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_REMOTED_SECONDS)
            sock.connect(control)
            remoted = peer_credentials(sock)
        try:
            functions = call(control, "org.iohub.Remoted.Status")["functions"]
            links = {str(function["id"]): function["link"] == "connected" for function in functions}
            transports = {str(function["id"]): str(function["transport"]) for function in functions}
        except (IohubError, VarlinkErrorReply, LookupError, TypeError, ValueError):
            links, transports = {}, {}
        return _Answer(remoted, links, transports)

    try:
        return run_bounded("ask remoted", _REMOTED_SECONDS, ask)
    except (IohubError, OSError):
        return None
