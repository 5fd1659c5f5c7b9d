# SPDX-License-Identifier: GPL-2.0-or-later
"""The threads of an nvme device: how many there are, and their end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import pytest

from common.loop import Loop
from remoted.devices.nvme.workers import Workers
from tests.support.checkout import ROOT
from tests.support.steploop import run_until
from tests.support.wait import wait_until

MOST = 4
"""threads at the most"""


class Pool:
    """A pool of threads whose jobs wait until the test lets them end."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.workers = Workers(loop.call_soon_threadsafe)
        self.may_end = threading.Semaphore(0)
        self.begun: list[int] = []
        self.results: list[int] = []
        self.ends: list[int] = []
        """of each call of what close() was given: how many threads there were"""

    def submit(self, number: int) -> None:
        self.workers.submit(lambda: self._work(number), lambda result, _error: self.results.append(result))

    def finish(self, count: int) -> None:
        """Lets so many jobs end, and waits for their results."""
        wanted = len(self.results) + count
        self.may_end.release(count)
        run_until(self.loop, lambda: len(self.results) == wanted)

    def close(self) -> None:
        self.workers.close(lambda: self.ends.append(self.workers._alive))

    def _work(self, number: int) -> int:
        self.begun.append(number)
        assert self.may_end.acquire(timeout=20)
        return number


@pytest.fixture
def pool(loop: Loop) -> Iterator[Pool]:
    pool = Pool(loop)
    yield pool
    pool.may_end.release(100)
    if not pool.ends:
        pool.close()
    wait_until(lambda: pool.ends, "all threads have ended")


def test_a_thread_that_is_free_takes_the_next_job(pool: Pool) -> None:
    for number in range(3):
        pool.submit(number)
        pool.finish(1)
    assert pool.workers._alive == 1
    assert pool.results == [0, 1, 2]
    assert pool.workers.is_idle


def test_more_jobs_than_threads_wait_for_one(pool: Pool) -> None:
    for number in range(MOST + 2):
        pool.submit(number)
    wait_until(lambda: len(pool.begun) == MOST, "each thread has a job")
    assert pool.workers._alive == MOST
    pool.may_end.release(MOST)
    wait_until(lambda: len(pool.workers._results) == MOST, "results wait to be delivered together")
    run_until(pool.loop, lambda: pool.results)
    assert not pool.workers.is_idle
    pool.finish(2)
    assert sorted(pool.results) == list(range(MOST + 2))
    assert pool.workers.is_idle


def test_a_thread_that_can_not_be_started_is_missed_only_without_any(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            pool.submit(0)
    assert pool.workers.is_idle
    pool.submit(1)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    pool.submit(2)
    pool.finish(2)
    assert pool.results == [1, 2]


def test_close_without_a_thread_is_over_at_once(pool: Pool) -> None:
    pool.close()
    assert pool.ends == [0]


def test_close_is_over_after_the_last_present_job_and_no_other_begins(pool: Pool) -> None:
    for number in range(MOST + 2):
        pool.submit(number)
    wait_until(lambda: len(pool.begun) == MOST, "each thread has a job")
    pool.close()
    pool.may_end.release(MOST - 1)
    wait_until(lambda: pool.workers._alive == 1, "all threads but one have ended")
    assert pool.ends == []
    pool.may_end.release(100)
    wait_until(lambda: pool.ends, "all threads have ended")
    pool.loop.step(0)
    assert (pool.ends, len(pool.begun), pool.results) == ([0], MOST, [])


def test_a_process_does_not_wait_for_a_job_when_it_ends() -> None:
    script = (
        "import threading\n"
        "from remoted.devices.nvme.workers import Workers\n"
        "Workers(lambda call: None).submit(threading.Event().wait, lambda result, error: None)\n"
    )
    subprocess.run([sys.executable, "-c", script], timeout=20, check=True, cwd=ROOT)
