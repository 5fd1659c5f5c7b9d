# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest with one pci-serial at 05.0, behind any of two proxies and in any of two remote processes."""

from __future__ import annotations

import contextlib
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

from common.ctl.children import Child
from common.ctl.guestconsole import GuestConsole, Reply
from tests.support.qemu import PATIENCE, guest_image
from tests.support.qemuguest import QemuGuest
from tests.support.wait import wait_until
from tests.support.xremote import StockRemote

__all__ = ["OURS", "STOCK", "Cell"]

STOCK = "stock"
OURS = "ours"

_DEVICE = "id=com1,addr=05.0"
_ADDR = "05.0"


class Cell:
    """A guest that has found its function; ``proxy`` and ``remote`` are STOCK or OURS each."""

    def __init__(self, directory: Path, proxy: str, remote: str) -> None:
        """Sockets and logs go into the directory."""
        self._directory = directory
        self._stack = ExitStack()
        try:
            if remote == OURS:
                self._start_remoted()
            if proxy == OURS:
                self.console = self._start_proxyd(remote)
            else:
                self.console = self._start_qemu(remote)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends all processes."""
        self._stack.close()

    def command(self, line: str) -> Reply:
        """The guest's answer, good or bad."""
        return self.console.command(line, timeout=60.0)

    def ok(self, line: str) -> Reply:
        """The guest's answer, which must be ok."""
        reply = self.command(line)
        assert reply.ok, f"{line}: {reply.reason}, {reply.records}"
        return reply

    @property
    def _socket(self) -> str:
        return str(self._directory / "com1.sock")

    def _start_remoted(self) -> None:
        self._start_child("remoted", f"--device=pci-serial,{_DEVICE}")

    def _start_proxyd(self, remote: str) -> GuestConsole:
        guest_image()
        broker = None
        if remote == STOCK:
            broker = Broker(self._socket)
            self._stack.callback(broker.close)
        self._start_child("proxyd", f"--device={_DEVICE}")
        sock = socket.socket(socket.AF_UNIX)
        console = self._stack.enter_context(GuestConsole(sock))
        sock.connect(str(self._directory / "proxyd.console"))
        console.wait_ready(PATIENCE)
        if broker is not None:
            broker.wait_ready()
        wait_until(lambda: self._is_found(console), "the guest finds its function")
        return console

    def _start_qemu(self, remote: str) -> GuestConsole:
        if remote == STOCK:
            ours, theirs = socket.socketpair()
            self._stack.enter_context(StockRemote(theirs))
        else:
            ours = socket.socket(socket.AF_UNIX)
            ours.connect(self._socket)
        with ours:
            arguments = [
                *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
                *("-device", f"x-pci-proxy-dev,addr={_ADDR},fd={ours.fileno()}"),
            ]
            machine = QemuGuest(arguments, [ours.fileno()], ",memory-backend=ram")
        return self._stack.enter_context(machine).console

    def _start_child(self, module: str, device: str) -> None:
        options = ["--name=matrix", f"--runtime-dir={self._directory}", device]
        child = Child(module, options, self._directory)
        self._stack.callback(child.kill)

    @staticmethod
    def _is_found(console: GuestConsole) -> bool:
        listed = console.command("lspci").of_kind("pci")
        return any(record.text("addr") == _ADDR for record in listed)


class Broker:
    """Starts a QEMU remote process for each client that comes to a path: it can't listen itself."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._remote: StockRemote | None = None
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait_ready(self) -> None:
        """Waits until a client's remote has been reset for the first time."""
        assert self._is_ready.wait(PATIENCE), "no client came for QEMU's remote process"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        if self._remote is not None:
            self._remote.close()

    def _run(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:  # it was shut down
                return
            if self._remote is not None:
                self._remote.close()
                self._remote = None
            with contextlib.suppress(EOFError, ConnectionError):  # the client didn't stay
                self._remote = StockRemote(link)
                self._is_ready.set()
