# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted with two devices, and a client of one, for the tests of its sessions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fds import count_fds
from tests.support.remotebench import LineDevice, Pair, Peer, RemoteBench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[RemoteBench]:
    before = count_fds()
    bench = RemoteBench(tmp_path)
    bench.add(LineDevice, "dev0", 0x28)
    bench.add(LineDevice, "dev1", 0x30)
    yield bench
    bench.close()
    assert count_fds() == before


@pytest.fixture
def peer(bench: RemoteBench) -> Iterator[Peer]:
    with bench.connect("dev0") as peer:
        peer.enable()
        yield peer


@pytest.fixture
def pair(peer: Peer) -> Pair:
    return peer.set_irqfd()
