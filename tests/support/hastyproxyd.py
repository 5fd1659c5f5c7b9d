# SPDX-License-Identifier: GPL-2.0-or-later
"""iohub-proxyd as it is, but that it waits less: for QEMU's monitor, and before it replaces a device again."""

from __future__ import annotations

import sys

from proxyd.main import main
from proxyd.vm.qmp import monitor, slot

if __name__ == "__main__":
    monitor._COMMAND_SECONDS = 1.0
    slot._LAST_RETRY_SECONDS = slot._LAST_REPLACEMENT_SECONDS = 0.1
    sys.exit(main())
