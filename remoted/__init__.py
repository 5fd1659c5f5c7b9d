# SPDX-License-Identifier: GPL-2.0-or-later
"""The device side: serves PCI functions to clients and holds the level of their interrupt lines."""
