# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether polling hurts where it can't help: on one CPU, and while other processes want every CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.bench.candidates import Candidate
from tests.bench.exchanges import Plan, Series, run_exchanges

__all__ = ["run_busy"]

_HOG = [sys.executable, "-c", "while True: pass"]


def run_busy(
    candidates: Sequence[Candidate], plan: Plan, directory: Path
) -> dict[str, dict[str, dict[str, Series]]]:
    """By situation, exchange and candidate."""
    cpus = sorted(os.sched_getaffinity(0))
    situations = {"one CPU for both ends": (cpus[0], 0)}
    if len(cpus) > 1:
        situations["own core each, a busy process for each CPU"] = (cpus[1], len(cpus))
    found = {}
    for name, (remote_cpu, hogs) in situations.items():
        with ExitStack() as stack:
            for _ in range(hogs):
                process = stack.enter_context(subprocess.Popen(_HOG))
                stack.callback(process.kill)
            found[name] = run_exchanges(candidates, plan, (cpus[0], remote_cpu), directory)
    return found
