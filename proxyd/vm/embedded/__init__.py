# SPDX-License-Identifier: GPL-2.0-or-later
"""--vm embedded: a small guest that proxyd runs itself on KVM."""
