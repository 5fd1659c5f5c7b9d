# SPDX-License-Identifier: GPL-2.0-or-later
"""The words of a command line for the scripted guest: what guest/parse.c takes, and nothing else."""

from __future__ import annotations

import re

__all__ = ["CommandError", "parse_address", "parse_number", "parse_width"]

_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|[0-9]+", re.ASCII)
_ADDRESS = re.compile(r"([0-9a-fA-F]{2})\.([0-7])", re.ASCII)


class CommandError(Exception):
    """A command that failed; the text follows ``err``."""


def parse_number(word: str, most: int = 0xFFFFFFFF) -> int:
    """A number of at most ``most``, decimal or hexadecimal behind 0x. Raises CommandError."""
    if _NUMBER.fullmatch(word):
        value = int(word, 16 if word[1:2] in ("x", "X") else 10)
        if value <= most:
            return value
    raise CommandError("bad number")


def parse_width(word: str) -> int:
    """The bytes of a width of 8, 16 or 32 bits. Raises CommandError."""
    try:
        return {8: 1, 16: 2, 32: 4}[parse_number(word)]
    except (CommandError, KeyError):
        raise CommandError("width is 8, 16 or 32") from None


def parse_address(word: str) -> int:
    """The devfn of SLOT.FN, the slot in two hexadecimal digits. Raises CommandError."""
    match = _ADDRESS.fullmatch(word)
    if match is None or int(match[1], 16) > 31:
        raise CommandError("bad address, SLOT.FN is meant")
    return int(match[1], 16) << 3 | int(match[2])
