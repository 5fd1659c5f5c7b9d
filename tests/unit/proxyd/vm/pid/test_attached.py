# SPDX-License-Identifier: GPL-2.0-or-later
"""What the log tells of the time for which a process was stopped."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.config import DeviceConfig
from common.journal import device_log
from common.messages import Event
from proxyd.vm.pid.attached import _Function
from proxyd.vm.pid.inject import Target


@pytest.mark.parametrize(("seconds", "is_long"), [(0.0005, False), (0.02, True)])
def test_a_long_stop_is_a_warning_of_its_own(
    seconds: float, is_long: bool, caplog: pytest.LogCaptureFixture
) -> None:
    device = DeviceConfig("edu0", None, 0x28, None, 10, None, {})
    target: Any = SimpleNamespace(pid=77, turn=threading.Lock(), detach=lambda _line: seconds)
    log = device_log("tests.attached", "edu0", 0x28)
    function = _Function(device, 10, "/nowhere", cast(Target, target), log, lambda _function: None)
    function._line = cast(Any, object())
    with caplog.at_level(logging.INFO):
        function.close(detach=True)
    told = [(record.levelname, vars(record)["event"], vars(record)["device"]) for record in caplog.records]
    expected = [("INFO", Event.VM_DETACHED, "edu0"), ("WARNING", Event.VM_STOOD_LONG, "edu0")]
    assert told == expected[: 1 + is_long]
