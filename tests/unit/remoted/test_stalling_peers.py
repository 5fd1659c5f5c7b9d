# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted as a process, and files from its clients whose close lasts: nobody but their sender notices."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import vfiouser
from common.ctl.children import Child
from common.link import Client
from common.mpqemu import CONFIG, SYSMEM, Command, request_frame
from tests.support.fds import count_fds, send_fds
from tests.support.unsendable import has_passrights, lasting_eventfd, unsendable_socket
from tests.support.wait import wait_until

SECONDS = 20.0
CONFIG_READ = request_frame(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
OWN_THREADS = 3
"""of the loop, the watchdog, and what is written to stderr"""
SYNC = request_frame(Command.SYNC_SYSMEM, SYSMEM.pack(*([0] * 8), *([4096] * 8), *([0] * 8)))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Child]:
    child = start(tmp_path)
    yield child
    child.kill()


def start(directory: Path) -> Child:
    options = ["--name=vm", f"--runtime-dir={directory}", "--device=edu,id=a", "--device=edu,id=b"]
    options.append("--device=edu,id=c,transport=vfio-user")
    return Child("remoted", options, directory)


def connect(directory: Path, name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(SECONDS)
    sock.connect(str(directory / name))
    return sock


def answers(sock: socket.socket) -> bool:
    sock.sendall(CONFIG_READ)
    return struct.unpack("<i4xQQ", sock.recv(24)) == (Command.RET, 8, 0x11E81234)


def with_a_request(peer: socket.socket, sock: socket.socket) -> None:
    send_fds(peer, CONFIG_READ, [sock.fileno()])


def as_ram(peer: socket.socket, sock: socket.socket) -> None:
    send_fds(peer, SYNC, [sock.fileno()])


def as_an_eventfd(peer: socket.socket, sock: socket.socket) -> None:
    send_fds(peer, request_frame(Command.SET_IRQFD), [sock.fileno()] * 2)


def urgently(peer: socket.socket, sock: socket.socket) -> None:
    send_fds(peer, CONFIG_READ[:1], [sock.fileno()], socket.MSG_OOB)
    peer.sendall(CONFIG_READ[1:])


def unread(peer: socket.socket, sock: socket.socket) -> None:
    peer.sendall(struct.pack("<i4xQ", 99, 0) + CONFIG_READ)
    send_fds(peer, CONFIG_READ, [sock.fileno()])


@pytest.mark.parametrize("send", [with_a_request, as_ram, as_an_eventfd, urgently, unread])
@pytest.mark.parametrize("is_served", [True, False])
def test_other_devices_and_the_end_dont_wait(
    tmp_path: Path, daemon: Child, send: Callable[[socket.socket, socket.socket], None], is_served: bool
) -> None:
    with unsendable_socket() as sock, contextlib.ExitStack() as peers:
        if not is_served:
            assert answers(peers.enter_context(connect(tmp_path, "a.sock")))
        other = peers.enter_context(connect(tmp_path, "b.sock"))
        assert answers(other)
        daemon.process.send_signal(signal.SIGSTOP)  # or it might close its copy before the one here is closed
        with connect(tmp_path, "a.sock") as peer:
            send(peer, sock)
            sock.close()
            daemon.process.send_signal(signal.SIGCONT)
            peer.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while peer.recv(100):
                    pass
        assert answers(other)
        assert len(os.listdir(f"/proc/{daemon.process.pid}/task")) == OWN_THREADS + 1
        assert daemon.end() == 0


def vfiouser_frame(command: int, payload: bytes) -> bytes:
    return vfiouser.HEADER.pack(1, command, vfiouser.HEADER.size + len(payload), 0, 0) + payload


def vfiouser_error(peer: socket.socket) -> int:
    """The errno of the next answer, 0 for success."""
    data = peer.recv(4096)
    return int(vfiouser.HEADER.unpack_from(data)[4])


VFIOUSER_VERSION = vfiouser_frame(vfiouser.Command.VERSION, vfiouser.VERSION.pack(0, 0))
VFIOUSER_INFO = vfiouser_frame(vfiouser.Command.DEVICE_GET_INFO, vfiouser.DEVICE_INFO.pack(16, 0, 0, 0))
DMA_MAP = vfiouser_frame(vfiouser.Command.DMA_MAP, vfiouser.DMA_MAP.pack(32, 3, 0, 0, 4096))


def set_irqs(flags: int, index: int = 0) -> bytes:
    """DEVICE_SET_IRQS with an eventfd for one interrupt."""
    payload = vfiouser.IRQ_SET.pack(20, flags, index, 0, 1)
    return vfiouser_frame(vfiouser.Command.DEVICE_SET_IRQS, payload)


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(DMA_MAP, id="RAM"),
        pytest.param(set_irqs(0x24), id="trigger"),
        pytest.param(set_irqs(0x24, 1), id="vector"),
        pytest.param(VFIOUSER_INFO, id="a request that takes none"),
    ],
)
def test_clients_of_vfio_user_hold_up_nobody_either(tmp_path: Path, daemon: Child, request_: bytes) -> None:
    """The close of what they send lasts, and another client's answer does not wait for it."""
    with unsendable_socket() as sock, connect(tmp_path, "b.sock") as other:
        assert answers(other)
        with connect(tmp_path, "c.sock") as peer:
            peer.sendall(VFIOUSER_VERSION)
            assert vfiouser_error(peer) == 0
            # Else it might close its copy before the one here is closed.
            daemon.process.send_signal(signal.SIGSTOP)
            send_fds(peer, request_, [sock.fileno()])
            sock.close()
            daemon.process.send_signal(signal.SIGCONT)
            assert vfiouser_error(peer) == (0 if request_ is VFIOUSER_INFO else errno.EINVAL)
            assert answers(other)
        assert len(os.listdir(f"/proc/{daemon.process.pid}/task")) == OWN_THREADS + 1
        assert daemon.end() == 0


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(set_irqs(0x24), id="trigger"),
        pytest.param(set_irqs(0x14), id="unmask"),
        pytest.param(set_irqs(0x24, 1), id="vector"),
    ],
)
@pytest.mark.parametrize("is_replaced", [True, False])
def test_eventfds_of_vfio_user_whose_close_lasts_delay_nobody(
    tmp_path: Path, daemon: Child, request_: bytes, is_replaced: bool
) -> None:
    with (
        lasting_eventfd() as eventfd,
        connect(tmp_path, "c.sock") as peer,
        connect(tmp_path, "b.sock") as other,
    ):
        peer.sendall(VFIOUSER_VERSION)
        assert vfiouser_error(peer) == 0
        for fd in (eventfd, os.eventfd(0)) if is_replaced else (eventfd,):
            send_fds(peer, request_, [fd])
            assert vfiouser_error(peer) == 0
            os.close(fd)
        peer.close()
        assert answers(other)
        # The kernel ends the process when the close has ended, but its successor doesn't wait.
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not (tmp_path / "c.sock").exists(), "the sockets are gone")


