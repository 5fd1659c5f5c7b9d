/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Finds and programs the functions that have a driver. */
#ifndef GUEST_SETUP_H
#define GUEST_SETUP_H

const char *functions_setup(void);

#endif
