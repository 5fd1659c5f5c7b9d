# SPDX-License-Identifier: GPL-2.0-or-later
"""iohub-proxyd as it is, but for the patience that it has with QEMU's monitor: for tests of its end."""

from __future__ import annotations

import sys

from proxyd.main import main
from proxyd.vm import monitor

if __name__ == "__main__":
    monitor._COMMAND_SECONDS = 1.0
    sys.exit(main())
