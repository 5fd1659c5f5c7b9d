# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted with a window of polling that never changes: ``python -m tests.bench.fixedloop OPTIONS``."""

from __future__ import annotations

import sys

from common.loop import Loop
from common.polling import Events
from remoted import main as remoted

__all__ = ["FixedLoop"]


class FixedLoop(Loop):
    """Polls for the whole limit before each sleep."""

    def __init__(self, poll_limit: float) -> None:
        super().__init__(poll_limit=poll_limit)
        wait = self.polling.wait

        def wait_at_limit(timeout: float | None) -> Events:
            self.polling.window = poll_limit
            return wait(timeout)

        self._wait = wait_at_limit


if __name__ == "__main__":
    vars(remoted)["Loop"] = FixedLoop
    sys.exit(remoted.main())
