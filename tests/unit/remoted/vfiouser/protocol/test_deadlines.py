# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients that stop in the middle: remoted runs in the test's own thread, by a clock that the test moves."""

from __future__ import annotations

import os

import pytest

from tests.support import vfiouserclient as vfu
from tests.support.remotebench import RemoteBench
from tests.support.vfiouserclient import CONFIG_REGION, VfioUserClient

READ = vfu.frame(vfu.REGION_READ, vfu.ACCESS.pack(0, CONFIG_REGION, 4))
HALF_MESSAGE_SECONDS = 5


def connect(bench: RemoteBench, name: str) -> VfioUserClient:
    client = VfioUserClient.connect(bench.path(name), bench.settle)
    client.version()
    return client


def pass_time(bench: RemoteBench, seconds: float) -> None:
    bench.clock.now += seconds
    bench.loop.step()
    bench.settle()


@pytest.mark.parametrize("length", [1, 15, 16, 17, len(READ) - 1])
def test_half_a_message_and_then_silence_ends_the_session(bench: RemoteBench, length: int) -> None:
    with connect(bench, "dev") as client, connect(bench, "vectors") as other:
        eventfd = os.eventfd(0)
        client.send_frame(READ[:length], [eventfd])
        os.close(eventfd)
        pass_time(bench, HALF_MESSAGE_SECONDS - 0.1)
        assert not client.has_ended
        pass_time(bench, 0.2)
        assert client.has_ended
        assert other.read(CONFIG_REGION, 0) != 0
        with connect(bench, "dev") as again:
            assert again.read(CONFIG_REGION, 0) != 0


def test_silence_between_messages_costs_nothing(bench: RemoteBench) -> None:
    with VfioUserClient.connect(bench.path("dev"), bench.settle) as client:
        pass_time(bench, 1e5)
        client.version()
        pass_time(bench, 1e5)
        assert client.read(CONFIG_REGION, 0) != 0


def test_byte_in_a_while_does_not_keep_a_message_open(bench: RemoteBench) -> None:
    """Each is progress, and still the message takes too long."""
    with connect(bench, "dev") as client:
        for byte in READ[:-1]:
            if client.has_ended:
                return
            client.send_frame(bytes([byte]))
            pass_time(bench, 1)
    raise AssertionError("it never ended")
