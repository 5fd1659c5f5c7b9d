# SPDX-License-Identifier: GPL-2.0-or-later
"""Asynchronous events of the nvme model, and Abort, by NVM Express 1.4, 5.2 and 5.1."""

from __future__ import annotations

import pytest

from tests.support.nvmeadmin import (
    ABORT,
    ABORT_REQUESTED,
    ASYNC_EVENT,
    SET_FEATURES,
    TOO_MANY_EVENTS,
    get_feature,
    log_page,
    set_feature,
)
from tests.support.nvmedriver import DOORBELLS, Driver


class TestEvents:
    def test_requests_wait_beside_other_commands(self, nvme: Driver) -> None:
        cids = [nvme.submit(nvme.admin, ASYNC_EVENT) for _ in range(4)]
        assert nvme.run_until_idle() == []
        for _ in range(2 * nvme.admin.size):
            assert get_feature(nvme, 6) == 1
        one_more = nvme.run(nvme.admin, ASYNC_EVENT)
        assert one_more.status == TOO_MANY_EVENTS
        set_feature(nvme, 11, 0x02)
        nvme.submit(nvme.admin, SET_FEATURES, cdw10=4, cdw11=300)
        ended = [nvme.wait(nvme.admin) for _ in range(2)]
        (event,) = (each for each in ended if each.cid in cids)
        assert (event.cid, event.dword0) == (cids[0], 0x02_01_01), (
            "the SMART log page, a temperature threshold"
        )

    def test_the_temperature_is_reported_when_it_crosses_a_threshold(self, nvme: Driver) -> None:
        """Not when it is beyond a second one as well."""
        set_feature(nvme, 11, 0x02)
        requests = [nvme.submit(nvme.admin, ASYNC_EVENT) for _ in range(3)]
        for request in requests[:2]:
            nvme.submit(nvme.admin, SET_FEATURES, cdw10=4, cdw11=300)
            assert request in [nvme.wait(nvme.admin).cid for _ in range(2)]
            log_page(nvme, 2)
            assert set_feature(nvme, 4, 301).status == 0
            assert nvme.run_until_idle() == []
            assert set_feature(nvme, 4, 343).status == 0

    def test_the_temperature_is_not_reported_to_a_host_that_has_not_asked_for_it(self, nvme: Driver) -> None:
        nvme.submit(nvme.admin, ASYNC_EVENT)
        set_feature(nvme, 11, 0xFD)
        assert set_feature(nvme, 4, 300).status == 0
        assert nvme.run_until_idle() == []

    def test_a_type_is_reported_again_when_its_log_page_was_read(self, nvme: Driver) -> None:
        nvme.submit(nvme.admin, ASYNC_EVENT)
        nvme.write(DOORBELLS + 8 * 9, 1)
        assert nvme.wait(nvme.admin).dword0 == 0x01_00_00, "a doorbell of no queue"
        cid = nvme.submit(nvme.admin, ASYNC_EVENT)
        nvme.write(DOORBELLS + 8 * 9, 1)
        assert nvme.run_until_idle() == []
        log_page(nvme, 1, retain=True)
        nvme.write(DOORBELLS + 8 * 9, 1)
        assert nvme.run_until_idle() == []
        log_page(nvme, 2)
        nvme.write(DOORBELLS + 8 * 9, 1)
        assert nvme.run_until_idle() == []
        log_page(nvme, 1)
        nvme.write(DOORBELLS + 4, 4000)
        event = nvme.wait(nvme.admin)
        assert (event.cid, event.dword0) == (cid, 0x01_01_00), "a doorbell with an impossible value"

    def test_a_head_beyond_the_tail(self, nvme: Driver) -> None:
        queue = nvme.create_pair()
        assert nvme.run(queue, 0x00, nsid=1).status == 0
        nvme.submit(nvme.admin, ASYNC_EVENT)
        nvme.write(DOORBELLS + 8 * queue.number + 4, queue.head + 1)
        assert nvme.wait(nvme.admin).dword0 == 0x01_01_00
        for _ in range(2 * queue.size):
            assert nvme.run(queue, 0x00, nsid=1).status == 0

    def test_an_event_waits_for_a_request(self, nvme: Driver) -> None:
        for _ in range(100):
            nvme.write(DOORBELLS, 4000)
        cid = nvme.submit(nvme.admin, ASYNC_EVENT)
        event = nvme.wait(nvme.admin)
        assert (event.cid, event.dword0) == (cid, 0x01_01_00)

    def test_the_same_event_waits_once(self, nvme: Driver) -> None:
        for _ in range(3):
            nvme.write(DOORBELLS, 4000)
        cids = [nvme.submit(nvme.admin, ASYNC_EVENT) for _ in range(2)]
        assert nvme.wait(nvme.admin).cid == cids[0]
        log_page(nvme, 1)
        assert nvme.run_until_idle() == []

    def test_another_event_of_a_type_waits_until_the_log_page_was_read(self, nvme: Driver) -> None:
        nvme.write(DOORBELLS + 8 * 9, 1)
        nvme.write(DOORBELLS, 4000)
        cids = [nvme.submit(nvme.admin, ASYNC_EVENT) for _ in range(2)]
        event = nvme.wait(nvme.admin)
        assert (event.cid, event.dword0) == (cids[0], 0x01_00_00)
        assert nvme.run_until_idle() == []
        log_page(nvme, 1)
        event = nvme.wait(nvme.admin)
        assert (event.cid, event.dword0) == (cids[1], 0x01_01_00)

    def test_a_reset_forgets_requests(self, nvme: Driver) -> None:
        for _ in range(4):
            nvme.submit(nvme.admin, ASYNC_EVENT)
        nvme.disable()
        nvme.enable()
        for _ in range(4):
            nvme.submit(nvme.admin, ASYNC_EVENT)
        assert nvme.run_until_idle() == []


class TestAbort:
    def test_of_an_event_request(self, nvme: Driver) -> None:
        cids = [nvme.submit(nvme.admin, ASYNC_EVENT) for _ in range(2)]
        abort = nvme.submit(nvme.admin, ABORT, cdw10=cids[1] << 16)
        aborted, completion = nvme.wait(nvme.admin), nvme.wait(nvme.admin)
        assert (aborted.cid, aborted.status) == (cids[1], ABORT_REQUESTED)
        assert (completion.cid, completion.status, completion.dword0) == (abort, 0, 0)
        assert nvme.run(nvme.admin, ABORT, cdw10=cids[1] << 16).dword0 == 1

    @pytest.mark.parametrize("cdw10", [0, 1, 0xFFFFFFFF, 7 << 16 | 1])
    def test_of_what_is_not_there(self, nvme: Driver, cdw10: int) -> None:
        completion = nvme.run(nvme.admin, ABORT, cdw10=cdw10)
        assert (completion.status, completion.dword0) == (0, 1)

    def test_of_a_command_of_another_queue_that_has_the_number_of_an_event_request(
        self, nvme: Driver
    ) -> None:
        cid = nvme.submit(nvme.admin, ASYNC_EVENT)
        completion = nvme.run(nvme.admin, ABORT, cdw10=cid << 16 | 1)
        assert (completion.status, completion.dword0) == (0, 1)
        assert nvme.run_until_idle() == []
