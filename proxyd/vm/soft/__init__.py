# SPDX-License-Identifier: GPL-2.0-or-later
"""--vm soft: the same machine without KVM, and a scripted guest."""
