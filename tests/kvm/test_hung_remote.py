# SPDX-License-Identifier: GPL-2.0-or-later
"""Both daemons as processes, with a remoted that hangs or comes late: what proxyd does meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemonpair import Daemons
from tests.support.wait import wait_until

END_SECONDS = 20
"""less than the round trips of MANY functions take one after the other, each until its deadline"""
MANY = 16


@pytest.fixture(params=["embedded", "soft"])
def vm(request: pytest.FixtureRequest) -> str:
    if request.param == "embedded":
        request.getfixturevalue("requires_kvm")
    return str(request.param)


@pytest.fixture
def few(vm: str, tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path, vm, 2)
    yield daemons
    daemons.close()


@pytest.fixture
def many(vm: str, tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path, vm, MANY)
    yield daemons
    daemons.close()


def test_proxyd_ends_in_time_while_the_guest_waits_for_a_hung_remote(many: Daemons) -> None:
    remoted, proxyd = many.start_remoted(), many.start_proxyd()
    assert many.connected() == MANY
    many.connect_console()
    os.kill(remoted.process.pid, signal.SIGSTOP)
    many.send("setup")
    wait_until(lambda: "link lost: no answer" in proxyd.log.read_text(), "the guest has waited for the first")
    proxyd.process.terminate()
    assert proxyd.process.wait(END_SECONDS) == 0


def test_the_control_socket_answers_while_the_guest_waits_for_hung_remotes(many: Daemons) -> None:
    """It waits for one deadline, and for a tenth of a second with each of the other functions."""
    remoted, proxyd = many.start_remoted(), many.start_proxyd()
    many.connect_console()
    os.kill(remoted.process.pid, signal.SIGSTOP)
    many.send("setup")
    wait_until(lambda: "link lost: no answer" in proxyd.log.read_text(), "the guest has waited for the first")
    assert many.connected() < MANY
    wait_until(lambda: many.connected() == 0, "the guest has been through all of them")
    os.kill(remoted.process.pid, signal.SIGCONT)


def test_proxyd_ends_in_time_while_it_connects_to_a_hung_remote(many: Daemons) -> None:
    remoted = many.start_remoted()
    os.kill(remoted.process.pid, signal.SIGSTOP)
    proxyd = many.start_proxyd()
    many.connect_console()
    assert many.connected() == 0
    proxyd.process.terminate()
    assert proxyd.process.wait(END_SECONDS) == 0


def test_a_remote_that_goes_on_is_linked_again(few: Daemons) -> None:
    remoted, _ = few.start_remoted(), few.start_proxyd()
    console = few.connect_console()
    assert console.command("setup").result.number("functions") == 2
    os.kill(remoted.process.pid, signal.SIGSTOP)
    assert console.command("setup").result.number("functions") == 0, "accesses read all ones"
    assert few.connected() == 0
    os.kill(remoted.process.pid, signal.SIGCONT)
    wait_until(lambda: few.connected() == 2, "all functions are linked again")
    assert console.command("setup").result.number("functions") == 2
    assert console.command("run 20 held 2").ok
    stats = console.command("stats").of_kind("function")
    assert [(function.number("served"), function.number("lost")) for function in stats] == [(20, 0)] * 2


def test_rounds_that_are_redone_are_counted_once(few: Daemons) -> None:
    """A remote that hung goes on with its line high: the interrupt is that of a round that is not counted."""
    remoted = few.start_remoted("tests.support.oddfunctions:HangsWithItsLineHigh")
    proxyd = few.start_proxyd()
    console = few.connect_console()
    assert console.command("setup").result.number("functions") == 2

    def lost() -> int:
        return proxyd.log.read_text().count("link lost: no answer")

    is_over = threading.Event()
    stat = Path(f"/proc/{remoted.process.pid}/stat")

    def is_stopped() -> bool:
        return stat.read_text().rpartition(")")[2].split()[0] == "T"

    def go_on(seen: int) -> int:
        """The links that were lost by the time that remoted has stopped, cost a link, and was continued."""
        wait_until(lambda: is_over.is_set() or (is_stopped() and lost() > seen), "a function hangs")
        seen = lost()
        os.kill(remoted.process.pid, signal.SIGCONT)
        return seen

    def go_on_and_on() -> None:
        seen = 0
        while not is_over.is_set():
            seen = go_on(seen)

    helper = threading.Thread(target=go_on_and_on)
    helper.start()
    try:
        assert console.command("run 20 held 2", timeout=END_SECONDS).ok
    finally:
        is_over.set()
        helper.join()
    stats = console.command("stats").of_kind("function")
    assert all(function.number("redone") for function in stats)
    for counts, count in ((("raised", "served"), 20), (("held", "reasserts"), 10), (("lost",), 0)):
        assert [function.number(name) for function in stats for name in counts] == [count] * 2 * len(counts)


def test_a_remote_that_comes_late_is_linked_and_routed(few: Daemons) -> None:
    few.start_proxyd()
    console = few.connect_console()
    assert console.command("setup").result.number("functions") == 0, "which leaves the router programmed"
    few.start_remoted()
    wait_until(lambda: few.connected() == 2, "all functions are linked")
    assert [function["gsi"] for function in few.functions()] == [5, 9]
    assert console.command("setup").result.number("functions") == 2
    assert console.command("run 20").ok
    stats = console.command("stats").of_kind("function")
    assert [(function.number("served"), function.number("lost")) for function in stats] == [(20, 0)] * 2


def test_a_long_run_does_not_keep_proxyd_from_ending(few: Daemons) -> None:
    few.start_remoted()
    proxyd = few.start_proxyd()
    console = few.connect_console()
    assert console.command("setup").result.number("functions") == 2
    few.send("run 1000000")
    wait_until(lambda: few.resamples() > 10, "the run has begun")
    proxyd.process.terminate()
    assert proxyd.process.wait(END_SECONDS) == 0


def test_a_run_without_functions_is_refused(vm: str, tmp_path: Path) -> None:
    daemons = Daemons(tmp_path, vm, 1)
    try:
        daemons.start_proxyd()
        reply = daemons.connect_console().command("run 1000000")
        assert reply.reason == "no function with a driver: setup finds them"
    finally:
        daemons.close()
