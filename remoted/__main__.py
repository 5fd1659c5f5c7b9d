# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m remoted`` is iohub-remoted."""

import sys

from remoted.main import main

sys.exit(main())
