# SPDX-License-Identifier: GPL-2.0-or-later
"""The event loop's fds: in which order they are handled, and what a busy link delays."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from common.loop import Loop
from tests.support.fds import count_fds
from tests.support.remotebench import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loop(clock: Clock) -> Iterator[Loop]:
    before = count_fds()
    loop = Loop(clock)
    yield loop
    loop.close()
    assert count_fds() == before


class Event:
    """An eventfd in the loop that notes when its turn comes."""

    def __init__(self, loop: Loop, name: str, order: list[str], *, in_turn: bool = False) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._loop = loop
        self._name = name
        self._order = order
        self.also: Callable[[], None] = lambda: None
        loop.add(self.fd, self._ready, in_turn=in_turn)

    def set(self, count: int = 1) -> None:
        os.eventfd_write(self.fd, count)

    def close(self) -> None:
        if self.fd != -1:
            self._loop.remove(self.fd)
            os.close(self.fd)
            self.fd = -1

    def _ready(self, _events: int) -> None:
        count = os.eventfd_read(self.fd)
        if count > 1:  # as a socket that has more to read
            os.eventfd_write(self.fd, count - 1)
        self._order.append(self._name)
        self.also()


@pytest.fixture
def order() -> list[str]:
    return []


@pytest.fixture
def event(loop: Loop, order: list[str]) -> Iterator[Callable[..., Event]]:
    events: list[Event] = []

    def make(name: str, *, in_turn: bool = False) -> Event:
        events.append(Event(loop, name, order, in_turn=in_turn))
        return events[-1]

    yield make
    for one in events:
        one.close()


Make = Callable[..., Event]


def test_ready_fd_is_handled_until_it_is_read(loop: Loop, event: Make, order: list[str]) -> None:
    one = event("one")
    loop.step()
    assert order == []
    one.set(3)
    for _ in range(5):
        loop.step()
    assert order == ["one"] * 3


def test_handler_gets_the_events(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    got: list[int] = []
    loop.add(ours.fileno(), got.append, select.EPOLLOUT)
    loop.step()
    loop.modify(ours.fileno(), 0)
    loop.step()
    theirs.close()
    loop.step()
    loop.remove(ours.fileno())
    loop.step()
    ours.close()
    assert got == [select.EPOLLOUT, select.EPOLLHUP]


def test_handlers_that_are_ready_together_get_their_own_events(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(4)]
    got: list[tuple[int, int]] = []

    def note(number: int, events: int) -> None:
        got.append((number, events))

    for number, (ours, theirs) in enumerate(pairs):
        loop.add(ours.fileno(), partial(note, number), 0, in_turn=number > 1)
        if number % 2:
            loop.modify(ours.fileno(), select.EPOLLOUT)
        else:
            theirs.close()
    loop.step()
    for ours, theirs in pairs:
        loop.remove(ours.fileno())
        ours.close()
        theirs.close()
    assert sorted(got) == [
        (0, select.EPOLLHUP),
        (1, select.EPOLLOUT),
        (2, select.EPOLLHUP),
        (3, select.EPOLLOUT),
    ]


def test_fd_cant_be_added_twice_nor_a_file_at_all(loop: Loop, event: Make) -> None:
    one = event("one")
    with pytest.raises(OSError) as twice:
        loop.add(one.fd, print)
    assert twice.value.errno == errno.EEXIST
    with open(__file__, encoding="utf-8") as file, pytest.raises(OSError) as unfit:
        loop.add(file.fileno(), print)
    assert unfit.value.errno == errno.EPERM


class Link:
    """A socket that is served in turn, one byte at a call, and its peer."""

    def __init__(self, loop: Loop, name: str, order: list[str]) -> None:
        self.ours, self.peer = socket.socketpair()
        self._loop = loop
        self._name = name
        self._order = order
        self.also: Callable[[], None] = lambda: None
        loop.add(self.fd, self._ready, in_turn=True)

    @property
    def fd(self) -> int:
        return self.ours.fileno()

    def close(self) -> None:
        if self.fd != -1:
            self._loop.remove(self.fd)
            self.ours.close()
        self.peer.close()

    def _ready(self, _events: int) -> None:
        data = self.ours.recv(1)
        self._order.append(f"{self._name} {data.decode()}" if data else f"{self._name} end")
        self.also()
        if not data:
            self.close()


@pytest.fixture
def link(loop: Loop, order: list[str]) -> Iterator[Callable[[str], Link]]:
    links: list[Link] = []

    def make(name: str) -> Link:
        links.append(Link(loop, name, order))
        return links[-1]

    yield make
    for one in links:
        one.close()


MakeLink = Callable[[str], Link]
QUEUED = 200


@pytest.mark.parametrize("is_link_first", [True, False])
def test_what_was_queued_on_a_link_goes_before_what_is_ordered_after_it(
    loop: Loop, event: Make, link: MakeLink, order: list[str], is_link_first: bool
) -> None:
    """However much it is, whichever was added first, and although more comes all the time."""
    if is_link_first:
        busy, resample = link("link"), event("resample")
    else:
        resample, busy = event("resample"), link("link")
    loop.order(resample.fd, after=busy.fd)
    busy.peer.send(b"a" * QUEUED)
    resample.set()
    busy.also = lambda: busy.peer.sendall(b"b")
    while "resample" not in order:
        loop.step()
        assert len(order) < 3 * QUEUED
    before = order[: order.index("resample")]
    assert before.count("link a") == QUEUED
    assert before.count("link b") <= 1


def test_the_end_of_a_link_goes_before_what_is_ordered_after_it(
    loop: Loop, event: Make, link: MakeLink, order: list[str]
) -> None:
    """As a client's end does before the next client."""
    ending, listener = link("link"), event("listener", in_turn=True)
    loop.order(listener.fd, after=ending.fd)
    listener.set()
    ending.peer.send(b"a")
    ending.peer.close()
    for _ in range(3):
        loop.step()
    assert order == ["link a", "link end", "listener"]


