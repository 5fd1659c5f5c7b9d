# SPDX-License-Identifier: GPL-2.0-or-later
"""iohubctl: what both daemons of a VM say about its functions, and lines driven by hand."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from varlink import VarlinkError

from common.config import check_name, default_runtime_dir
from common.control import call
from common.ctl.statustable import find_amiss, render
from common.errors import IohubError, PeerGone, ProtocolError, UsageError
from common.options import Parser, add_version
from common.pci import format_devfn, parse_devfn

__all__ = ["main"]

PROGRAM = "iohubctl"

_DAEMONS = {"remoted": "org.iohub.Remoted", "proxyd": "org.iohub.Proxyd"}

_ADDR_HELP = "one function: its address, such as 05.0, or its device's id"

_STATUS_EPILOG = """\
columns, what remoted counts first:
  LINE        high, low, or masked: the device asserts it, but the guest has set INTX_DISABLE
  RAISED      how often the line rose
  RESAMPLES   acknowledgements (EOI) that KVM reported; those of functions on the same GSI count here too
  RE-ASSERTS  irqfd writes for a line that was high already: still high at the EOI, or a new irqfd
  REJECTED    messages that broke the protocol
  REFUSED     clients turned away because another one was served
  IRQFD       set: there is an eventfd that asserts the line in the guest
  CLIENT      who connected to the device: its process and pid; for a QEMU that is the proxyd that has handed it
              the link, and that may have gone since
  PIN, GSI    proxyd: the function's pin, and where the guest has it routed to; - when proxyd doesn't know, as in
              a QEMU
  LINK        proxyd: the process and pid that it is connected to, or down
  RECONNECTS  proxyd: how often a lost link was replaced

A healthy function has a client, an irqfd, a link and, outside of QEMU, a GSI; what is amiss is written below,
and is the list `amiss` in JSON.

exit status:
  0  all is well
  1  something is amiss: it is written there; a daemon that doesn't answer is amiss, too
  2  bad usage, such as a directory that belongs to a VM of another name

examples:
  iohubctl status vm1
  iohubctl status vm1 05.0
  iohubctl status --json vm1 | jq '.remoted.functions[] | select(.rejected > 0)'
"""

_DRIVE_EPILOG = """\
Only the model irq-line has a line to drive by hand. {0}

exit status:
  0  done
  1  remoted doesn't answer, has no such function, or has one of another model there
  2  bad usage, such as a directory that belongs to a VM of another name

example:
  iohub-remoted --name vm1 --device irq-line,id=line0,addr=05.0 &
  iohubctl raise vm1 line0
  iohubctl status vm1 line0
  iohubctl lower vm1 line0
"""

_DEMO_EPILOG = """\
columns:
  RAISED, SERVED    the guest's counts: writes that raise, and runs of its interrupt handler that serve one
  RESAMPLES         acknowledgements (EOI) that reached remoted; those of functions on the same GSI count here too
  SPURIOUS          runs of the handler that found nobody asserting
  LOST              raises that the handler never saw
  RAISE TO HANDLER  from the write that raises to the handler's first instruction
  EOI TO RE-ASSERT  from the EOI of a line that is still high to its next interrupt

