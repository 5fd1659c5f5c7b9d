# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients that send what they must not: it costs them their session at most, and nobody else anything."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import vfiouserclient as vfu
from tests.support import vfiouserdevice as device
from tests.support.vfiouserclient import CONFIG_REGION, INTX, MSIX, VfioUserClient
from tests.support.vfiousermutants import Mutant, Mutants, Stream
from tests.support.vfiouserprocess import Event, VfioUserServer, events, fds_of, memory

SEEDS = range(4)
MUTANTS = 25_000
"""messages for each seed"""
BATCH = 50
MOST_CPU_SECONDS = 0.005
"""that the server may spend before it answers another device's client"""
REQUIRED_SHARE = 0.995
"""the share of the answers for which that must hold: a hypervisor may take the CPU away unseen"""
MOST_LINES = 200


def check(client: VfioUserClient) -> None:
    assert client.read(CONFIG_REGION, 0) == device.IDENTITY


READ = vfu.frame(vfu.REGION_READ, vfu.ACCESS.pack(0, CONFIG_REGION, 4))

ENDING = {
    "a size of 0": vfu.frame(vfu.RESET, size=0),
    "a size of 15": vfu.frame(vfu.RESET, size=15),
    "a size of 2 MiB": vfu.frame(vfu.REGION_WRITE, bytes(16), size=1 << 21),
    "a size of -1": vfu.frame(vfu.RESET, size=0xFFFFFFFF),
    "zeros": bytes(64),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "garbage": bytes(range(255, -1, -1)) * 16,
}


@pytest.mark.parametrize("data", ENDING.values(), ids=ENDING)
@pytest.mark.parametrize("is_negotiated", [False, True])
def test_what_puts_the_stream_out_of_step_ends_its_session_only(
    server: VfioUserServer, data: bytes, is_negotiated: bool
) -> None:
    with server.negotiated("other") as victim:
        with server.negotiated("probe") if is_negotiated else server.connect("probe") as client:
            before = server.status("probe")["rejected"]
            client.send_frame(data)
            assert client.has_ended
        check(victim)
        with server.negotiated("probe") as again:
            check(again)
        assert server.status("probe")["rejected"] > before


@pytest.mark.parametrize("flags", [vfu.REPLY, vfu.REPLY | vfu.ERROR, 2, 0xF])
@pytest.mark.parametrize("command", [vfu.DMA_READ, vfu.DMA_WRITE, vfu.RESET])
def test_reply_that_nobody_waits_for(server: VfioUserServer, flags: int, command: int) -> None:
    """Late, with a wrong id, or larger than anything that was asked for: it costs its sender at most."""
    with server.negotiated("probe") as client:
        for message_id, payload in ((0, b""), (99, bytes(16)), (1, bytes(1 << 16))):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.send_frame(vfu.frame(command, payload, message_id, flags))
    with server.negotiated("probe") as client:
        check(client)


@pytest.mark.parametrize("length", [1, 8, 15, 16, 17, len(READ) - 1])
def test_stream_that_ends_within_a_message(server: VfioUserServer, length: int) -> None:
    for count in (0, 3):
        with server.negotiated("probe") as client, events(count) as made:
            client.send_frame(READ[:length], fds_of(made))
    with server.negotiated("probe") as client:
        check(client)


@pytest.mark.parametrize("count", [17, 64, 253])
def test_more_fds_than_the_server_takes(server: VfioUserServer, count: int) -> None:
    payload = vfu.IRQ_SET.pack(20, vfu.DATA_EVENTFD | vfu.TRIGGER, MSIX, 0, 16)
    with (
        server.negotiated("probe") as client,
        Event() as event,
        pytest.raises((vfu.Refused, EOFError, ConnectionError)),
    ):
        client.call(vfu.SET_IRQS, payload, [event.fd] * count)
    with server.negotiated("probe") as client:
        check(client)


