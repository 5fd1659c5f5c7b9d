/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a driver does with the one interrupt source that it uses of its device. */
#ifndef GUEST_DRIVERS_H
#define GUEST_DRIVERS_H

#include "types.h"

struct driver {
	const char *model;
	u16 vendor, device;
	/* Quiesces the device and leaves the cookie in a register. */
	void (*init)(u32 base);
	/* Whether the cookie is still there: false after a reset, and for all ones. */
	bool (*alive)(u32 base);
	/* One write that asserts INTx; the device must be quiet before. */
	void (*raise)(u32 base);
	/* If the device asserts INTx, acknowledges it and says true. */
	bool (*claim)(u32 base);
};

const struct driver *driver_find(u16 vendor, u16 device);

#endif
