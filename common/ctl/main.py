# SPDX-License-Identifier: GPL-2.0-or-later
"""iohubctl: what both daemons of a VM say about its functions, and lines driven by hand."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.config import check_name
from common.ctl.vms import find_runtime_dir, runtime_roots
from common.errors import IohubError, UsageError
from common.options import Parser, add_version
from common.output import OutputError, complain
from common.trust import Trust, find_user

__all__ = ["main", "make_ctl_parser"]

PROGRAM = "iohubctl"

_ADDR_HELP = "one function: its address, such as 05.0, or its device's id"

_STATUS_EPILOG = """\
columns:
  LINE        high, low, or masked: the device asserts it, but the guest has set INTX_DISABLE
  PIN, GSI    the function's pin, and the GSI that it is routed to; - if proxyd doesn't know, as with QEMU
  RAISED      how often the line rose
  RESAMPLES   acknowledgements (EOI) that KVM reported; those of functions on the same GSI count here too
  RE-ASSERTS  irqfd writes for a line that was high already: still high at the EOI, or a new irqfd
  ACCESSES    messages of the client, most of them accesses of the guest
  QUIET       how long ACCESSES has not changed, at least: since a status first showed this number

below each, after the device's id, the model and:
  irqfd       set: there is an eventfd that asserts the line in the guest
  client      the process that connected to the device, and its pid; with QEMU that is the proxyd that handed the
              link over to it, and may have ended since
  link        the process that proxyd is connected to, and its pid; or down
  BARs        not decoded: the guest has placed and enabled none of them, so no driver reaches the device
  answers     for how long the guest waited for an answer in the last minute or two: mean and maximum
and if they are not 0: reconnects: how often a lost link was replaced; rejected: messages that broke the protocol;
refused: clients refused because another one was being served; errors: exceptions in the device's code; and the
model's own counters

What is amiss is written below the table, and is the list `amiss` in JSON.

exit status:
  0  all is well
  1  something is amiss, such as a daemon that doesn't answer
  2  bad usage, such as a directory that belongs to a VM of another name

examples:
  iohubctl status vm1
  iohubctl status vm1 05.0
  iohubctl status --json vm1 | jq '.remoted.functions[] | select(.rejected > 0)'
"""

_LIST_EPILOG = """\
columns:
  REMOTED    the pid of the VM's iohub-remoted; - if it gives no answer
  PROXYD     the pid of its iohub-proxyd
  FUNCTIONS  how many functions they have
  AMISS      how many things are amiss: `iohubctl status VM` lists them
  VM         its name, and where its runtime directory is if that is not the usual place

The VMs are those with a control socket below /run/iohub and $XDG_RUNTIME_DIR/iohub.

exit status:
  0  all is well
  1  something is amiss; a daemon that doesn't answer is amiss, too
  2  bad usage

example:
  iohubctl list
  iohubctl list --json | jq '.[] | select(.amiss != [])'
"""

_LOG_EPILOG = """\
The lines are those of iohub-remoted, iohub-proxyd, QEMU (the unit qemu@VM.service), systemd about these three,
and the kernel's KVM about the VM's process. With ADDR only those of the daemons about that device.

T is a time, such as 2026-01-31, '2026-01-31 12:00' or 2026-01-31T12:00:00Z, or how long ago: 90s, 10m, 2h, 1d.

--explain needs iohub's message catalog. It is installed with the programs, and `journalctl --update-catalog` has
the journal read it.

exit status:
  0    done
  1    the journal can't be read
  2    bad usage
  130  ended by Ctrl+C

