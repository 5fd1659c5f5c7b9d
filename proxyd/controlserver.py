# SPDX-License-Identifier: GPL-2.0-or-later
"""proxyd's control socket, whatever the way to the VM."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from common.config import VmConfig
from common.controlsocket import ControlServer
from common.loop import Loop
from proxyd.vmstate import VmState

if TYPE_CHECKING:
    from proxyd.control import ProxydService

__all__ = ["answer_calls"]


def answer_calls(loop: Loop, config: VmConfig, state: VmState, log: logging.Logger) -> ControlServer:
    """Answers calls with the state, which is read at each. Raises UsageError, as ControlServer."""

    def make_interface() -> ProxydService:
        from proxyd.control import ProxydService  # with the first call

        return ProxydService(state)

    return ControlServer(loop, config.own_socket_path("proxyd.varlink"), make_interface, log)
