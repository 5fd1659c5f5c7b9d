# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m proxyd`` is iohub-proxyd."""

import sys

from proxyd.main import main

sys.exit(main())