exit status:
  0  nothing was lost
  1  an interrupt was lost, a line is stuck, or a step went wrong
  2  bad usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns 0, 1 when something is amiss or refused, 2 for bad usage, 130 for Ctrl+C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = _parse(argv)
        status: int = options.run(options)
    except UsageError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except IohubError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises UsageError."""
    parser = _parser(argv)
    options, rest = parser.parse_known_args(argv)
    if rest and not rest[0].startswith("-") and getattr(options, "addr", "") is None:
        # argparse settles an optional argument with the first of them: in "VM --json ADDR" ADDR is left over.
        options.addr = rest.pop(0)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser(argv: Sequence[str]) -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Looks at the PCI functions that iohub-remoted and iohub-proxyd give to a VM, "
        "and drives lines by hand.",
        epilog="examples:\n  iohubctl status vm1\n  iohubctl raise vm1 05.0\n  iohubctl demo\n\n"
        "`iohubctl COMMAND --help` explains each command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_version(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    status = _add_command(commands, "status", "show each function's line, counters and links", _STATUS_EPILOG)
    status.add_argument(
        "--json", action="store_true", help="print one JSON object: what each daemon answered, and what is amiss"
    )
    status.add_argument("addr", metavar="ADDR", nargs="?", help=_ADDR_HELP)
    status.set_defaults(run=_status)
    for name, method, what, already in (
        ("raise", "Raise", "assert", "A line that is high already stays high."),
        ("lower", "Lower", "deassert", "A line that is low already stays low."),
    ):
        epilog = _DRIVE_EPILOG.format(already)
        drive = _add_command(commands, name, f"{what} the INTx line of an irq-line device", epilog)
        drive.add_argument("addr", metavar="ADDR", help=_ADDR_HELP)
        drive.set_defaults(run=_drive, method=f"{_DAEMONS['remoted']}.{method}")
    demo = commands.add_parser(
        "demo",
        help="start both daemons and a small guest, and count every interrupt",
        description="Starts both daemons and a small guest, and counts every interrupt.",
        epilog=_DEMO_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    demo.set_defaults(run=_demo)
    if argv and argv[0] == "demo":
        from common.ctl.demo import add_arguments

        add_arguments(demo)
    return parser


def _add_command(
    commands: argparse._SubParsersAction[Parser], name: str, summary: str, epilog: str
) -> Parser:
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument(
        "--runtime-dir",
        metavar="DIR",
        help="where the VM's sockets are (default: /run/iohub/VM, or "
        "$XDG_RUNTIME_DIR/iohub/VM for users other than root)",
    )
    command.add_argument("vm", metavar="VM", help="the VM's name")
    return command


def _status(options: argparse.Namespace) -> int:
    directory = _runtime_dir(options)
    answers: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for daemon, interface in _DAEMONS.items():
        try:
            answers[daemon] = _call(directory, daemon, f"{interface}.Status")
        except IohubError as error:
            errors[daemon] = str(error)
    with _explained(options.vm):
        for answer in answers.values():
            _check_vm(answer, options.vm, directory)
        if options.addr is not None and answers:
            _select(answers, options.addr, options.vm, errors)
        amiss = find_amiss(answers, errors)
        if options.json:
            views = {**dict.fromkeys(_DAEMONS), **answers}
            print(json.dumps({"vm": options.vm, **views, "errors": errors, "amiss": amiss}))
        elif not answers:
            raise PeerGone(f"VM {options.vm}: {'; '.join(errors.values())}")
        else:
            print(render(options.vm, answers, errors, amiss), end="")
    return 1 if amiss else 0


@contextmanager
def _explained(vm: str) -> Iterator[None]:
    """Turns what comes of an answer without what it should have into a ProtocolError."""
    try:
        yield
    except KeyError as error:
        raise ProtocolError(
            f"VM {vm}: no {error} in a daemon's answer; is it of another version than {PROGRAM}?"
        ) from error


def _check_vm(answer: dict[str, Any], vm: str, directory: Path) -> None:
    """Raises UsageError when it is another VM's daemon that has answered."""
    if answer["vm"] != vm:
        raise UsageError(f"{directory} belongs to VM {answer['vm']}")


def _select(answers: dict[str, Any], addr: str, vm: str, errors: dict[str, str]) -> None:
    """Leaves only the function of that address or id, which either daemon may know it by.

    Raises IohubError when nobody has it.
    """
    try:
        wanted = format_devfn(parse_devfn(addr))
    except UsageError:
        wanted = addr
    known = {(each["addr"], each["id"]) for answer in answers.values() for each in answer["functions"]}
    found = {name for address, name in known if wanted == address or addr == name}
    for answer in answers.values():
        answer["functions"] = [each for each in answer["functions"] if each["id"] in found]
    if not found:
        have = ", ".join(f"{address} ({name})" for address, name in sorted(known)) or "none"
        raise IohubError("; ".join((f"VM {vm}: no function {addr}, there is {have}", *errors.values())))


def _drive(options: argparse.Namespace) -> int:
    directory = _runtime_dir(options)
    try:
        answer = _call(directory, "remoted", f"{_DAEMONS['remoted']}.Status")
        with _explained(options.vm):
            _check_vm(answer, options.vm, directory)
            _select({"remoted": answer}, options.addr, options.vm, {})
        _call(directory, "remoted", options.method, device=options.addr)
    except PeerGone as error:
        raise PeerGone(f"VM {options.vm}: {error}") from error
    return 0


def _demo(options: argparse.Namespace) -> int:
    from common.ctl.demo import run

    return run(options)


def _runtime_dir(options: argparse.Namespace) -> Path:
    name = check_name(options.vm)
    if options.runtime_dir is not None:
        return Path(options.runtime_dir)
    return default_runtime_dir(name, os.geteuid(), os.environ)


def _call(directory: Path, daemon: str, method: str, **parameters: object) -> dict[str, Any]:
    """call() with errors that name the daemon. Raises IohubError."""
    try:
        return call(directory / f"{daemon}.varlink", method, **parameters)
    except PeerGone as error:
        if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
            raise PeerGone(f"{daemon} is not running: {error}") from error
        raise PeerGone(f"{daemon} does not answer: {error}") from error
    except VarlinkError as error:
        raise IohubError(_explain(daemon, error)) from error


def _explain(daemon: str, error: VarlinkError) -> str:
    name, parameters = str(error.error()), error.parameters() or {}
    if name == "org.iohub.Remoted.NotDrivable":
        return (
            f"function {parameters['device']} is of the model {parameters['model']}, which drives its line "
            "itself: only irq-line devices can be driven by hand"
        )
    return f"{daemon} refuses: {name} {json.dumps(parameters)}"
