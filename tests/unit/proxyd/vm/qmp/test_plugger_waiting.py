# SPDX-License-Identifier: GPL-2.0-or-later
"""How proxyd waits for a QEMU, and what it says of one that it can't serve yet."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.backoff import Backoff
from common.config import VmConfig
from common.loop import Loop
from proxyd.vm.qmp import monitor as monitor_module
from proxyd.vm.qmp import plugger as plugger_module
from proxyd.vm.qmp.monitor import Monitor, MonitorAbsent
from proxyd.vm.qmp.plugger import QemuPlugger
from tests.support.modelqemu import ModelQemu
from tests.support.wait import until

HANGS = 20.0
PASSES = 200
"""of asyncio's loop, more than anything takes that needn't wait"""
LISTENER = """
import socket, sys
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print("listens", flush=True)
    sys.stdin.read()
"""


class Waiting:
    """A proxyd without devices; no uevent reaches it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "qmp"
        self.loop = Loop()
        self.plugger = QemuPlugger(
            "tests.waiting", VmConfig("test", str(directory), f"qmp:{self.path}", ()), self.loop
        )
        self.loop.remove(self.plugger._uevents.fileno())
        self.loop.add(self.plugger._uevents.fileno(), self._ignore)

    @property
    def reason(self) -> str:
        return self.plugger._state.reason or ""

    def run(self, meanwhile: Callable[[], Awaitable[None]]) -> None:
        asyncio.run(self._main(meanwhile))

    def _ignore(self, _events: int) -> None:
        self.plugger._uevents.read()

    async def _main(self, meanwhile: Callable[[], Awaitable[None]]) -> None:
        running = asyncio.create_task(self.plugger._main())
        try:
            await meanwhile()
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            await asyncio.wait({running}, timeout=HANGS)
        running.result()


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Waiting]:
    waiting = Waiting(tmp_path)
    yield waiting
    waiting.plugger.close()
    waiting.loop.close()


async def serve(waiting: Waiting, qemu: ModelQemu) -> None:
    """Lets a QEMU appear; returns when it is attached."""
    await qemu.start(waiting.path)
    await until(lambda: waiting.plugger._state.attached, "it is attached")
    await qemu.close()


async def passes() -> None:
    """Lets happen what needn't wait."""
    for _ in range(PASSES):
        await asyncio.sleep(0)


def never(_backoff: Backoff, _most: float) -> float:
    return 2 * HANGS


def test_a_socket_that_appears_is_enough(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a network namespace of its own no uevent arrives."""
    monkeypatch.setattr(Backoff, "next", never)

    async def meanwhile() -> None:
        await until(lambda: "nobody listens at" in waiting.reason, "there is no QEMU yet")
        await serve(waiting, ModelQemu())

    waiting.run(meanwhile)


def test_a_socket_that_nothing_tells_of_is_found(waiting: Waiting) -> None:
    waiting.plugger._watch.close()

    async def meanwhile() -> None:
        await until(lambda: "nobody listens at" in waiting.reason, "there is no QEMU yet")
        await serve(waiting, ModelQemu())

    waiting.run(meanwhile)


def test_news_that_comes_during_an_attempt_is_not_lost(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backoff, "next", never)
    attempts = []

    async def connect(*_arguments: object) -> Monitor:
        attempts.append(1)
        if len(attempts) == 1:
            waiting.plugger._appeared.set()
        raise MonitorAbsent("nowhere")

    monkeypatch.setattr(Monitor, "connect", connect)

    async def meanwhile() -> None:
        await until(lambda: len(attempts) == 2, "it is tried again")

    waiting.run(meanwhile)


@pytest.mark.parametrize("loss", ["while it is looked at", "later", "by nonsense"])
def test_a_lost_monitor_is_not_tried_again_at_once(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setattr(plugger_module, "_RETRY_SECONDS", 2 * HANGS)
    qemu = ModelQemu()
    if loss == "while it is looked at":
        qemu.unanswered = "query-kvm"

    async def meanwhile() -> None:
        await qemu.start(waiting.path)
        if qemu.unanswered:
            await until(lambda: qemu.count("query-kvm"), "it is looked at")
        else:
            await until(lambda: waiting.plugger._state.attached, "it is attached")
        if loss == "by nonsense":
            qemu.send({"error": {}})
        else:
            qemu.hang_up()
        await until(lambda: waiting.reason.startswith(("lost", "detached")), "its loss is told")
        await passes()
        assert qemu.clients == 1
        await qemu.close()

    waiting.run(meanwhile)


def test_a_monitor_that_hangs_up_at_once_is_not_tried_again_at_once(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugger_module, "_RETRY_SECONDS", 2 * HANGS)
    clients: list[int] = []

    def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clients.append(1)
        writer.close()

    async def meanwhile() -> None:
        server = await asyncio.start_unix_server(hang_up, waiting.path)
        await until(lambda: "trying again" in waiting.reason, "it is told")
        await passes()
        assert len(clients) == 1
        server.close()

    waiting.run(meanwhile)


def test_a_stopped_qemu_is_told(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "_GREETING_SECONDS", 0.01)
    with subprocess.Popen(
        [sys.executable, "-c", LISTENER, str(waiting.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listens\n"

        async def meanwhile() -> None:
            await until(lambda: "doesn't answer: it is busy" in waiting.reason, "it doesn't greet")
            os.kill(process.pid, signal.SIGSTOP)
            await until(lambda: "it is stopped by a signal" in waiting.reason, "it is stopped")
            assert f"[{process.pid}] at {waiting.path} doesn't answer" in waiting.reason
            os.kill(process.pid, signal.SIGCONT)
            await until(lambda: "doesn't answer: it is busy" in waiting.reason, "it is continued")

        try:
            waiting.run(meanwhile)
        finally:
            process.kill()


def test_a_socket_that_takes_no_connection_is_told(waiting: Waiting) -> None:
    with socket.socket(socket.AF_UNIX) as listener, closing(socket.socket(socket.AF_UNIX)) as other:
        listener.bind(str(waiting.path))
        listener.listen(0)
        other.connect(str(waiting.path))

        async def meanwhile() -> None:
            told = f"{waiting.path} takes no connection: others wait for it already: trying again"
            await until(lambda: waiting.reason == told, "it is told")

        waiting.run(meanwhile)
