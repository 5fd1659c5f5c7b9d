# SPDX-License-Identifier: GPL-2.0-or-later
"""Which characters a name or a number consists of.

Every start checks some; to compile a regular expression for each would take longer than all of the checks.
"""

from __future__ import annotations

__all__ = ["DIGITS", "HEX_DIGITS", "LETTERS", "consists_of", "is_number"]

DIGITS = frozenset("0123456789")
HEX_DIGITS = DIGITS | frozenset("abcdefABCDEF")
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_MAX_DIGITS = 10
"""of 32 bits: process and user ids, fds"""


def consists_of(text: str, characters: frozenset[str], most: int) -> bool:
    """Whether a text has 1 to ``most`` characters, and only such ones."""
    return 1 <= len(text) <= most and characters.issuperset(text)


def is_number(text: str) -> bool:
    """Whether a text is a whole number without a sign, in 1 to 10 decimal digits."""
    return consists_of(text, DIGITS, _MAX_DIGITS)
