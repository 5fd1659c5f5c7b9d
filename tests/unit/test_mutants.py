# SPDX-License-Identifier: GPL-2.0-or-later
"""The list of faults of tests.mutants, as far as this is quickly told."""

from __future__ import annotations

import pytest

from tests.mutants.__main__ import Fault, load
from tests.support.checkout import ROOT


def test_there_are_many_faults_and_the_tests_for_them() -> None:
    faults = load()
    assert sum(not fault.unseen for fault in faults) >= 100
    assert len(set(faults)) == len(faults)
    for module, tests in {(fault.file, fault.tests) for fault in faults}:
        assert tests.fast, module
        for name in (module, *tests.fast, *tests.slow):
            assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    ("text", "fault", "reason"),
    [
        ("def reply_frame(value: int)", "def reply_frame(value)", ""),
        ("def reply_frames", "pass", "the text is gone"),
        ("command_name(command)", "command", "the text stands there"),
        ("def reply_frame(value: int)", "def reply_frame(", "it is no Python"),
    ],
)
def test_a_fault_that_can_not_be_made_is_stale(text: str, fault: str, reason: str) -> None:
    staleness = Fault("common/mpqemu.py", text, fault).staleness()
    assert staleness.startswith(reason)
    assert bool(staleness) == bool(reason)