def test_a_wait_that_is_over_doesnt_shorten_the_next(
    loop: Loop, event: Make, link: MakeLink, order: list[str]
) -> None:
    busy, resample = link("link"), event("resample")
    loop.order(resample.fd, after=busy.fd)
    for _ in range(3):
        busy.peer.send(b"a" * 10)
        resample.set()
        loop.step()
        os.eventfd_read(resample.fd)  # by somebody else
        loop.step()
        busy.peer.send(b"a" * 10)
        resample.set()
        while "resample" not in order:
            loop.step()
        assert order == ["link a"] * 20 + ["resample"]
        order.clear()


def test_the_order_ends_with_the_link(loop: Loop, event: Make, link: MakeLink, order: list[str]) -> None:
    """The next fd of its number is another matter."""
    old, resample = link("old"), event("resample")
    loop.order(resample.fd, after=old.fd)
    number = old.fd
    old.close()
    new = link("new")
    assert new.fd == number
    new.peer.send(b"a" * 10)
    resample.set()
    loop.step()
    assert order[0] == "resample"


def test_what_waits_takes_nothing_over_from_one_that_had_its_number(
    loop: Loop, event: Make, link: MakeLink, order: list[str]
) -> None:
    busy, old = link("link"), event("old")
    loop.order(old.fd, after=busy.fd)
    busy.peer.send(b"a" * 3)
    old.set()
    loop.step()
    number = old.fd
    old.close()
    busy.peer.send(b"a" * 10)
    new = event("new")
    assert new.fd == number
    loop.order(new.fd, after=busy.fd)
    new.set()
    while "new" not in order:
        loop.step()
    assert order.count("link a") == 13


