# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m proxyd`` is iohub-proxyd."""

import sys

from qemu_iohub import iohub_proxyd

sys.exit(iohub_proxyd())
