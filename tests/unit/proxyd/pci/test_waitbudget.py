# SPDX-License-Identifier: GPL-2.0-or-later
"""For how long the guest's CPU waits for a function that is slow, in the test's time."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.errors import PeerGone
from common.loop import Loop
from common.pci import parse_devfn
from proxyd.pci.pcidev import PciProxy
from proxyd.pci.waitbudget import WaitBudget
from proxyd.vm.soft.softirqchip import SoftIrqchip
from tests.support.fds import no_fd_is_left
from tests.support.remote import RemoteThread
from tests.support.remotebench import Clock, LineDevice

DEVFN = parse_devfn("05.0")
ALL_ONES = 0xFFFFFFFF


class Slow(LineDevice):
    """Each access to its config space takes a while."""

    clock: Clock
    seconds: float
    meanwhile: Callable[[], None] = staticmethod(lambda: None)
    """called while the guest waits"""

    def config_read(self, addr: int, size: int) -> int:
        self.clock.now += self.seconds
        self.meanwhile()
        return super().config_read(addr, size)


class Bench:
    """A function that answers at once until the test says otherwise."""

    def __init__(self, directory: Path) -> None:
        self.clock = Slow.clock = Clock()
        Slow.seconds = 0.0
        self.remote = RemoteThread(directory)
        self.function = self.remote.add(Slow, "line", DEVFN)
        self.remote.start()
        self.loop = Loop()
        self.proxy = PciProxy(
            "line",
            DEVFN,
            self.remote.path("line"),
            SoftIrqchip(self.loop),
            logging.getLogger("test"),
            lambda proxy: proxy.reap(),
            deadline=20.0,
        )
        self.proxy._budget = WaitBudget(self.clock)
        self.link()

    def link(self) -> None:
        self.proxy.connect()
        self.proxy.attach()

    def waited(self, accesses: int) -> float:
        """Seconds that so many accesses of the guest take, if the link lasts."""
        began = self.clock.now
        for _ in range(accesses):
            self.proxy.config_read(0, 4)
        return self.clock.now - began

    def close(self) -> None:
        self.proxy.close()
        self.remote.close()
        self.loop.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with no_fd_is_left(), closing(Bench(tmp_path)) as bench:
        yield bench


def test_answers_within_the_deadline_use_the_budget_up(bench: Bench) -> None:
    Slow.seconds = 1.9
    assert bench.waited(100) < 6.5
    assert bench.proxy.remote is None
    reason = "link lost: too slow: the answer to PCI_CFGREAD of 4 bytes at 0x0 took 1.9 s"
    assert bench.proxy.reason.startswith(reason)
    assert bench.proxy.config_read(0, 4) == ALL_ONES


def test_a_link_that_was_too_slow_is_made_again_when_half_of_the_budget_is_there(bench: Bench) -> None:
    Slow.seconds = 1.9
    bench.waited(100)
    Slow.seconds = 0.0
    with pytest.raises(PeerGone, match=r"^too slow before: the next link is made in 3\d s$"):
        bench.proxy.connect()
    bench.proxy.reap()
    bench.clock.now += 40.0
    bench.link()
    assert bench.proxy.config_read(0, 4) != ALL_ONES


def test_in_the_long_run_a_guest_waits_a_tenth_of_its_time(bench: Bench) -> None:
    waited = 0.0
    for _ in range(500):
        try:
            Slow.seconds = 0.0
            bench.link()
        except PeerGone:
            bench.proxy.reap()
        Slow.seconds = 1.9
        waited += bench.waited(1 if bench.proxy.remote else 0)
        bench.clock.now += 1.0
        if bench.proxy.remote is not None:
            bench.proxy._client.shutdown()  # type: ignore[union-attr]
            bench.proxy.check_link()
    assert 0.05 < waited / bench.clock.now < 0.12


def test_prompt_answers_cost_nothing_however_many(bench: Bench) -> None:
    Slow.seconds = 0.1
    assert bench.waited(200) == pytest.approx(20.0)
    assert bench.proxy.remote is not None


def test_time_gives_the_budget_back(bench: Bench) -> None:
    Slow.seconds = 1.1
    for _ in range(50):
        assert bench.waited(1) == pytest.approx(1.1)
        bench.clock.now += 10.0
    assert bench.proxy.remote is not None


def test_a_reset_is_on_the_budget_as_well(bench: Bench) -> None:
    Slow.seconds = 1.9
    began = bench.clock.now
    bench.proxy.quiesce()
    bench.proxy.reset()
    assert bench.clock.now - began < 6.5
    assert bench.proxy.remote is None


def test_who_is_too_slow_while_connecting_is_not_linked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.proxy._client.shutdown()  # type: ignore[union-attr]
    bench.proxy.check_link()
    monkeypatch.setattr("proxyd.pci.pcidev.WaitBudget", lambda: WaitBudget(bench.clock))
    Slow.seconds = 1.9
    began = bench.clock.now
    with pytest.raises(PeerGone, match=r"^too slow: "):
        bench.proxy.connect()
    bench.proxy.reap()
    assert bench.clock.now - began < 6.5
    Slow.seconds = 0.0
    bench.link()


def test_what_is_waited_for_at_present_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr(Slow, "meanwhile", lambda _self: texts.extend(bench.proxy._budget.amiss()))
    bench.proxy.config_read(0x3C, 2)
    assert texts == []
    Slow.seconds = 0.8
    bench.proxy.config_read(0x3C, 2)
    assert texts == ["waiting for 0.8 s now for the answer to PCI_CFGREAD of 2 bytes at 0x3c"]


def test_the_times_are_those_of_the_last_two_minutes(bench: Bench) -> None:
    def texts() -> list[str]:
        return list(bench.proxy._budget.amiss())

    assert bench.proxy.answer_times is None
    Slow.seconds = 0.7
    bench.waited(1)
    Slow.seconds = 0.1
    bench.waited(2)
    assert bench.proxy.answer_times == (pytest.approx(0.3), pytest.approx(0.7))
    (text,) = texts()
    assert text == (
        "the guest's CPU has waited up to 0.7 s for an answer in the last two minutes, 300 ms on average; "
        "the longest was that to PCI_CFGREAD of 4 bytes at 0x0"
    )
    bench.clock.now += 60.0
    bench.waited(1)
    assert bench.proxy.answer_times == (pytest.approx(0.25), pytest.approx(0.7))
    bench.clock.now += 60.0
    bench.waited(1)
    assert bench.proxy.answer_times == (pytest.approx(0.1), pytest.approx(0.1))
    assert texts() == []
    bench.clock.now += 120.0
    assert bench.proxy.answer_times is None


def test_an_answer_that_never_comes_counts(bench: Bench) -> None:
    client = bench.proxy._client
    assert client is not None
    client.deadline = 0.0
    budget = bench.proxy._budget = WaitBudget()
    assert bench.proxy.config_read(0, 4) == ALL_ONES
    times = budget.times
    assert times is not None
    assert times[1] > 0.0


class Gated(LineDevice):
    """Accesses to its config space wait until the gate is open, and so does all of its process."""

    gate = threading.Event()

    def config_read(self, addr: int, size: int) -> int:
        self.gate.wait(20.0)
        return super().config_read(addr, size)


def test_of_a_process_that_hangs_one_function_is_waited_for(tmp_path: Path) -> None:
    """The others get a tenth of a second: else a guest with many would wait a deadline for each."""
    with no_fd_is_left():
        Gated.gate.set()
        remote, loop, hung = RemoteThread(tmp_path), Loop(), set[int]()
        proxies = []
        for slot in (5, 6, 7):
            remote.add(Gated, f"g{slot}", slot << 3)
            path, log = remote.path(f"g{slot}"), logging.getLogger("test")
            irqchip = SoftIrqchip(loop)
            proxies.append(
                PciProxy(f"g{slot}", slot << 3, path, irqchip, log, PciProxy.reap, deadline=0.5, hung=hung)
            )
        remote.start()
        for proxy in proxies:
            proxy.connect()
            proxy.attach()
        Gated.gate.clear()
        for proxy, seconds in zip(proxies, ("0.5", "0.1", "0.1"), strict=True):
            assert proxy.config_read(0, 4) == ALL_ONES
            assert re.fullmatch(rf"link lost: no answer to .* within {seconds} s", proxy.reason)
        Gated.gate.set()
        for proxy in proxies:
            proxy.connect()
            proxy.attach()
        assert not hung
        # One that is suspected and answers is trusted again, with its whole deadline.
        hung.add(os.getpid())
        assert proxies[0].config_read(0, 4) != ALL_ONES
        assert not hung
        assert proxies[0]._client is not None
        assert proxies[0]._client.deadline == 0.5
        for proxy in proxies:
            proxy.close()
        remote.close()
        loop.close()
