# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways to reach a VM."""
