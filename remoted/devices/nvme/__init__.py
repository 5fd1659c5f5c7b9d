# SPDX-License-Identifier: GPL-2.0-or-later
"""nvme: one NVM Express controller with one namespace, by the NVM Express Base Specification 1.4."""
