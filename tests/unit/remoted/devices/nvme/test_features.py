# SPDX-License-Identifier: GPL-2.0-or-later
"""Set Features and Get Features of the nvme model, by NVM Express 1.4, 5.21 and 5.13."""

from __future__ import annotations

import pytest

from tests.support.nvmeadmin import (
    ALL,
    DO_NOT_RETRY,
    GET_FEATURES,
    INVALID_FIELD,
    INVALID_NAMESPACE,
    MORE,
    NOT_NAMESPACE_SPECIFIC,
    NOT_SAVEABLE,
    SEQUENCE_ERROR,
    SET_FEATURES,
    get_feature,
    set_feature,
)
from tests.support.nvmedriver import Driver


class TestFeatures:
    DEFAULTS = ((1, 7), (2, 0), (4, 343), (5, 0), (6, 1), (7, 3 << 16 | 3), (8, 0), (9, 0), (10, 0), (11, 0))

    @pytest.mark.parametrize(("feature", "value"), DEFAULTS)
    def test_defaults(self, nvme: Driver, feature: int, value: int) -> None:
        assert [get_feature(nvme, feature, select=select, nsid=ALL) for select in (0, 1, 2)] == [value] * 3

    @pytest.mark.parametrize(
        ("feature", "value"),
        [(1, 0x01020304), (4, 300), (5, 0x1234), (6, 0), (8, 0x1234), (9, 1 << 16 | 2), (10, 1), (11, 0xFF)],
    )
    def test_set_get_reset(self, nvme: Driver, feature: int, value: int) -> None:
        nsid = ALL if feature == 5 else 0
        cdw11 = value & 0xFFFF if feature == 9 else 0
        default = get_feature(nvme, feature, nsid=nsid, cdw11=cdw11)
        assert default != value
        assert set_feature(nvme, feature, value, nsid=nsid).status == 0
        assert get_feature(nvme, feature, nsid=nsid, cdw11=cdw11) == value
        assert get_feature(nvme, feature, nsid=nsid, cdw11=cdw11, select=1) == default
        nvme.disable()
        nvme.enable()
        assert get_feature(nvme, feature, nsid=nsid, cdw11=cdw11) == default

    @pytest.mark.parametrize(
        ("feature", "kept"), [(1, 0xFFFE_FF07), (5, 0xFFFF), (6, 1), (8, 0xFFFF), (10, 1), (11, 0xFF)]
    )
    def test_reserved_bits_are_not_kept(self, nvme: Driver, feature: int, kept: int) -> None:
        nsid = ALL if feature == 5 else 0
        assert set_feature(nvme, feature, 0xFFFE_FFFF, nsid=nsid).status == 0
        assert get_feature(nvme, feature, nsid=nsid) == kept

    def test_each_vector_has_a_configuration(self, nvme: Driver) -> None:
        def not_coalesced() -> list[int]:
            return [get_feature(nvme, 9, cdw11=vector) >> 16 for vector in range(5)]

        for vector in (2, 4):
            assert set_feature(nvme, 9, 1 << 16 | vector).status == 0
        assert not_coalesced() == [0, 0, 1, 0, 1]
        assert set_feature(nvme, 9, 2).status == 0
        assert not_coalesced() == [0, 0, 0, 0, 1]

    def test_supported_capabilities(self, nvme: Driver) -> None:
        assert get_feature(nvme, 6, select=3) == 0b100
        assert get_feature(nvme, 5, select=3, nsid=1) == 0b110

    @pytest.mark.parametrize(
        ("cdw10", "cdw11", "nsid", "status"),
        [
            (0x00, 0, 0, INVALID_FIELD),
            (0x03, 0, 0, INVALID_FIELD),
            (0x0C, 0, 0, INVALID_FIELD),
            (0xFF, 0, 0, INVALID_FIELD),
            (1 << 31 | 1, 0, 0, NOT_SAVEABLE),
            (0x01, 0, 1, NOT_NAMESPACE_SPECIFIC),
            (0x01, 0, 2, INVALID_NAMESPACE),
            (0x02, 1, 0, INVALID_FIELD),
            (0x04, 0x2 << 20, 0, INVALID_FIELD),
            (0x04, 0x1 << 16, 0, INVALID_FIELD),
            (0x05, 0, 0, INVALID_NAMESPACE),
            (0x05, 1 << 16, 1, INVALID_FIELD),
            (0x07, 0xFFFF, 0, INVALID_FIELD),
            (0x07, 0xFFFF << 16, 0, INVALID_FIELD),
            (0x09, 5, 0, INVALID_FIELD),
        ],
    )
    def test_set_is_refused(self, nvme: Driver, cdw10: int, cdw11: int, nsid: int, status: int) -> None:
        completion = nvme.run(nvme.admin, SET_FEATURES, cdw10=cdw10, cdw11=cdw11, nsid=nsid)
        assert (completion.status, completion.flags) == (status, MORE | DO_NOT_RETRY)

    @pytest.mark.parametrize(
        ("cdw10", "cdw11", "nsid", "status"),
        [
            (0x0C, 0, 0, INVALID_FIELD),
            (4 << 8 | 1, 0, 0, INVALID_FIELD),
            (0x05, 0, 0, INVALID_NAMESPACE),
            (0x09, 5, 0, INVALID_FIELD),
            (0x04, 0xF << 16, 0, INVALID_FIELD),
        ],
    )
    def test_get_is_refused(self, nvme: Driver, cdw10: int, cdw11: int, nsid: int, status: int) -> None:
        completion = nvme.run(nvme.admin, GET_FEATURES, cdw10=cdw10, cdw11=cdw11, nsid=nsid)
        assert completion.status == status

    def test_the_number_of_queues_is_set_before_there_are_any(self, nvme: Driver) -> None:
        nvme.create_pair()
        assert set_feature(nvme, 7, 1 << 16 | 1).status == SEQUENCE_ERROR
