# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemons of a VM answer to iohubctl, which trusts neither: it checks types, makes text printable, and
refuses numbers of more than 64 bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asyncvarlink import VarlinkErrorReply, VarlinkInterface, varlinksignature
from asyncvarlink.conversion import ConversionError

from common.amiss import one_line
from common.control import call
from common.errors import IohubError, PeerGone, ProtocolError, UntrustedError
from common.proxyd_interface import Proxyd
from common.remoted_interface import NotDrivable, Remoted, Stalled
from common.trust import Trust

__all__ = ["DAEMONS", "Answer", "ask"]

DAEMONS: dict[str, type[VarlinkInterface]] = {"remoted": Remoted, "proxyd": Proxyd}

Answer = dict[str, Any]
"""a reply's parameters, of the types that the interface gives them"""


def ask(directory: Path, daemon: str, trust: Trust, method: str, **parameters: object) -> Answer:
    """Calls a method of one of DAEMONS. Raises IohubError, which names the daemon.

    ``directory`` is the VM's runtime directory. The user to whom root has given it is trusted as well.
    """
    interface = DAEMONS[daemon]
    path = directory / f"{daemon}.varlink"
    try:
        answer = call(path, f"{interface.name}.{method}", trust.with_appointed(directory), **parameters)
        _check_types(interface, method, answer)
        return {name: _clean(value) for name, value in answer.items()}
    except PeerGone as error:
        if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
            raise PeerGone(f"{daemon} is not running: {error}") from error
        raise PeerGone(f"{daemon} does not answer: {error}") from error
    except UntrustedError as error:
        raise UntrustedError(f"{daemon} is not asked: {error}") from error
    except ProtocolError as error:
        raise ProtocolError(f"{daemon} gives an invalid answer: {error}") from error
    except VarlinkErrorReply as error:
        if error.name == Stalled.name:
            stall = error.paramstojson()
            what = f"{stall.get('device')}: {stall.get('reason')}"
            raise PeerGone(one_line(f"{daemon} does not answer: {what}")) from error
        raise IohubError(_explain(daemon, error)) from error


def _check_types(interface: type[VarlinkInterface], method: str, answer: Answer) -> None:
    signature = varlinksignature(getattr(interface, method))
    if signature is None:
        raise ValueError(f"{interface.name} has no method {method}")
    try:
        signature.return_type.fromjson(answer)
    except ConversionError as error:
        where = ".".join(map(str, error.location)) or method
        raise ProtocolError(
            one_line(f"{where}: {error.message}; is it of another version than iohubctl?")
        ) from error


def _clean(value: Any) -> Any:
    """The value with all text printable. Its types are checked already. Raises ProtocolError."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, int) and value.bit_length() > 64:
        raise ProtocolError(f"a number of {value.bit_length()} bits")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {one_line(name): _clean(item) for name, item in value.items()}
    return value


def _explain(daemon: str, error: VarlinkErrorReply) -> str:
    parameters = error.paramstojson()
    if error.name == NotDrivable.name:
        return one_line(
            f"function {parameters.get('device')} is of the model {parameters.get('model')}, which drives its "
            "line itself: only irq-line devices can be driven by hand"
        )
    try:
        text = json.dumps(parameters)
    except RecursionError:
        text = ""
    return one_line(f"{daemon} refuses: {error.name} {text}")
