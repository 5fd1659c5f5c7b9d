# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket before its first call: what answers is loaded then, beside the loop."""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.controlsocket import ControlServer
from common.loop import Loop
from common.messages import Event
from common.proxyd_interface import Proxyd
from proxyd.control import ProxydService
from proxyd.vmstate import VmState
from tests.support.wait import wait_until

CALL = json.dumps({"method": f"{Proxyd.name}.Status"}).encode() + b"\0"


class Bench:
    """A control socket whose interface is made when the test lets it."""

    def __init__(self, directory: Path) -> None:
        self.loop = Loop()
        self.may_load = threading.Event()
        self.loads = 0
        self.error: Exception | None = None
        self._path = str(directory / "sock")
        self.server = ControlServer(self.loop, self._path, self._make_interface, logging.getLogger("control"))

    def _make_interface(self) -> ProxydService:
        self.loads += 1
        assert self.may_load.wait(10)
        if self.error is not None:
            raise self.error
        return ProxydService(VmState("vm1", "soft", "soft", None, []))

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self._path)
        sock.setblocking(False)
        return sock

    def step_until(self, condition: Callable[[], object]) -> None:
        """Steps the loop until the condition holds; another thread may bring it about without waking the loop."""

        def holds() -> bool:
            self.loop.step()
            return bool(condition())

        wait_until(holds, "what the test waits for")

    def finish_loading(self) -> None:
        self.may_load.set()
        for thread in threading.enumerate():
            if thread.name == "control":
                thread.join()

    def close(self) -> None:
        self.finish_loading()
        self.server.close()
        self.loop.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def received(sock: socket.socket) -> bytes | None:
    """What is here: None if nothing is, empty if the server has hung up."""
    try:
        return sock.recv(1 << 16)
    except BlockingIOError:
        return None


def test_a_connection_without_a_call_loads_nothing(bench: Bench) -> None:
    with bench.connect() as sock:
        sock.sendall(CALL[:-1])
        for _ in range(3):
            bench.loop.step()
        assert bench.loads == 0


def test_calls_wait_until_what_answers_is_loaded_and_nothing_else_does(bench: Bench) -> None:
    handled = []
    reader, writer = os.pipe()
    bench.loop.add(reader, lambda _events: handled.append(os.read(reader, 1)))
    with bench.connect() as first, bench.connect() as second:
        first.sendall(CALL)
        second.sendall(CALL)
        bench.step_until(lambda: bench.loads)
        os.write(writer, b"x")
        bench.step_until(lambda: handled)
        assert (received(first), received(second)) == (None, None)
        bench.may_load.set()
        replies: dict[socket.socket, bytes] = {}

        def are_answered() -> bool:
            for sock in (first, second):
                replies[sock] = replies.get(sock, b"") + (received(sock) or b"")
            return all(reply.endswith(b"\0") for reply in replies.values())

        bench.step_until(are_answered)
    assert bench.loads == 1
    bench.loop.remove(reader)
    os.close(reader)
    os.close(writer)


def test_a_caller_that_hangs_up_while_its_call_waits_does_not_keep_the_loop_busy(bench: Bench) -> None:
    with bench.connect() as sock:
        sock.sendall(CALL)
        bench.step_until(lambda: bench.loads)
    for _ in range(3):
        bench.loop.step()
    assert not select.select([bench.loop.fileno()], [], [], 0)[0]
    bench.finish_loading()
    bench.step_until(lambda: not bench.server._clients)


def test_loading_leaves_collector_and_interpreter_as_they_were(bench: Bench) -> None:
    before = sys.getswitchinterval(), gc.isenabled()
    assert before[1], "no test before has left it off"
    with bench.connect() as sock:
        sock.sendall(CALL)
        bench.step_until(lambda: bench.loads)
        assert sys.getswitchinterval() < before[0] / 10
        bench.may_load.set()
        bench.step_until(lambda: received(sock))
    assert (sys.getswitchinterval(), gc.isenabled()) == before


def test_what_is_loaded_is_exempt_from_collection_as_all_of_a_frozen_heap(bench: Bench) -> None:
    bench.may_load.set()
    before = gc.get_freeze_count()
    assert before > 0  # tests/conftest.py
    with bench.connect() as sock:
        sock.sendall(CALL)
        bench.step_until(lambda: received(sock))
    assert gc.get_freeze_count() > before


def test_what_cannot_be_loaded_costs_its_callers_the_connection_and_is_tried_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.may_load.set()
    bench.error = ImportError("no such module")
    with bench.connect() as silent:
        with bench.connect() as caller:
            caller.sendall(CALL)
            bench.step_until(lambda: received(caller) == b"")
        (record,) = caplog.records
        assert record.getMessage() == "control socket: no call can be answered: no such module"
        assert vars(record)["event"] is Event.CONTROL_NOT_LOADED
        bench.error = None
        silent.sendall(CALL)
        bench.step_until(lambda: received(silent))
    assert bench.loads == 2


def test_without_a_thread_to_load_it_in_the_caller_loses_the_connection_and_may_come_again(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    bench.may_load.set()
    with monkeypatch.context() as patch, bench.connect() as caller:
        patch.setattr(threading.Thread, "start", refuse)
        caller.sendall(CALL)
        bench.step_until(lambda: received(caller) == b"")
    assert caplog.messages == ["control socket: no call can be answered: can't start new thread"]
    with bench.connect() as caller:
        caller.sendall(CALL)
        bench.step_until(lambda: received(caller))


def test_a_server_may_be_closed_while_it_loads(bench: Bench) -> None:
    with bench.connect() as sock:
        sock.sendall(CALL)
        bench.step_until(lambda: bench.loads)
        bench.server.close()
        bench.finish_loading()
        bench.loop.step()
        assert received(sock) == b""
