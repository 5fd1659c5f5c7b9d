# SPDX-License-Identifier: GPL-2.0-or-later
"""VERSION: what client and server tell of themselves before anything else."""

from __future__ import annotations

import errno
import json

from common.vfiouser import MAX_DATA, MAX_DMA_MAPS, MAX_FDS, VERSION, RefusedError

__all__ = ["reply_to_version"]

_CAPABILITIES = {
    "max_msg_fds": MAX_FDS,
    "max_data_xfer_size": MAX_DATA,
    "max_dma_maps": MAX_DMA_MAPS,
    "pgsizes": 4096,
}
_REPLY = (
    VERSION.pack(0, 0) + json.dumps({"capabilities": _CAPABILITIES}, separators=(",", ":")).encode() + b"\0"
)


def reply_to_version(payload: memoryview) -> bytes:
    """The payload of the reply to a VERSION request: version 0.0, and this side's limits.

    What the client tells has no effect here: no reply brings more than one fd, and none is longer than the client
    has asked for. Raises RefusedError for another major version, and for JSON that is not valid.
    """
    major, minor = VERSION.unpack_from(payload)
    if major != 0:
        raise RefusedError(errno.EINVAL, f"version {major}.{minor} instead of 0.0")
    text = bytes(payload[VERSION.size :])
    if text:
        if text.find(0) != len(text) - 1:
            raise RefusedError(errno.EINVAL, "the JSON does not end with its only null byte")
        try:
            found = json.loads(text[:-1].decode() or "{}")
        except (ValueError, RecursionError) as error:
            raise RefusedError(errno.EINVAL, "not valid JSON") from error
        if not isinstance(found, dict) or not isinstance(found.get("capabilities", {}), dict):
            raise RefusedError(errno.EINVAL, "the JSON is not an object with an object of capabilities")
    return _REPLY
