# SPDX-License-Identifier: GPL-2.0-or-later
"""What the embedded and the soft machine have in common."""
