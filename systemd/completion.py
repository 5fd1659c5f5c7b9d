# SPDX-License-Identifier: GPL-2.0-or-later
"""Prints a program's completion for a shell, made of its parser by shtab: ``completion.py bash iohubctl``.

It runs when iohub is installed; the programs themselves need no shtab.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import shtab

from common.config import proxyd_parser, remoted_parser
from common.ctl.main import make_ctl_parser

_PREAMBLE = {
    "bash": """\
_iohub_vms() {
  local directory
  for directory in /run/iohub "${XDG_RUNTIME_DIR:-/run}/iohub"; do
    compgen -W "$(command ls "$directory" 2>/dev/null)" -- "$1"
  done
}
_iohub_users() {
  compgen -u -- "$1"
}
""",
    "zsh": """\
_iohub_vms() {
  compadd -- /run/iohub/*(N:t) ${XDG_RUNTIME_DIR:-/run}/iohub/*(N:t)
}
""",
}
_VM = {"bash": "_iohub_vms", "zsh": "_iohub_vms"}
_USER = {"bash": "_iohub_users", "zsh": "_users"}
_BY_METAVAR = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY, "VM": _VM, "USER": _USER}


def main() -> None:
    """Prints it to stdout."""
    _, shell, program = sys.argv
    parser = _parser(program)
    for action in _actions(parser):
        if isinstance(action.metavar, str) and action.metavar in _BY_METAVAR:
            vars(action)["complete"] = _BY_METAVAR[action.metavar]
    print(shtab.complete(parser, shell=shell, preamble=_PREAMBLE[shell]), end="")


def _parser(program: str) -> argparse.ArgumentParser:
    if program == "iohubctl":
        return make_ctl_parser(["demo"])
    return remoted_parser() if program == "iohub-remoted" else proxyd_parser()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action


if __name__ == "__main__":
    main()