def test_fds_with_every_byte(server: VfioUserServer) -> None:
    """The stream is cut into bytes, and each brings as many fds as it can."""
    with (
        server.negotiated("probe") as client,
        Event() as event,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        for byte in READ * 3:
            client.send_frame(bytes([byte]), [event.fd] * 16)
    with server.negotiated("probe") as client:
        check(client)


def test_replies_that_nobody_reads_cost_their_client_only(server: VfioUserServer) -> None:
    """As many as can be asked for: the server keeps few, and serves the other client meanwhile."""
    with server.negotiated("other") as victim, server.negotiated("probe") as client:
        request = vfu.frame(vfu.REGION_READ, vfu.ACCESS.pack(device.SHARED[0], 2, client.most_data))
        before = resident(server.pid)
        client.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            for _ in range(100_000):
                client.sock.send(request)
        for _ in range(200):
            check(victim)
        assert resident(server.pid) < before + (32 << 20)
    with server.negotiated("probe") as client:
        check(client)


def test_client_that_never_stops_does_not_starve_another(server: VfioUserServer) -> None:
    """Between a request of the other client and its reply the server spends a bounded time on the flood."""
    posted = vfu.frame(vfu.REGION_WRITE, vfu.ACCESS.pack(0, 0, 4) + bytes(4), flags=vfu.NO_REPLY) * 64
    with server.negotiated("other") as victim, server.negotiated("probe") as client:
        client.sock.setblocking(False)
        spent = []
        for _ in range(100):
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.sock.send(posted)
            spent.append(cpu_until_answered(server, victim))
    check_spent(spent)


@pytest.mark.parametrize("ranges", [1000])
def test_ranges_of_one_client_cost_another_nothing(server: VfioUserServer, ranges: int) -> None:
    """Unmapping all of them at once, or leaving them behind."""
    with server.negotiated("other") as victim:
        for unmaps in (True, False):
            with server.negotiated("probe") as client, memory(4096) as ram:
                for number in range(ranges):
                    client.dma_map(2 * 4096 * number, 4096, ram)
                if unmaps:
                    client.call(vfu.DMA_UNMAP, vfu.UNMAP.pack(24, 2, 0, 0))
            check(victim)


def test_log_is_bounded(server: VfioUserServer) -> None:
    before = server.log.count("\n")
    for _ in range(300):
        with server.connect("probe") as client, contextlib.suppress(ConnectionError):
            client.send_frame(vfu.frame(vfu.RESET, size=1))
            assert client.has_ended
    with server.negotiated("probe") as client:
        for number in range(3000):
            client.send(number % 100 + 20, flags=vfu.NO_REPLY)
        check(client)
    assert server.log.count("\n") < before + MOST_LINES


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_messages(server: VfioUserServer, seed: int) -> None:
    """Each is answered as the protocol wants, another device's client is served meanwhile, and nothing is left."""
    lines = server.log.count("\n")
    spent: list[float] = []
    sent = 0
    with Mutants(seed) as mutants, server.negotiated("other") as victim, Event() as trigger:
        victim.attach(INTX, 0, [trigger.fd])
        while sent < MUTANTS:
            with server.negotiated("probe") as client:
                stream = Stream(client.sock)
                is_wild = False
                while not is_wild and sent < MUTANTS:
                    batch = draw_batch(mutants)
                    sent += len(batch)
                    is_wild = batch[-1].is_wild
                    send_batch(stream, batch)
                    spent.append(cpu_until_answered(server, victim))
                    check_interrupt(victim, trigger)
                    take_replies(stream, batch)
    assert server.child.process.poll() is None
    check_spent(spent)
    log = server.log
    assert "Traceback" not in log
    assert log.count("\n") < lines + MOST_LINES


def draw_batch(mutants: Mutants) -> list[Mutant]:
    """Some messages; one that is wild is the last."""
    batch: list[Mutant] = []
    while len(batch) < BATCH and not (batch and batch[-1].is_wild):
        batch.append(mutants.draw())
    return batch


def send_batch(stream: Stream, batch: Sequence[Mutant]) -> None:
    """Sends them in as few pieces as their fds allow."""
    piece = b""
    fds: list[int] = []
    for mutant in batch:
        if mutant.fds and piece:
            stream.send(piece, fds)
            piece, fds = b"", []
        fds = fds or mutant.fds
        piece += mutant.data
    stream.send(piece, fds)


def take_replies(stream: Stream, batch: Sequence[Mutant]) -> None:
    """Waits for the replies that must come, in their order. Those to a wild message are not looked at."""
    for mutant in batch:
        if mutant.reply is None:
            continue
        while not stream.heads and not stream.has_ended:
            stream.wait()
        assert stream.heads, f"no reply to {mutant}"
        assert stream.heads.popleft() == mutant.reply, mutant
    if not batch[-1].is_wild:
        assert not stream.heads


def check_interrupt(victim: VfioUserClient, trigger: Event) -> None:
    """The line is signalled once for each rise."""
    victim.write(0, device.RAISE, 0)
    assert trigger.take() == 1
    victim.write(0, device.LOWER, 0, posted=True)
    victim.unmask(INTX)
    assert trigger.take() == 0


def cpu_until_answered(server: VfioUserServer, victim: VfioUserClient) -> float:
    """For how long the server runs from a request to its reply: what others do on the machine does not count."""
    start = server.cpu_seconds()
    check(victim)
    return server.cpu_seconds() - start


def check_spent(spent: list[float]) -> None:
    assert sorted(spent)[int(len(spent) * REQUIRED_SHARE)] < MOST_CPU_SECONDS


def resident(pid: int) -> int:
    """Bytes of its memory that are in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