examples:
  iohubctl log vm1 --since 10m --explain
  iohubctl log vm1 com1 --follow
  iohubctl log vm1 --json | jq 'select(.MESSAGE_ID != null) | .MESSAGE'
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
  SPURIOUS          runs of the handler that found no device asserting
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
        complain(PROGRAM, error)
        return 2
    except OutputError as error:
        complain(PROGRAM, error)
        return error.status
    except IohubError as error:
        complain(PROGRAM, error)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises UsageError."""
    parser = make_ctl_parser(argv)
    options, rest = parser.parse_known_args(argv)
    if rest and not rest[0].startswith("-") and getattr(options, "addr", "") is None:
        # argparse settles an optional argument with the first of them: in "VM --json ADDR" ADDR is left over.
        options.addr = rest.pop(0)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def make_ctl_parser(argv: Sequence[str]) -> Parser:
    """The options of iohubctl; those of its demo only where ``argv`` begins with ``demo``, as they take long."""
    parser = Parser(
        prog=PROGRAM,
        description="Shows the PCI functions that iohub-remoted and iohub-proxyd give to a VM, "
        "reads their log, and drives lines by hand.",
        epilog="examples:\n  iohubctl list\n  iohubctl status vm1\n  iohubctl log vm1 --since 10m --explain\n"
        "  iohubctl raise vm1 05.0\n  iohubctl demo\n\n"
        "`iohubctl COMMAND --help` explains each command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_version(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    status = _add_command(commands, "status", "show each function's line, counters and links", _STATUS_EPILOG)
    status.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: what each daemon answered, and what is amiss",
    )
    status.add_argument("addr", metavar="ADDR", nargs="?", help=_ADDR_HELP)
    status.set_defaults(run=_status)
    listing = _add_command(commands, "list", "show all VMs of this host", _LIST_EPILOG, has_vm=False)
    listing.add_argument("--json", action="store_true", help="print one JSON array: an object for each VM")
    listing.set_defaults(run=_list)
    log = _add_command(
        commands, "log", "show what the journal has about a VM", _LOG_EPILOG, has_runtime_dir=False
    )
    log.add_argument("--follow", action="store_true", help="go on with new lines until Ctrl+C")
    log.add_argument(
        "--since",
        metavar="T",
        help="begin at this time (default: the journal's first line; with --follow, now)",
    )
    log.add_argument(
        "--explain", action="store_true", help="print the catalog's explanation below each line that has one"
    )
    log.add_argument("--json", action="store_true", help="print one JSON object a line, with all fields")
    log.add_argument("addr", metavar="ADDR", nargs="?", help=_ADDR_HELP)
    log.set_defaults(run=_log)
    for name, method, what, already in (
        ("raise", "Raise", "assert", "A line that is high already stays high."),
        ("lower", "Lower", "deassert", "A line that is low already stays low."),
    ):
        epilog = _DRIVE_EPILOG.format(already)
        drive = _add_command(commands, name, f"{what} the INTx line of an irq-line device", epilog)
        drive.add_argument("addr", metavar="ADDR", help=_ADDR_HELP)
        drive.set_defaults(run=_drive, method=method)
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
    commands: argparse._SubParsersAction[Parser],
    name: str,
    summary: str,
    epilog: str,
    *,
    has_vm: bool = True,
    has_runtime_dir: bool = True,
) -> Parser:
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if has_vm and has_runtime_dir:
        command.add_argument(
            "--runtime-dir",
            metavar="DIR",
            help="where the VM's sockets are (default: /run/iohub/VM, or, "
            "first for users other than root, $XDG_RUNTIME_DIR/iohub/VM)",
        )
    if has_vm:
        command.add_argument("vm", metavar="VM", help="the VM's name")
    command.add_argument(
        "--allow-user",
        metavar="USER",
        action="append",
        default=[],
        help="another user, by name or number, whose daemons are trusted besides root's and your own; "
        "repeat for more",
    )
    return command


def _status(options: argparse.Namespace) -> int:
    from common.ctl.status import show_status

    return show_status(options.vm, _runtime_dir(options), _trust(options), options.addr, json=options.json)


def _list(options: argparse.Namespace) -> int:
    from common.ctl.list import show_list

    return show_list(runtime_roots(os.geteuid(), os.environ), _trust(options), json=options.json)


def _log(options: argparse.Namespace) -> int:
    from common.ctl.log import Query, parse_since, show_log

    since = None if options.since is None else parse_since(options.since, time.time())
    show_log(
        Query(check_name(options.vm), options.addr, since, options.follow, options.explain, options.json),
        _trust(options),
    )
    return 0


def _drive(options: argparse.Namespace) -> int:
    from common.ctl.status import drive

    drive(options.vm, _runtime_dir(options), _trust(options), options.method, options.addr)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from common.ctl.demo import run

    return run(options)


def _runtime_dir(options: argparse.Namespace) -> Path:
    if options.runtime_dir is not None:
        check_name(options.vm)
        return Path(options.runtime_dir)
    return find_runtime_dir(options.vm, os.geteuid(), os.environ)


def _trust(options: argparse.Namespace) -> Trust:
    return Trust(find_user(name) for name in options.allow_user)
