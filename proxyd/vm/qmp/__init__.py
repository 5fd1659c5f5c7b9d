# SPDX-License-Identifier: GPL-2.0-or-later
"""--vm qmp:SOCKET: a running QEMU, through its monitor."""
