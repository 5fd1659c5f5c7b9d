# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM's side: gives each function's interrupt line to KVM and forwards config and BAR accesses."""
