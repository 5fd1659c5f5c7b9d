# SPDX-License-Identifier: GPL-2.0-or-later
"""The flags of splice(2) and tee(2) in the kernel's include/linux/splice.h, which Python has no names for."""

SPLICE_F_NONBLOCK = 0x02
