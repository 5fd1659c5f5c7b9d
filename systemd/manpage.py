# SPDX-License-Identifier: GPL-2.0-or-later
r"""Prints a manual page in mdoc(7): ``manpage.py iohubctl.1`` fills in what the program's parser knows.

The text in ``man/`` has a line ``.\" @OPTIONS@`` where the options go, or ``.\" @COMMANDS@`` for the subcommands
with theirs. A page without such a line stays as it is.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from common.config import proxyd_parser, remoted_parser
from common.ctl.main import make_ctl_parser

_WIDTH = 78


def main() -> None:
    """Prints it to stdout."""
    _, name = sys.argv
    program = name.rpartition(".")[0]
    for line in (Path(__file__).parent / "man" / name).read_text().splitlines():
        if line == r".\" @OPTIONS@":
            parser = remoted_parser() if program == "iohub-remoted" else proxyd_parser()
            print("\n".join(_options(parser)))
        elif line == r".\" @COMMANDS@":
            print("\n".join(_commands(make_ctl_parser(["demo"]))))
        else:
            print(line)


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        for name, command in action.choices.items():
            yield f".Ss {name}"
            yield from _text(command.description or "")
            yield from _options(command)
            if command.epilog:
                yield ".Bd -literal"
                yield from (_escape(line) for line in command.epilog.splitlines())
                yield ".Ed"


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield ".Bl -tag -width Ds"
    for action in parser._actions:
        metavar = action.metavar if isinstance(action.metavar, str) else None
        if metavar is None and action.choices is not None:
            metavar = "|".join(map(str, action.choices))
        argument = f" Ar {_breakable(metavar)}" if metavar and action.nargs != 0 else ""
        if action.option_strings:
            names = " , ".join(f"Fl {_escape(name[1:])}" for name in action.option_strings)
            yield f".It {names}{argument}"
        else:
            yield f".It{argument}"
        yield from _text(parser._get_formatter()._expand_help(action))
    yield ".El"


def _text(text: str) -> Iterator[str]:
    """Each sentence on a line of its own, as mdoc wants it."""
    for sentence in text.replace(". ", ".\n").splitlines():
        for line in textwrap.wrap(sentence, _WIDTH, break_long_words=False, break_on_hyphens=False):
            yield _escape(line)


def _breakable(word: str) -> str:
    """Lets a line end behind each comma of a long word."""
    return _escape(word).replace(",", r",\:")


def _escape(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    main()
