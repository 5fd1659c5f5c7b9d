# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever a device's code does when the daemon calls it: the call fails, and is counted, logged and told."""

from __future__ import annotations

import asyncio
import enum
import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from common.loop import Loop
from remoted.device import DmaError, Host, PciFunction, RateLimited
from remoted.memory import GuestMemory
from tests.support.remotebench import IO_BASE, MEM_BASE, Clock, LineDevice, Recorder

ONES = 0xFFFFFFFFFFFFFFFF
ERRORS = [
    ZeroDivisionError,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    StopIteration,
    asyncio.CancelledError,
    MemoryError,
    BaseException,
]


class Faulty(LineDevice):
    """Raises from every method that is mentioned, and returns what the test likes."""

    REGISTERS = {1: {0x8: "STATUS"}}  # noqa: RUF012

    error: BaseException | None = None
    value: Any = 0
    resets = 0

    def fail(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value

    def bar_read(self, bar: int, offset: int, size: int) -> Any:
        return self.fail()

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.fail()

    def config_read(self, addr: int, size: int) -> Any:
        super().config_read(addr, size)
        return self.fail()

    def config_write(self, addr: int, size: int, value: int) -> None:
        super().config_write(addr, size, value)
        self.fail()

    def set_intx(self, level: bool) -> None:
        self.fail()
        super().set_intx(level)

    def reset(self) -> None:
        self.resets += 1
        self.fail()

    def close(self) -> None:
        self.fail()


class Bench:
    """The function, powered on, with its BARs placed."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.log = Recorder()
        self.lines: list[bool] = []
        self.function = Faulty(Host("dev0", self.loop, self.log.logger, GuestMemory(), self.lines.append), {})
        self.function.full_reset()
        for addr, value in ((0x10, IO_BASE), (0x14, MEM_BASE), (0x04, 0x3)):
            self.function.bus_config_write(addr, 4, value)

    def heads(self) -> list[str]:
        return [message.partition("failed: ")[2] for message in self.log.messages]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.loop.close()


CALLS: dict[str, tuple[Callable[[PciFunction], object], object]] = {
    "reading 4 bytes at BAR 1 + 0x8 (STATUS)": (
        lambda function: function.bus_read(True, MEM_BASE + 8, 4),
        ONES,
    ),
    "writing 1 bytes at BAR 0 + 0x0": (lambda function: function.bus_write(False, IO_BASE, 1, 0), False),
    "reading 8 bytes at BAR 1 + 0x10": (lambda function: function.region_read(1, 0x10, 8), ONES),
    "writing 2 bytes at BAR 1 + 0x4": (lambda function: function.region_write(1, 4, 2, 7), False),
    "reading 2 bytes of config space at 0x6": (lambda function: function.bus_config_read(6, 2), ONES),
    "writing 4 bytes of config space at 0x40": (
        lambda function: function.bus_config_write(0x40, 4, 0),
        False,
    ),
    "setting the INTx line": (lambda function: function.drive_intx(True), False),
    "close": (lambda function: function.shut_down(), []),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("doing", CALLS)
def test_call_that_raises(bench: Bench, doing: str, error: type[BaseException]) -> None:
    function = bench.function
    call, answer = CALLS[doing]
    function.error = error("unwell")
    for count in range(1, 4):
        assert call(function) == answer
        assert function.errors == count
    assert function.last_place == doing
    assert function.last_error.startswith(f"{error.__name__}: unwell (")
    assert f"{__file__}:" in function.last_error
    assert bench.heads() == [doing]
    (text,) = function.amiss.texts()
    assert text.startswith(f"3 errors in the device's code, the last at: {doing}: {error.__name__}: unwell (")
    function.error = None
    assert call(function) != answer or doing == "close"
    assert function.errors == 3


@pytest.mark.parametrize("error", ERRORS)
def test_reset_that_raises(bench: Bench, error: type[BaseException]) -> None:
    """The line is low and config space is reset nonetheless, and reset() is called when set_intx() raises."""
    function = bench.function
    function.set_intx(True)
    function.error = error("unwell")
    assert not function.full_reset()
    assert function.resets == 2
    assert bench.lines == [True, False]
    assert not function.intx_level
    assert bench.heads() == ["setting the INTx line", "reset"]
    assert function.last_place == "reset"
    assert len(function.amiss.texts()) == 1
    function.error = None
    assert function.full_reset()
    assert function.amiss.texts() == []
    assert function.errors == 2
    function.error = error("unwell")
    function.bus_read(False, IO_BASE, 1)
    assert function.bus_read(False, IO_BASE, 1) == ONES, "config space had been reset"
    assert function.errors == 2


@pytest.mark.parametrize("method", ["reset", "set_intx"])
def test_reset_tells_its_client_which_of_both_failed(bench: Bench, method: str) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    assert bench.function.full_reset()
    setattr(bench.function, method, fails)
    assert not bench.function.full_reset()


class Index:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> Any:
        return self.value


class Colour(enum.IntFlag, boundary=enum.STRICT):
    RED = 0x12


class Liar(int):
    def __and__(self, _other: object) -> Any:
        return "lie"


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (0x12345, 0x2345),
        (-1, 0xFFFF),
        (1 << 70, 0),
        (True, 1),
        (Index(7), 7),
        (Colour.RED, 0x12),
        (Liar(5), 5),
    ],
)
def test_value_that_is_cut_to_size(bench: Bench, value: object, read: int) -> None:
    bench.function.value = value
    assert bench.function.bus_read(True, MEM_BASE, 2) == read
    assert bench.function.region_read(1, 0, 2) == read
    assert bench.function.bus_config_read(0x40, 2) == read
    assert type(bench.function.region_read(1, 0, 2)) is int
    assert type(bench.function.bus_read(True, MEM_BASE, 2)) is int
    assert type(bench.function.bus_config_read(0x40, 2)) is int
    assert bench.function.errors == 0


NO_INTEGERS = [None, 1.0, "1", b"1", [1], Index(None), Index("1"), object()]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=lambda each: type(each).__name__)
def test_value_that_is_no_integer(bench: Bench, value: object) -> None:
    bench.function.value = value
    assert bench.function.bus_read(True, MEM_BASE, 2) == ONES
    assert bench.function.region_read(1, 0, 2) == ONES
    assert bench.function.bus_config_read(0x40, 2) == ONES
    assert bench.function.errors == 3
    assert bench.function.last_error.startswith("TypeError: ")


def test_different_errors_at_one_place_are_all_logged(bench: Bench) -> None:
    function = bench.function
    for error in (
        KeyError("a"),
        KeyError("b"),
        ValueError("c"),
        KeyError("d"),
        ValueError("e"),
        OSError("f"),
    ):
        function.error = error
        function.bus_read(True, MEM_BASE, 4)
    kinds = [record.exc_info[0] for record in bench.log.records if record.exc_info]
    assert kinds == [KeyError, ValueError, OSError]
    assert function.errors == 6


def test_an_error_elsewhere_in_the_code_is_another(bench: Bench) -> None:
    function = bench.function
    errors = iter(range(2))

    def elsewhere() -> int:
        return 1 // 0 if next(errors) else 2 // 0

    function.value = Index(0)
    function.value.__class__ = type("Fails", (Index,), {"__index__": lambda _: elsewhere()})
    function.bus_read(True, MEM_BASE, 4)
    function.bus_read(True, MEM_BASE, 4)
    assert bench.heads() == ["reading 4 bytes at BAR 1 + 0x0"]
    function.error = ZeroDivisionError("at another line")
    function.bus_read(True, MEM_BASE, 4)
    assert bench.heads() == ["reading 4 bytes at BAR 1 + 0x0"] * 2


def test_failing_device_cant_fill_the_log(bench: Bench) -> None:
    bench.function.error = KeyError()  # one object, which would gather a traceback of all its calls
    for offset in range(4096):
        bench.function.bus_read(True, MEM_BASE + offset, 1)
    assert len(bench.log.records) == 10, "as many as the rate limit lets pass at once"
    assert bench.function.errors == 4096
    assert bench.function.error.__traceback__ is None


def test_errors_that_the_rate_limit_suppressed_are_logged_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until there have been 64 different ones; then that is said, and no more are logged."""
    clock = Clock()
    monkeypatch.setattr("remoted.guard.RateLimited", functools.partial(RateLimited, clock=lambda: clock.now))
    bench = Bench()
    bench.function.error = KeyError()
    for _ in range(20):
        clock.now += 10
        for offset in range(70):
            bench.function.bus_read(True, MEM_BASE + offset, 1)
    assert bench.function.errors == 1400
    errors = [record for record in bench.log.records if record.exc_info]
    assert len(errors) == 64
    assert bench.log.messages[-1].startswith("64 different errors: no more are logged, only counted")
    assert len(bench.log.records) == 65
    bench.loop.close()


def test_what_is_called_within_another_call_leaves_that_watched(bench: Bench) -> None:
    guard = bench.function.host.guard
    with guard.running("the outer"):
        bench.function.drive_intx(True)
        doing = guard.watchdog.doing
    assert doing is not None
    assert doing[1] == "the outer"
    assert guard.watchdog.doing is None


def test_error_whose_text_fails_or_has_no_end(bench: Bench) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise GeneratorExit

    bench.function.error = Mute()
    bench.function.bus_read(True, MEM_BASE, 4)
    assert bench.function.last_error.startswith("Mute: no text (")
    bench.function.error = ValueError("one\ntwo" * 10000)
    bench.function.bus_read(True, MEM_BASE, 4)
    assert bench.function.last_error.startswith(r"ValueError: one\ntwoone\n")
    assert len(bench.function.last_error) < 1000


class Odd(LineDevice):
    """Has attributes with the names that the base class uses for its own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._config = self._windows = self._level = self._guard = self._wmask = None


def test_a_device_may_have_names_of_its_own() -> None:
    loop = Loop()
    loop.close()
    function = Odd(Host("dev0", loop, Recorder().logger, GuestMemory(), lambda _: None), {})
    assert function.full_reset()
    assert function.drive_intx(True)
    assert function.bus_config_read(0x06, 2) == 0x8
    with pytest.raises(AttributeError):
        function.host = None  # type: ignore[misc, assignment]


def test_dma_takes_bus_mastering(bench: Bench) -> None:
    function, memory = bench.function, bench.function.host.memory
    attempts: list[Callable[[], object]] = [
        lambda: memory.read(0x1000, 4),
        lambda: memory.write(0x1000, b"abcd"),
        lambda: memory.view(0x1000, 4),
    ]
    for is_master in (False, True, False):
        function.bus_config_write(0x04, 2, 0x3 | 0x4 * is_master)
        assert function.is_bus_master is is_master
        for attempt in attempts:
            with pytest.raises(
                DmaError, match="no RAM at 0x1000" if is_master else "has not set bus mastering"
            ):
                attempt()
    function.bus_config_write(0x04, 2, 0x4)
    function.full_reset()
    assert not function.is_bus_master
    with pytest.raises(DmaError, match="bus mastering"):
        memory.read(0x1000, 4)


def test_periodic_timer_stops_at_a_reset(bench: Bench) -> None:
    function, clock = bench.function, bench.clock
    ticks: list[float] = []
    timer = function.call_every(0.5, lambda: ticks.append(clock.now))
    start = clock.now

    def advance(seconds: float) -> None:
        clock.now += seconds
        bench.loop.step()

    advance(0.4)
    advance(0.1)
    advance(0.7)
    advance(0.3)
    assert [tick - start for tick in ticks] == pytest.approx([0.5, 1.2, 1.5]), "a late call delays no other"
    advance(10)
    assert len(ticks) == 4, "those that are over are left out"
    function.full_reset()
    assert not timer.is_active
    advance(10)
    assert len(ticks) == 4
    function.call_every(0.5, lambda: ticks.append(0)).cancel()
    advance(10)
    assert len(ticks) == 4


def test_no_dma_before_the_first_reset(bench: Bench) -> None:
    """In __init__(), say."""
    memory = GuestMemory()
    LineDevice(Host("dev1", bench.loop, bench.log.logger, memory, lambda _: None), {})
    with pytest.raises(DmaError, match="bus mastering"):
        memory.read(0x1000, 4)


def test_periodic_timers_that_are_over_are_not_kept(bench: Bench) -> None:
    def create() -> weakref.ref[object]:
        timer = bench.function.call_every(0.5, lambda: None)
        timer.cancel()
        return weakref.ref(timer)

    over = [create() for _ in range(100)]
    bench.function.call_every(0.5, lambda: None)
    bench.clock.now += 1
    bench.loop.step()
    gc.collect()
    assert not [each for each in over if each() is not None]


def test_periodic_timer_goes_on_after_an_error(bench: Bench) -> None:
    bench.function.call_every(0.5, bench.function.fail)
    bench.function.error = GeneratorExit()
    for _ in range(3):
        bench.clock.now += 0.5
        bench.loop.step()
    assert bench.function.errors == 3
    assert bench.function.last_place.endswith(".fail()"), "the device's method is named, not the timer's"
    assert len(bench.log.records) == 1


@pytest.mark.parametrize("seconds", [0, -1, 0.0001, float("nan"), float("inf"), 1e12])
def test_impossible_period(bench: Bench, seconds: float) -> None:
    with pytest.raises(ValueError):
        bench.function.call_every(seconds, lambda: None)


@pytest.mark.parametrize("error", ERRORS)
def test_source_of_what_is_amiss_that_raises(bench: Bench, error: type[BaseException]) -> None:
    """Before it gives a text, between two, and by one that is none."""

    def told() -> Iterator[str]:
        yield "no paper"
        bench.function.error = error("unwell")
        bench.function.fail()

    for source in (bench.function.fail, told, lambda: [5]):
        bench.function.amiss.add(source)  # type: ignore[arg-type]
    bench.function.error = error("unwell")
    assert bench.function.amiss.texts() == ["no paper"]
    assert bench.function.errors == 3
    bench.function.amiss.add(lambda: itertools.repeat("again"))
    assert len(bench.function.amiss.texts()) == 16
    assert "telling what is amiss" in bench.function.amiss.texts()[0]
