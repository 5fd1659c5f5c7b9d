# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of proxyd beside a QEMU that doesn't answer."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import VmConfig
from common.loop import Loop
from proxyd.vm import monitor, qmp
from proxyd.vm.qmp import QemuPlugger

GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}
}
HANGS = 20.0
"""seconds after which what hasn't ended never will"""


class SilentQemu:
    """Greets, negotiates, and stops proxyd's loop instead of answering the first command."""

    def __init__(self, loop: Loop, path: str) -> None:
        self._loop = loop
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._link: socket.socket | None = None
        loop.add(self._listener.fileno(), self._on_client)

    def close(self) -> None:
        self._listener.close()
        if self._link is not None:
            self._link.close()

    def _on_client(self, _events: int) -> None:
        self._link, _ = self._listener.accept()
        self._link.sendall(json.dumps(GREETING).encode() + b"\r\n")
        self._loop.add(self._link.fileno(), self._on_command)

    def _on_command(self, _events: int) -> None:
        assert self._link is not None
        if json.loads(self._link.recv(4096))["execute"] == "qmp_capabilities":
            self._link.sendall(b'{"return": {}}\r\n')
            return
        self._loop.stop()
        self._loop.remove(self._link.fileno())
        # Lets proxyd end even if it can't do so by itself.
        self._loop.call_later(HANGS, self._link.close)


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
    plugger = QemuPlugger("iohub-proxyd", VmConfig("test", tmp_path, f"qmp:{path}", ()), loop)
    try:
        with caplog.at_level(logging.WARNING):
            assert plugger.run() == 0
    finally:
        plugger.close()
        peer.close()
    assert caplog.messages == ["not done with QEMU within 0 s: what is plugged stays so"]
