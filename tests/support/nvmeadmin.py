# SPDX-License-Identifier: GPL-2.0-or-later
"""Admin commands of NVM Express 1.4, as a host sends them, and the status codes that may come."""

from __future__ import annotations

from tests.support.nvmedriver import PAGE, Completion, Driver

DELETE_SQ, CREATE_SQ, GET_LOG, DELETE_CQ, CREATE_CQ, IDENTIFY = 0x00, 0x01, 0x02, 0x04, 0x05, 0x06
ABORT, SET_FEATURES, GET_FEATURES, ASYNC_EVENT = 0x08, 0x09, 0x0A, 0x0C
INVALID_OPCODE, INVALID_FIELD, INVALID_NAMESPACE, SEQUENCE_ERROR = 0x001, 0x002, 0x00B, 0x00C
ABORT_REQUESTED, PRP_OFFSET_INVALID, DATA_TRANSFER_ERROR = 0x007, 0x013, 0x004
CQ_INVALID, INVALID_QUEUE_ID, INVALID_QUEUE_SIZE, TOO_MANY_EVENTS = 0x100, 0x101, 0x102, 0x105
INVALID_VECTOR, INVALID_LOG_PAGE, INVALID_QUEUE_DELETION = 0x108, 0x109, 0x10C
NOT_SAVEABLE, NOT_NAMESPACE_SPECIFIC = 0x10D, 0x10F
MORE, DO_NOT_RETRY = 0x2000, 0x4000
ALL = 0xFFFFFFFF


def identify(nvme: Driver, cns: int, nsid: int = 0) -> bytes:
    """What Identify gives for a CNS value (5.15)."""
    buffer = nvme.allocate()
    assert nvme.run(nvme.admin, IDENTIFY, nsid=nsid, prp1=buffer, cdw10=cns).status == 0
    return nvme.load(buffer, PAGE)


def log_page(nvme: Driver, page: int, size: int = 512, offset: int = 0, *, retain: bool = False) -> bytes:
    """``size`` bytes of a log page (5.14). With ``retain`` the event that it is about counts as unread."""
    buffer = nvme.allocate(size)
    cdw10 = (size // 4 - 1) << 16 | retain << 15 | page
    assert nvme.run(nvme.admin, GET_LOG, nsid=ALL, prp1=buffer, cdw10=cdw10, cdw12=offset).status == 0
    return nvme.load(buffer, size)


def get_feature(nvme: Driver, feature: int, *, select: int = 0, cdw11: int = 0, nsid: int = 0) -> int:
    """Dword 0 of a Get Features (5.13) that must succeed."""
    completion = nvme.run(nvme.admin, GET_FEATURES, cdw10=select << 8 | feature, cdw11=cdw11, nsid=nsid)
    assert completion.status == 0
    return completion.dword0


def set_feature(nvme: Driver, feature: int, value: int, *, nsid: int = 0) -> Completion:
    """A Set Features (5.21), which may fail."""
    return nvme.run(nvme.admin, SET_FEATURES, cdw10=feature, cdw11=value, nsid=nsid)
