# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM: its header, its ioctls, its interrupt controllers."""
