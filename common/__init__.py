# SPDX-License-Identifier: GPL-2.0-or-later
"""What both daemons say and share: the wire, links, eventfds, the loop, configuration, logging."""
