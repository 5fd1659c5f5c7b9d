# SPDX-License-Identifier: GPL-2.0-or-later
"""Links that are kept: when they are made, and how often a remote that doesn't keep them is tried."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.errors import PeerGone
from common.link import Client
from common.loop import Loop
from common.mpqemu import Command
from common.pci import parse_devfn
from common.peer import peer_credentials
from proxyd.pci.links import LinkKeeper
from proxyd.pci.pcidev import PciProxy
from proxyd.vm.soft.softirqchip import SoftIrqchip
from tests.support.fds import no_fd_is_left
from tests.support.remote import HangingUp, RemoteThread
from tests.support.remotebench import Clock, LineDevice
from tests.support.steploop import run_until

DEVFNS = {"a": parse_devfn("05.0"), "b": parse_devfn("06.0")}
NEVER = 3600.0


class Bench:
    """A keeper of two links; the loop's time is the test's, or real."""

    def __init__(self, directory: Path, *, real_time: bool = False) -> None:
        self.directory = directory
        self.clock = Clock()
        self.loop = Loop() if real_time else Loop(self.clock)
        self.keeper = LinkKeeper(self.loop)
        irqchip = SoftIrqchip(self.loop)
        self.proxies = {
            name: PciProxy(
                name,
                devfn,
                str(directory / f"{name}.sock"),
                irqchip,
                logging.getLogger(name),
                self.keeper.lost,
                deadline=NEVER,
            )
            for name, devfn in DEVFNS.items()
        }
        self.remote: RemoteThread | None = None

    def serve(self, *names: str) -> RemoteThread:
        """A remote with these functions, to be started."""
        self.remote = RemoteThread(self.directory)
        for name in names:
            self.remote.add(LineDevice, name, DEVFNS[name])
        return self.remote

    def start(self, *names: str) -> None:
        self.keeper.start([self.proxies[name] for name in names])

    def close(self) -> None:
        self.keeper.close()
        for proxy in self.proxies.values():
            proxy.close()
        if self.remote is not None:
            self.remote.close()
        self.loop.close()

    def is_linked(self, name: str) -> bool:
        return self.proxies[name].remote is not None


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with no_fd_is_left(), closing(Bench(tmp_path)) as bench:
        yield bench


def test_who_is_there_is_linked_when_start_returns(bench: Bench) -> None:
    bench.serve("a", "b").start()
    bench.start("a", "b")
    assert bench.is_linked("a")
    assert bench.is_linked("b")


def test_who_comes_later_is_linked_then(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.serve("a").start()
    bench.start("a", "b")
    assert bench.is_linked("a")
    for _ in range(3):
        assert not bench.is_linked("b")
        retry_after(bench)
    assert len([line for line in caplog.messages if "no link" in line]) == 1, "it is told once"
    assert bench.remote is not None
    late = RemoteThread(bench.directory)
    late.add(LineDevice, "b", DEVFNS["b"])
    late.start()
    try:
        due = bench.loop.until_next_timer()
        assert due is not None
        bench.clock.now += due
        run_until(bench.loop, lambda: bench.is_linked("b"))
    finally:
        late.close()


def retry_after(bench: Bench, *, fails: bool = True) -> float:
    """Lets the pending attempt be made; how long it was waited for."""
    due = bench.loop.until_next_timer()
    assert due is not None
    bench.clock.now += due
    bench.loop.step()
    run_until(
        bench.loop, lambda: bench.loop.until_next_timer() is not None if fails else bench.is_linked("a")
    )
    return round(due, 3)


def start_without_a_remote(bench: Bench) -> None:
    """Returns when attempts are a second apart: as rare as they become."""
    bench.start("a")
    while retry_after(bench) < 1.0:
        pass


def test_attempts_become_rarer_until_there_is_one_a_second(bench: Bench) -> None:
    bench.start("a")
    assert [retry_after(bench) for _ in range(9)] == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0, 1.0]


def no_links_told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if line.startswith("no link: ")]


def test_each_outage_is_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for outages in range(1, 4):
        if outages == 1:
            bench.start("a")
        else:
            assert bench.remote is not None
            bench.remote.close()
            bench.remote = None
            bench.clock.now += 5.0  # the link has lasted
            run_until(bench.loop, lambda: not bench.is_linked("a"))
            run_until(bench.loop, lambda: bench.loop.until_next_timer() is not None)
        for _ in range(3):
            assert len(no_links_told(caplog)) == outages
            retry_after(bench)
        bench.serve("a").start()
        bench.clock.now += 1.0
        run_until(bench.loop, lambda: bench.is_linked("a"))


def test_no_thread_to_connect_in_is_one_line_and_a_retry(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.serve("a").start()

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        bench.start("a")
        assert retry_after(bench) == 0.02
        assert not bench.is_linked("a")
    assert no_links_told(caplog) == ["no link: can't start new thread"]
    retry_after(bench, fails=False)
    assert bench.is_linked("a")


def test_a_socket_that_appears_is_connected_to_at_once(bench: Bench) -> None:
    start_without_a_remote(bench)
    bench.clock.now += 0.5
    bench.serve("a").start()
    run_until(bench.loop, lambda: bench.is_linked("a"))


def test_a_socket_that_appears_while_one_is_tried_is_tried_as_well(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_without_a_remote(bench)
    proxy = bench.proxies["a"]
    connect = proxy.connect

    def connect_in_vain() -> None:
        monkeypatch.setattr(proxy, "connect", connect)
        bench.serve("a").start()
        raise PeerGone("nobody was there yet")

    monkeypatch.setattr(proxy, "connect", connect_in_vain)
    bench.clock.now += 1.0
    run_until(bench.loop, lambda: proxy.reason == "no link: nobody was there yet")
    bench.loop.step()
    bench.clock.now += 0.02
    run_until(bench.loop, lambda: bench.is_linked("a"))


def test_a_socket_that_appears_again_and_again_is_not_tried_as_often(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_without_a_remote(bench)
    proxy = bench.proxies["a"]
    connect = proxy.connect
    attempts: list[float] = []

    def counted() -> None:
        attempts.append(bench.clock.now)
        connect()

    monkeypatch.setattr(proxy, "connect", counted)
    path = Path(proxy.path)
    for _ in range(100):
        bench.clock.now += 0.001
        path.touch()
        path.unlink()
        bench.loop.step()
        run_until(bench.loop, lambda: bench.loop.until_next_timer() is not None)
    assert 2 <= len(attempts) <= 5, "one in 20 ms"


def test_a_remote_that_crashes_and_comes_again_is_not_tried_more_often_for_it(bench: Bench) -> None:
    pirq = hanging_up(bench)
    bench.start("a")
    run_until(bench.loop, lambda: not bench.is_linked("a"))
    for _ in range(6):
        run_until(bench.loop, lambda: bench.loop.until_next_timer() is not None)
        links, due = pirq.links, bench.loop.until_next_timer()
        path = bench.proxies["a"].path
        os.rename(path, f"{path}.away")
        os.rename(f"{path}.away", path)
        for _ in range(3):
            bench.loop.step()
        assert (pirq.links, bench.loop.until_next_timer()) == (links, due)
        retry_after(bench)


def test_a_remote_that_hangs_holds_up_nobody_else(tmp_path: Path) -> None:
    """Its listener takes connections, as a stopped process's does; the round trip has no end."""
    bench = Bench(tmp_path, real_time=True)
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(tmp_path / "b.sock"))
        hung.listen()
        bench.serve("a").start()
        bench.start("b", "a")
        assert bench.is_linked("a")
        assert not bench.is_linked("b")
        bench.close()  # and ends that round trip


