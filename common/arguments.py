# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon's command line: which options there are, and what was given.

To load argparse and make a parser takes a tenth of a start. common.parser does so, of the same options, for help.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from common.errors import UsageError

__all__ = ["Argument", "Given", "parse_arguments"]

Given = dict[str, list[str]]
"""the values of each option that was given, by its name with the dashes; a switch has empty ones"""


class Argument(NamedTuple):
    """One option."""

    name: str
    """``--name``"""
    metavar: str
    """what stands for its value in the help; empty for a switch"""
    help: str
    short: str = ""
    """``-n``, if it has such a name"""
    is_repeatable: bool = False
    """whether each value counts; otherwise the last one does"""


def parse_arguments(arguments: Iterable[Argument], words: Sequence[str]) -> Given:
    """What ``--name=VALUE``, ``--name VALUE`` and switches give. Raises UsageError for anything else."""
    known = {name: each for each in arguments for name in (each.name, each.short) if name}
    given: Given = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        argument = known.get(name)
        if argument is None:
            kind = "option" if word.startswith("-") else "argument"
            raise UsageError(f"unknown {kind} {word!r}")
        if equals and not argument.metavar:
            raise UsageError(f"{name}: takes no value")
        if argument.metavar and not equals:
            value = next(rest, "-")
            if value.startswith("-"):
                raise UsageError(f"{name}: needs a value; one that begins with '-' as {name}=VALUE")
        given.setdefault(argument.name, []).append(value)
    return given
