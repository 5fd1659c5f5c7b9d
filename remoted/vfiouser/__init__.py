# SPDX-License-Identifier: GPL-2.0-or-later
"""The server of vfio-user: link, session, interrupts."""
