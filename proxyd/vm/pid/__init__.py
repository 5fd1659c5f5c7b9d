# SPDX-License-Identifier: GPL-2.0-or-later
"""--vm pid:PID: any KVM process, through ptrace."""
