# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m remoted`` is iohub-remoted."""

import sys

from qemu_iohub import iohub_remoted

sys.exit(iohub_remoted())
