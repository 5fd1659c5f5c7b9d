# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of proxyd beside a QEMU that doesn't answer, or takes its time."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import pytest

from common.config import DeviceConfig, VmConfig
from common.loop import Loop
from common.pci import parse_devfn
from proxyd.vm.qmp import handover, monitor, slot
from proxyd.vm.qmp import plugger as qmp
from proxyd.vm.qmp.plugger import QemuPlugger
from tests.support.remote import RemoteThread
from tests.support.remotebench import LineDevice

GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}
}
PASSES = 40
"""of asyncio's loop, more than news takes from its one end to the other"""
HANGS = 20.0
"""seconds after which what hasn't ended never will"""


class Qemu:
    """QEMU's end of the monitor, in proxyd's loop: greets, negotiates, and leaves the rest to its heirs."""

    def __init__(self, loop: Loop, path: str) -> None:
        self.loop = loop
        self.commands: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._link: socket.socket | None = None
        loop.add(self._listener.fileno(), self._on_client)

    def close(self) -> None:
        self._listener.close()
        if self._link is not None:
            self._link.close()

    def on_command(self, command: str, tag: object) -> None:
        """To be answered, or not."""

    def send(self, message: Mapping[str, object]) -> None:
        assert self._link is not None
        self._link.sendall(json.dumps(message).encode() + b"\r\n")

    def hang_up(self) -> None:
        assert self._link is not None
        self._link.shutdown(socket.SHUT_RDWR)

    def _on_client(self, _events: int) -> None:
        self._link, _ = self._listener.accept()
        self.send(GREETING)
        self.loop.add(self._link.fileno(), self._on_data)

    def _on_data(self, _events: int) -> None:
        assert self._link is not None
        data = self._link.recv(4096)
        if not data:
            self.loop.remove(self._link.fileno())
            return
        message = json.loads(data)
        if message["execute"] == "qmp_capabilities":
            self.send({"return": {}})
            return
        self.commands.append(message["execute"])
        self.on_command(message["execute"], message["id"])


class SilentQemu(Qemu):
    """Stops proxyd's loop instead of answering the first command."""

    def on_command(self, command: str, tag: object) -> None:
        self.loop.stop()
        # Lets proxyd end even if it can't do so by itself.
        self.loop.call_later(HANGS, self.hang_up)


class FitQemu(Qemu):
    """Gives every answer that proxyd hopes for, until it is given a device: proxyd's loop is stopped then."""

    ANSWERS: ClassVar[Mapping[str, object]] = {
        "query-kvm": {"enabled": True},
        "qom-list": [
            {"name": "ioapic", "type": "child<kvm-ioapic>"},
            {"name": "ram0", "type": "child<memory-backend-memfd>"},
        ],
        "qom-get": "/machine/unattached/device[19]",
        "query-memdev": [{"id": "ram0", "share": True, "size": 64 << 20}],
        "query-pci": [],
        "query-status": {"running": True, "status": "running"},
    }

    def on_command(self, command: str, tag: object) -> None:
        if command == "device_add":
            self.on_device(tag)
        else:
            self.send({"return": self.ANSWERS.get(command, {}), "id": tag})

    def on_device(self, tag: object) -> None:
        self.loop.stop()
        self.refuse(tag)

    def refuse(self, tag: object) -> None:
        self.send({"error": {"class": "GenericError", "desc": "no"}, "id": tag})


class SlowQemu(FitQemu):
    """Refuses a device when another waits for its turn, proxyd's loop is stopped, and proxyd knows that."""

    is_full: Callable[[], bool]

    def on_device(self, tag: object) -> None:
        self._refuse(tag, 0)

    def _refuse(self, tag: object, passes: int) -> None:
        if passes == PASSES:
            self.refuse(tag)
            return
        if passes or self.is_full():
            self.loop.stop()
            passes += 1
        self.loop.call_later(0, lambda: self._refuse(tag, passes))


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def test_its_end_waits_for_qemu_no_longer_than_it_may(
    tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitor, "_COMMAND_SECONDS", 3600.0)
    monkeypatch.setattr(qmp, "_LEAVE_SECONDS", 0.0)
    path = str(tmp_path / "qmp")
    peer = SilentQemu(loop, path)
    plugger = QemuPlugger("iohub-proxyd", VmConfig("test", str(tmp_path), f"qmp:{path}", ()), loop)
    try:
        with caplog.at_level(logging.WARNING):
            assert plugger.run() == 0
    finally:
        plugger.close()
        peer.close()
    assert caplog.messages == ["not done with QEMU within 0 s: what is plugged stays so"]


def test_its_end_lets_no_other_slot_begin(
    tmp_path: Path, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    devfns = {"dev0": parse_devfn("05.0"), "dev1": parse_devfn("06.0")}
    remote = RemoteThread(tmp_path)
    for name, devfn in devfns.items():
        remote.add(LineDevice, name, devfn)
    remote.start()
    path = str(tmp_path / "qmp")
    peer = SlowQemu(loop, path)
    devices = tuple(DeviceConfig(name, None, devfn, None, None, None, {}) for name, devfn in devfns.items())
    plugger = QemuPlugger("iohub-proxyd", VmConfig("test", str(tmp_path), f"qmp:{path}", devices), loop)
    functions = plugger._slots.functions
    peer.is_full = lambda: all(function.handover is not None for function in functions)
    try:
        with caplog.at_level(logging.WARNING):
            assert plugger.run() == 0
    finally:
        plugger.close()
        peer.close()
        remote.close()
    assert peer.commands.count("device_add") == 1
    (refused,) = caplog.messages
    assert refused == "QEMU refuses to plug it: no"


def test_devices_that_hang_hold_up_no_other(
    tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_ROUND_TRIP_SECONDS", 3600.0)
    monkeypatch.setattr(slot, "_EXAMINATION_SECONDS", 3600.0)
    path = str(tmp_path / "qmp")
    peer = FitQemu(loop, path)
    devices = tuple(
        DeviceConfig(f"dev{number}", None, number << 3, None, None, None, {}) for number in range(32)
    )
    *hanging, last = devices
    remote = RemoteThread(tmp_path)
    remote.add(LineDevice, last.id, last.devfn)
    remote.start()
    plugger = QemuPlugger("iohub-proxyd", VmConfig("test", str(tmp_path), f"qmp:{path}", devices), loop)
    guard = loop.call_later(HANGS, loop.stop)
    with ExitStack() as stack:
        stack.callback(remote.close)
        stack.callback(peer.close)
        stack.callback(plugger.close)
        for device in hanging:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(remote.path(device.id))
            listener.listen()
        assert plugger.run() == 0
    guard.cancel()
    assert peer.commands.count("device_add") == 1
