# SPDX-License-Identifier: GPL-2.0-or-later
"""The PCI side of a VM: functions, their BARs, the host bridge, the links to remoted."""
