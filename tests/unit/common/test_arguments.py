# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon's command line: what is given and what is refused, beside argparse with the same options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.arguments import Argument, Given, parse_arguments
from common.errors import UsageError
from common.options import PROXYD, REMOTED, Role
from common.parser import make_parser

ARGUMENTS = (
    Argument("--name", "VM", "a value"),
    Argument("--device", "ID", "values", is_repeatable=True),
    Argument("--verbose", "", "a switch", short="-v"),
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--name", "a"], {"--name": ["a"]}),
        (["--name=a"], {"--name": ["a"]}),
        (["--name="], {"--name": [""]}),
        (["--name", ""], {"--name": [""]}),
        (["--name=-a=b"], {"--name": ["-a=b"]}),
        (["--name", "a=b"], {"--name": ["a=b"]}),
        (["--device", "a", "-v", "--device=b"], {"--device": ["a", "b"], "--verbose": [""]}),
        (["--verbose"], {"--verbose": [""]}),
    ],
)
def test_what_is_given(words: list[str], expected: Given) -> None:
    assert parse_arguments(ARGUMENTS, words) == expected


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--nam", "a"], "unknown option '--nam'"),
        (["--names=a"], "unknown option '--names=a'"),
        (["-x"], "unknown option '-x'"),
        (["--"], "unknown option '--'"),
        (["-v", "a\n"], r"unknown argument 'a\n'"),
        ([""], "unknown argument ''"),
        (["=a"], "unknown argument '=a'"),
        (["--verbose=on"], "--verbose: takes no value"),
        (["-v="], "-v: takes no value"),
        (["--name"], "--name: needs a value; one that begins with '-' as --name=VALUE"),
        (["--name", "-v"], "--name: needs a value; one that begins with '-' as --name=VALUE"),
    ],
)
def test_what_is_refused(words: list[str], line: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_arguments(ARGUMENTS, words)
    assert str(raised.value) == line


WORDS = st.sampled_from(["--name", "--vm", "--device", "--verbose", "-v", "--json", "--unplug-on-exit"])
VALUES = st.sampled_from(["", "=", "=a", "=-v", "=a=b"])


@pytest.mark.parametrize("role", [REMOTED, PROXYD], ids=lambda role: str(role.program))
@given(words=st.lists(st.builds(str.__add__, WORDS, VALUES) | st.sampled_from(["a", "-x"])))
def test_the_help_describes_what_is_taken(role: Role, words: list[str]) -> None:
    """argparse, whose parser prints the help, takes and refuses the same, and gets the same of it."""
    try:
        expected = vars(make_parser(role).parse_args(words))
    except UsageError:
        with pytest.raises(UsageError):
            parse_arguments(role.arguments, words)
        return
    found = parse_arguments(role.arguments, words)
    for argument in role.arguments:
        values = found.get(argument.name)
        value: object = values if argument.is_repeatable else None if values is None else values[-1]
        if not argument.metavar:
            value = values is not None
        assert value == expected[argument.name[2:].replace("-", "_")], argument.name
