# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices that come with remoted."""
