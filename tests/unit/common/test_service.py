# SPDX-License-Identifier: GPL-2.0-or-later
"""The service manager's socket: what it doesn't take at once reaches it later, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from common.service import notify
from tests.support.fds import count_fds, no_fd_is_left, no_more_fds
from tests.support.manager import Manager
from tests.support.wait import wait_until


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Manager]:
    path = str(tmp_path / "notify")
    abstract = request.param == "abstract"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{path}" if abstract else path)
    manager = Manager(f"\0{path}" if abstract else path)
    yield manager
    manager.close()


def test_a_state_is_one_message(manager: Manager) -> None:
    with no_fd_is_left():
        notify("READY=1\nSTATUS=Waiting for QEMU")
        assert manager.receive() == "READY=1\nSTATUS=Waiting for QEMU"
        notify("STOPPING=1")
        assert manager.receive() == "STOPPING=1"
    assert manager.is_quiet()


def test_a_full_queue_delays_states_and_loses_none(manager: Manager) -> None:
    with no_fd_is_left():
        manager.fill()
        notify("READY=1")
        for number in range(100):
            notify(f"STATUS=Attached {number}\nX_NUMBER={number}")
        notify("STOPPING=1")
        received = manager.receive()
        while "STOPPING=1" not in received.split("\n"):
            received += "\n" + manager.receive()
    assignments = received.split("\n")
    assert assignments.count("READY=1") == 1
    assert assignments[-3:] == ["STATUS=Attached 99", "X_NUMBER=99", "STOPPING=1"]
    assert len(assignments) <= 9, "of a variable only the latest value waits"
    notify("STATUS=Ended")
    assert manager.receive() == "STATUS=Ended"
    assert manager.is_quiet()


def test_a_moment_without_free_fds_loses_no_state(manager: Manager) -> None:
    with no_more_fds():
        notify("READY=1")
    assert manager.receive() == "READY=1"
    assert manager.is_quiet()


def test_a_manager_that_ends_meanwhile_is_forgotten(manager: Manager) -> None:
    before = count_fds()
    manager.fill()
    notify("READY=1")
    manager.close()
    wait_until(lambda: count_fds() == before - 1, "the thread has given up")
    with no_fd_is_left():
        notify("STATUS=Alone")


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1", "/nonexistent/notify", "/" + "x" * 200])
def test_an_address_where_nobody_listens_is_no_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with no_fd_is_left():
        notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")
