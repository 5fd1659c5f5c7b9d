# SPDX-License-Identifier: GPL-2.0-or-later
"""A loop; and remoted with two devices and a client of one, for the tests of its sessions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common import disposal
from common.loop import Loop
from tests.support.fds import no_fd_is_left
from tests.support.remotebench import LineDevice, Pair, Peer, RemoteBench
from tests.support.steploop import CountingLoop


@pytest.fixture
def loop() -> Iterator[Loop]:
    with closing(Loop()) as loop:
        yield loop


@pytest.fixture
def older_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One before 6.16, whose sockets can't refuse fds."""
    monkeypatch.setattr(disposal, "_SO_PASSRIGHTS", 0x7FFF)


@pytest.fixture
def counting_loop() -> Iterator[CountingLoop]:
    """One that counts the calls of handlers; what is opened on it must be closed with it."""
    with no_fd_is_left(), closing(CountingLoop()) as loop:
        yield loop


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[RemoteBench]:
    with no_fd_is_left(), closing(RemoteBench(tmp_path)) as bench:
        bench.add(LineDevice, "dev0", 0x28)
        bench.add(LineDevice, "dev1", 0x30)
        yield bench


@pytest.fixture
def peer(bench: RemoteBench) -> Iterator[Peer]:
    with bench.connect("dev0") as peer:
        peer.enable()
        yield peer


@pytest.fixture
def pair(peer: Peer) -> Pair:
    return peer.set_irqfd()
