# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest images by their multiboot headers, as they should be and damaged."""

from __future__ import annotations

import struct

import pytest

from common.errors import UsageError
from proxyd.vm.embedded.multiboot import Image, parse_image

MAGIC, ADDRESSES = 0x1BADB002, 1 << 16
LOAD = 0x100000
CODE = bytes(range(64))


def header(
    position: int,
    *,
    magic: int = MAGIC,
    flags: int = ADDRESSES,
    load_end: int | None = None,
    memory_end: int = LOAD + 0x2000,
    entry: int = LOAD + 8,
) -> bytes:
    """One that is at ``position`` of the loaded part, followed by CODE, which ends that part."""
    checksum = -(magic + flags) & 0xFFFFFFFF
    end = LOAD + position + 32 + len(CODE) if load_end is None else load_end
    return struct.pack("<8I", magic, flags, checksum, LOAD + position, LOAD, end, memory_end, entry)


def parse(file: bytes) -> Image:
    return parse_image(file, "guest.bin")


@pytest.mark.parametrize(("before", "position"), [(0, 0), (0, 4), (16, 0), (4096, 4), (8192 - 32, 0)])
def test_the_image_is_what_the_header_says(before: int, position: int) -> None:
    part = b"\x90" * position + header(position) + CODE
    image = parse(b"\x00" * before + part + b"symbols")
    assert image == Image(part, LOAD, LOAD + 0x2000, LOAD + 8)


def test_what_only_looks_like_a_header_is_passed_over() -> None:
    part = header(32) + CODE
    image = parse(struct.pack("<3I", MAGIC, ADDRESSES, 0).ljust(32, b"\0") + part)
    assert image.data.endswith(part)


BAD = {
    "empty": b"",
    "no header": b"\0" * 10_000,
    "cut within the header": header(0)[:31],
    "header beyond the first 8 KiB": b"\0" * 8192 + header(0) + CODE,
    "header out of line": b"\0\0" + header(0) + CODE,
    "no addresses in it": header(0, flags=0) + CODE,
    "loaded from before the file": header(64) + CODE,
    "cut within what is to be loaded": header(0) + CODE[:-1],
    "ends before it begins": header(0, load_end=LOAD - 4) + CODE,
    "memory ends within the image": header(0, memory_end=LOAD + 16) + CODE,
    "entry below": header(0, entry=LOAD - 1) + CODE,
    "entry beyond": header(0, entry=LOAD + 0x2000) + CODE,
}


@pytest.mark.parametrize("file", BAD.values(), ids=BAD)
def test_a_damaged_image_is_refused(file: bytes) -> None:
    with pytest.raises(UsageError, match=r"guest\.bin is not a multiboot image with load addresses"):
        parse(file)
