# SPDX-License-Identifier: GPL-2.0-or-later
"""Registers, opcodes, status codes and layouts of the NVM Express Base Specification, revision 1.4.

Each group names the section, or the figure's section, that it comes from.
"""

from __future__ import annotations

import struct
from enum import IntEnum


class Register(IntEnum):
    """Offsets of controller registers in BAR 0 (3.1)."""

    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30


DOORBELLS = 0x1000
"""where the doorbells begin: for each queue pair the tail of the submission queue, then the head of the completion
queue, 4 bytes each (3.1.24, 3.1.25; CAP.DSTRD is 0)"""

VERSION = 0x0001_0400

# CAP (3.1.1)
MAX_QUEUE_ENTRIES = 1024
CAP_CQR = 1 << 16
"""queues are contiguous"""
CAP_TO_SHIFT = 24
CAP_CSS_NVM = 1 << 37
CAP_MPSMAX_SHIFT = 52

# CC (3.1.5)
CC_EN = 1 << 0
CC_CSS_SHIFT = 4
CC_MPS_SHIFT = 7
CC_AMS_SHIFT = 11
CC_SHN_SHIFT = 14
CC_IOSQES_SHIFT = 16
CC_IOCQES_SHIFT = 20
CC_WRITABLE = 0x00FF_FFF1

# CSTS (3.1.6)
CSTS_RDY = 1 << 0
CSTS_CFS = 1 << 1
CSTS_SHST_OCCURRING = 1 << 2
CSTS_SHST_COMPLETE = 2 << 2
CSTS_SHST_MASK = 3 << 2

AQA_WRITABLE = 0x0FFF_0FFF
PAGE = 4096
"""the smallest memory page size, CAP.MPSMIN"""
MAX_PAGE_SHIFT = 4
"""CAP.MPSMAX: 64 KiB"""

SUBMISSION = struct.Struct("<BBHIQQQQ6I")
"""a submission queue entry (4.2): opcode, flags, command identifier, NSID, dwords 2 and 3, metadata pointer,
PRP 1, PRP 2, dwords 10 to 15"""
COMPLETION = struct.Struct("<IIHHHH")
"""a completion queue entry (4.6): dwords 0 and 1, SQ head, SQ identifier, command identifier, status and phase"""
FLAGS_FUSE = 0x03
FLAGS_PSDT = 0xC0

ALL_NAMESPACES = 0xFFFF_FFFF


class AdminOpcode(IntEnum):
    """Admin commands (5)."""

    DELETE_IO_SQ = 0x00
    CREATE_IO_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_IO_CQ = 0x04
    CREATE_IO_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT_REQUEST = 0x0C


class Opcode(IntEnum):
    """NVM commands (6)."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09


class IdentifyCns(IntEnum):
    """Which data structure Identify returns (5.15.1)."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    NAMESPACE_DESCRIPTORS = 0x03


class Feature(IntEnum):
    """Feature identifiers (5.21.1)."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR_CONFIGURATION = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENT_CONFIGURATION = 0x0B


class LogPage(IntEnum):
    """Log identifiers (5.14.1)."""

    ERRORS = 0x01
    SMART = 0x02
    FIRMWARE_SLOTS = 0x03
    COMMAND_EFFECTS = 0x05


class Status(IntEnum):
    """Status codes with their type in bits 8 to 10 (4.6.1)."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    ABORT_REQUESTED = 0x007
    INVALID_NAMESPACE = 0x00B
    COMMAND_SEQUENCE_ERROR = 0x00C
    PRP_OFFSET_INVALID = 0x013
    WRITE_PROTECTED = 0x020
    LBA_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    CQ_INVALID = 0x100
    INVALID_QUEUE_ID = 0x101
    INVALID_QUEUE_SIZE = 0x102
    EVENT_REQUEST_LIMIT_EXCEEDED = 0x105
    INVALID_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10F
    WRITE_FAULT = 0x280
    UNRECOVERED_READ_ERROR = 0x281


STATUS_MORE = 1 << 13
"""more is in the error log (4.6.1)"""
STATUS_DO_NOT_RETRY = 1 << 14

_MAY_SUCCEED_LATER = frozenset(
    (
        Status.INTERNAL_ERROR,
        Status.DATA_TRANSFER_ERROR,
        Status.ABORT_REQUESTED,
        Status.CAPACITY_EXCEEDED,
        Status.WRITE_FAULT,
        Status.UNRECOVERED_READ_ERROR,
    )
)


class CommandError(Exception):
    """Ends a command with a status."""

    def __init__(self, status: Status, location: int = 0xFFFF) -> None:
        """``location`` is the byte of the command that is at fault, for the error log (5.14.1.1)."""
        super().__init__(status.name)
        self.status = status
        self.location = location

    @property
    def field(self) -> int:
        """The status field of a completion (4.6.1): the code, and Do Not Retry where a retry can't succeed."""
        retry = 0 if self.status in _MAY_SUCCEED_LATER else STATUS_DO_NOT_RETRY
        return self.status | retry | STATUS_MORE
