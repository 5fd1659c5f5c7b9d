# SPDX-License-Identifier: GPL-2.0-or-later
"""The fd store's client: what it sends, that it never waits, and what a process finds at its start."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.fdstore import FdStore
from common.journal import RateLimited
from common.loop import Loop
from tests.support.fds import identity, no_fd_is_left
from tests.support.storemanager import StoreManager

LOG = RateLimited(logging.getLogger("test.fdstore"))
PATIENCE = 10.0
"""seconds after which nothing waits for the manager any more"""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[StoreManager]:
    with no_fd_is_left(), closing(StoreManager(tmp_path)) as manager:
        yield manager


@pytest.fixture
def store(manager: StoreManager, loop: Loop) -> Iterator[FdStore]:
    with closing(FdStore(loop, LOG, manager.address, {})) as store:
        yield store


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


def test_put_and_remove(manager: StoreManager, store: FdStore, memfd: int) -> None:
    store.put("28.state", memfd)
    manager.serve()
    assert {name: [identity(fd) for fd in fds] for name, fds in manager.files.items()} == {
        "28.state": [identity(memfd)]
    }
    store.remove("28.state")
    manager.serve()
    assert not manager.files


def test_barrier_comes_after_what_was_sent_before(
    manager: StoreManager, store: FdStore, loop: Loop, memfd: int
) -> None:
    done: list[set[str]] = []
    store.put("28.state", memfd)
    store.barrier(lambda: done.append(set(manager.files)))
    loop.step()
    assert not done
    manager.serve()
    loop.step(1.0)
    assert done == [{"28.state"}]
    loop.step()
    assert len(done) == 1


def test_a_full_queue_delays_and_loses_nothing(
    manager: StoreManager, store: FdStore, loop: Loop, memfd: int
) -> None:
    """What has no room is sent later, in its order, also if the caller has closed its file meanwhile."""
    count = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    for index in range(count):
        fd = os.memfd_create("test")
        store.put(f"{index:02x}.state", fd)
        os.close(fd)
        store.remove(f"{index:02x}.state")
    store.put("last", memfd)
    done: list[bool] = []
    store.barrier(lambda: done.append(True))
    assert manager.serve() < 2 * count
    while not done:
        loop.step(1.0)
        manager.serve()
    assert list(manager.files) == ["last"]


def test_what_waits_is_not_overtaken(manager: StoreManager, store: FdStore, loop: Loop, memfd: int) -> None:
    for _ in range(int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 1):
        store.remove("28.state")
    store.put("28.state", memfd)
    manager.serve()
    store.remove("28.state")  # there is room now, but not its turn
    done: list[bool] = []
    store.barrier(lambda: done.append(True))
    while not done:
        loop.step(1.0)
        manager.serve()
    assert not manager.files


def test_a_manager_that_is_gone_holds_up_nobody(
    manager: StoreManager, store: FdStore, loop: Loop, memfd: int
) -> None:
    manager.close()
    store.put("28.state", memfd)
    done: list[bool] = []
    store.barrier(lambda: done.append(True))
    loop.step(1.0)
    assert done == [True]


class SilentManager:
    """A manager that reads nothing, and time that passes when a test lets it."""

    def __init__(self, manager: StoreManager) -> None:
        self.manager = manager
        self.now = 0.0
        self.loop = Loop(lambda: self.now)
        self.store = FdStore(self.loop, RateLimited(logging.getLogger("test.fdstore")), manager.address, {})
        self.done: list[str] = []

    def ask(self, name: str) -> None:
        self.store.barrier(lambda: self.done.append(name))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.loop.step()

    def close(self) -> None:
        self.store.close()
        self.loop.close()


@pytest.fixture
def silent(manager: StoreManager) -> Iterator[SilentManager]:
    with closing(SilentManager(manager)) as silent:
        yield silent


def test_a_silent_manager_is_waited_for_once(silent: SilentManager, caplog: pytest.LogCaptureFixture) -> None:
    silent.ask("first")
    silent.ask("second")
    silent.wait(1.0)
    assert silent.done == []
    silent.wait(PATIENCE)
    assert silent.done == ["first", "second"]
    silent.ask("third")
    silent.wait(0.0)
    assert silent.done == ["first", "second", "third"]
    assert len(caplog.messages) == 1
    assert "has not answered for" in caplog.text


def test_a_manager_that_answers_again_is_waited_for_again(
    silent: SilentManager, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    silent.ask("first")
    silent.wait(PATIENCE)
    silent.manager.serve()
    silent.wait(0.0)
    assert silent.done == ["first"]
    assert caplog.messages[1:] == ["the service manager answers again"]
    silent.ask("second")
    silent.wait(1.0)
    assert silent.done == ["first"]
    silent.manager.serve()
    silent.wait(0.0)
    assert silent.done == ["first", "second"]


def test_an_answer_in_time_leaves_no_timer(silent: SilentManager, caplog: pytest.LogCaptureFixture) -> None:
    silent.ask("first")
    silent.manager.serve()
    silent.wait(0.0)
    silent.wait(PATIENCE)
    assert silent.done == ["first"]
    assert not caplog.messages


def test_what_a_silent_manager_is_given_is_bounded(silent: SilentManager, memfd: int) -> None:
    """Otherwise a client that sends eventfds again and again could make the daemon run out of fds."""
    silent.ask("first")
    silent.wait(PATIENCE)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3000):
        silent.store.put("28.irqfd-1", memfd)
    assert len(os.listdir("/proc/self/fd")) - before < 2000


@pytest.mark.parametrize(
    "changes",
    [{"FDSTORE": ""}, {"FDSTORE": "0"}, {"NOTIFY_SOCKET": None}],
    ids=["not set", "zero", "no manager"],
)
def test_no_store(manager: StoreManager, loop: Loop, changes: dict[str, str | None]) -> None:
    environ = {"NOTIFY_SOCKET": manager.address, "FDSTORE": "16"} | changes
    assert (
        FdStore.open(loop, LOG, {name: value for name, value in environ.items() if value is not None}) is None
    )


def test_environment_of_another_process_is_ignored(manager: StoreManager, loop: Loop) -> None:
    environ = {
        "NOTIFY_SOCKET": manager.address,
        "FDSTORE": "16",
        "LISTEN_PID": "1",
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "28.state",
        "PATH": "/",
    }
    store = FdStore.open(loop, LOG, environ)
    assert store is not None
    assert store.take("28.state") == []
    assert environ == {"NOTIFY_SOCKET": manager.address, "PATH": "/"}, "children are not to find it"
    store.close()


def test_take_and_drop_of_what_was_inherited(manager: StoreManager, loop: Loop) -> None:
    first, second, third = (os.memfd_create(name) for name in "abc")
    store = FdStore(loop, LOG, manager.address, {"a": [first], "b": [second, third]})
    assert store.take("a") == [first]
    assert store.take("a") == []
    assert store.drop_inherited() == ["b"]
    assert store.take("b") == []
    for fd in (second, third):
        with pytest.raises(OSError):
            os.fstat(fd)
    os.close(first)
    store.close()


def test_of_several_files_of_a_name_one_is_taken_and_none_is_left(
    manager: StoreManager, loop: Loop, memfd: int
) -> None:
    inherited = [os.dup(memfd) for _ in range(3)]
    store = FdStore(loop, LOG, manager.address, {"a": list(inherited)})
    fd = store.take_one("a")
    assert fd == inherited[0]
    for other in inherited[1:]:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(other)
    os.close(fd)
    assert store.take_one("a") == -1
    store.close()


def test_abstract_address(loop: Loop, memfd: int) -> None:
    with no_fd_is_left(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0iohub-test-{os.getpid()}")
        store = FdStore(loop, LOG, f"@iohub-test-{os.getpid()}", {})
        store.remove("28.state")
        assert manager.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=28.state"
        store.close()