def test_what_another_devices_client_sends_is_closed_meanwhile(tmp_path: Path, daemon: Child) -> None:
    with unsendable_socket() as sock, connect(tmp_path, "a.sock") as peer:
        daemon.process.send_signal(signal.SIGSTOP)  # or it might close its copy before the one here is closed
        send_fds(peer, CONFIG_READ, [sock.fileno()])
        sock.close()
        daemon.process.send_signal(signal.SIGCONT)
        assert peer.recv(100)
        with connect(tmp_path, "b.sock") as other, open(os.devnull, "rb") as null:
            before = count_fds(daemon.process.pid)
            for _ in range(60):
                send_fds(other, CONFIG_READ, [null.fileno()] * 5)
                assert other.recv(100)
            assert answers(other)
            wait_until(lambda: count_fds(daemon.process.pid) <= before + 1, "all fds are closed")


@pytest.mark.parametrize("place", ["irqfd", "resamplefd"])
@pytest.mark.parametrize("is_replaced", [True, False])
def test_an_eventfd_whose_close_lasts_delays_nobody(
    tmp_path: Path, daemon: Child, place: str, is_replaced: bool
) -> None:
    with (
        lasting_eventfd() as eventfd,
        connect(tmp_path, "a.sock") as peer,
        connect(tmp_path, "b.sock") as other,
    ):
        pair = [eventfd, os.eventfd(0)] if place == "irqfd" else [os.eventfd(0), eventfd]
        send_fds(peer, request_frame(Command.SET_IRQFD), pair)
        assert answers(peer)
        for fd in pair:
            os.close(fd)
        if is_replaced:
            pair = [os.eventfd(0), os.eventfd(0)]
            send_fds(peer, request_frame(Command.SET_IRQFD), pair)
            assert answers(peer)
            for fd in pair:
                os.close(fd)
        peer.close()
        assert answers(other)
        # The kernel ends the process when the close has ended, but its successor doesn't wait.
        daemon.process.send_signal(signal.SIGTERM)
        assert other.recv(1) == b""
        successor = start(tmp_path)
        with connect(tmp_path, "b.sock") as again:
            assert answers(again)
        assert successor.end() == 0
    assert daemon.process.wait(SECONDS) == 0


def test_the_end_doesnt_wait_for_clients_that_were_never_taken(tmp_path: Path, daemon: Child) -> None:
    with unsendable_socket() as sock, connect(tmp_path, "a.sock") as peer:
        daemon.process.send_signal(signal.SIGSTOP)
        daemon.process.send_signal(signal.SIGTERM)
        with connect(tmp_path, "a.sock") as late:
            send_fds(late, CONFIG_READ, [sock.fileno()])
            sock.close()
            daemon.process.send_signal(signal.SIGCONT)
            assert daemon.process.wait(SECONDS) == 0
        assert peer.recv(1) == b""


@pytest.mark.skipif(not has_passrights(), reason="before Linux 6.16 sockets can't refuse fds")
def test_the_control_socket_takes_no_fds(tmp_path: Path, daemon: Child) -> None:
    with connect(tmp_path, "remoted.varlink") as sock, pytest.raises(PermissionError):
        send_fds(sock, b"x", [0])


def test_who_keeps_to_the_protocol_needs_no_thread_more(tmp_path: Path, daemon: Child) -> None:
    ram = os.memfd_create("ram")
    os.ftruncate(ram, 8192)
    for _ in range(3):
        client = Client.connect(str(tmp_path / "a.sock"), SECONDS)
        for pages in (1, 2):
            client.send(
                Command.SYNC_SYSMEM, SYSMEM.pack(*([0] * 8), *([pages * 4096] * 8), *([0] * 8)), [ram]
            )
        pair = [os.eventfd(0), os.eventfd(0)]
        client.send(Command.SET_IRQFD, fds=pair)
        client.request(Command.DEVICE_RESET)
        for fd in pair:
            os.close(fd)
        client.close()
    with connect(tmp_path, "b.sock") as other:
        assert answers(other)
    os.close(ram)
    tasks = f"/proc/{daemon.process.pid}/task"
    wait_until(lambda: len(os.listdir(tasks)) == OWN_THREADS, "the thread that closes eventfds has ended")