def test_links_that_are_busy_delay_nothing_but_what_is_ordered_after_them(
    loop: Loop, event: Make, link: MakeLink, order: list[str]
) -> None:
    busy = [link(f"link{number}") for number in range(24)]
    idle, resample, other = link("idle"), event("resample"), event("other")
    loop.order(resample.fd, after=idle.fd)
    for one in busy:
        one.peer.send(b"a" * QUEUED)
    for _ in range(QUEUED // 2):
        order.clear()
        resample.set()
        other.set()
        loop.step()
        assert order[:2] == ["resample", "other"]


def test_a_pass_with_slow_links_ends_after_one_and_they_take_turns(
    loop: Loop, clock: Clock, link: MakeLink, order: list[str]
) -> None:
    links = [link(f"link{number}") for number in range(4)]

    def take_long() -> None:
        clock.now += 0.001

    for one in links:
        one.also = take_long
        one.peer.send(b"a" * 10)
    for _ in range(5):
        order.clear()
        for count in range(1, 5):
            loop.step()
            assert len(order) == count
        assert sorted(order) == [f"link{number} a" for number in range(4)]


def test_quick_links_get_one_turn_each_in_a_pass(loop: Loop, link: MakeLink, order: list[str]) -> None:
    links = [link(f"link{number}") for number in range(4)]
    for one in links:
        one.peer.send(b"aa")
    loop.step()
    assert sorted(order) == [f"link{number} a" for number in range(4)]


def test_a_pass_serves_as_large_a_part_of_many_links_as_of_few(
    loop: Loop, clock: Clock, link: MakeLink, order: list[str]
) -> None:
    """Each pass looks at all that are ready. If it served only a few, a request would cost more with each link."""

    def take() -> None:
        clock.now += 2e-6

    links = [link(f"{number}") for number in range(200)]
    for each in links:
        each.also = take
        each.peer.send(b"a")
    passes = 0
    while len(order) < len(links):
        loop.step()
        passes += 1
    assert passes == 4


def test_no_edge_is_lost_while_links_are_busy(loop: Loop, event: Make, link: MakeLink) -> None:
    """Neither one that is there when the pass begins nor one that comes while the links are served."""
    ours, theirs = socket.socketpair()
    edges: list[int] = []
    loop.add(ours.fileno(), edges.append, select.EPOLLIN | select.EPOLLET)
    one, two = link("one"), link("two")
    one.also = lambda: theirs.sendall(b"x")
    for busy in (one, two):
        busy.peer.send(b"a" * 10)
    for count in range(1, 11):
        loop.step()
        assert len(edges) == count - 1
    loop.step()
    assert len(edges) == 10
    loop.remove(ours.fileno())
    ours.close()
    theirs.close()


@pytest.mark.parametrize("in_turn", [False, True])
def test_handler_removed_within_a_pass_isnt_called(
    loop: Loop, event: Make, order: list[str], in_turn: bool
) -> None:
    one, two = event("one", in_turn=in_turn), event("two", in_turn=in_turn)
    one.also, two.also = two.close, one.close
    one.set()
    two.set()
    loop.step()
    loop.step()
    assert order in (["one"], ["two"])


def test_link_may_remove_what_waits_for_it(loop: Loop, event: Make, link: MakeLink, order: list[str]) -> None:
    """As a session that ends does with its resamplefd."""
    ending, resample = link("link"), event("resample")
    loop.order(resample.fd, after=ending.fd)
    ending.also = resample.close
    ending.peer.send(b"a")
    resample.set()
    for _ in range(3):
        loop.step()
    assert order == ["link a"]


def test_handler_may_remove_itself(loop: Loop, event: Make, order: list[str]) -> None:
    one, two = event("one", in_turn=True), event("two")
    one.also, two.also = one.close, two.close
    one.set(2)
    two.set(2)
    loop.step()
    loop.step()
    assert sorted(order) == ["one", "two"]


def test_fd_is_reused_within_a_pass(loop: Loop, event: Make, order: list[str]) -> None:
    """The new handler may be called for nothing, and must not be called later for the old one."""
    link, old = event("link"), event("old")
    added: list[Event] = []

    def replace() -> None:
        number = old.fd
        old.close()
        new = event("new")
        assert new.fd == number
        new.set()
        added.append(new)

    link.also = replace
    link.set()
    old.set()
    loop.step()
    loop.step()
    assert order == ["link", "new"]


def test_stop_lets_the_pass_end(loop: Loop, event: Make, order: list[str]) -> None:
    one, two = event("one"), event("two")
    one.also = two.also = loop.stop
    one.set()
    two.set()
    loop.run()
    assert sorted(order) == ["one", "two"]