def hanging_up(bench: Bench) -> HangingUp:
    remote = bench.serve("a")
    pirq = HangingUp(bench.loop, {})
    remote.servers["a"].interrupts = pirq
    remote.start()
    return pirq


def test_a_remote_that_hangs_up_at_once_is_tried_ever_more_rarely(bench: Bench) -> None:
    pirq = hanging_up(bench)
    bench.start("a")
    run_until(bench.loop, lambda: not bench.is_linked("a"))
    waited = []
    for links in range(1, 11):
        run_until(bench.loop, lambda: bench.loop.until_next_timer() is not None)
        assert pirq.links == links
        waited.append(retry_after(bench))
    assert waited == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.0, 5.0]


def test_who_is_linked_is_in_the_log_and_so_is_who_does_not_serve(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.serve("a").start()
    caplog.set_level(logging.INFO)
    bench.start("a", "b")
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(bench.proxies["a"].path)
        us = str(peer_credentials(other))
    hang_up(bench)
    lines = {
        record.getMessage().partition(" ")[0]: record.__dict__.get("peer")
        for record in caplog.records
        if record.name == "a"
    }
    assert lines == {"linked": us, "link": us}


def test_a_device_that_serves_another_client_says_so(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    remote = bench.serve("a")
    remote.start()
    path = remote.path("a")
    with closing(Client.connect(path, NEVER)) as first:
        first.request(Command.DEVICE_RESET)
        bench.start("a")
    (line,) = (record.getMessage() for record in caplog.records if record.name == "a")
    assert re.fullmatch(
        rf"no link: {path}: \S+\[{os.getpid()}\] closed it at once: another client or transport\?", line
    )


def hang_up(bench: Bench) -> None:
    """The remote lives on, and proxyd can say what came of the link."""
    client = bench.proxies["a"]._client
    assert client is not None
    client.shutdown()
    run_until(bench.loop, lambda: not bench.is_linked("a"))
    assert bench.proxies["a"].reason.startswith("link lost: ")
    bench.loop.step()


def test_a_link_that_has_lasted_is_made_again_at_once(bench: Bench) -> None:
    pirq = hanging_up(bench)
    pirq.at_once = False
    bench.start("a")
    for _ in range(3):
        hang_up(bench)
        assert bench.loop.until_next_timer() is not None
        retry_after(bench, fails=False)
    for _ in range(3):
        bench.clock.now += 1.0
        hang_up(bench)
        assert bench.loop.until_next_timer() is None
        run_until(bench.loop, lambda: bench.is_linked("a"))
    hang_up(bench)
    assert retry_after(bench, fails=False) == 0.02, "it begins anew"


def test_without_an_epoll_watch_a_link_is_used_and_its_end_noticed_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bench.serve("a").start()
    with monkeypatch.context() as patch:
        patch.setattr(bench.loop, "add", full)
        bench.start("a")
    assert bench.is_linked("a")
    assert "the link's end can't be noticed for now: No space left on device" in caplog.messages
    bench.clock.now += 1.0
    bench.loop.step()
    hang_up(bench)
