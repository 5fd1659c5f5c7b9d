/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The line console on COM1; its format is described in main.c. */
#ifndef GUEST_CONSOLE_H
#define GUEST_CONSOLE_H

#include "types.h"

#define CONSOLE_LINE_MAX	128

enum console_input {
	CONSOLE_LINE,
	CONSOLE_TOO_LONG,
	CONSOLE_NOT_TEXT,
};

void console_init(void);
void console_interrupt(void);
enum console_input console_read_line(char line[CONSOLE_LINE_MAX]);
void console_drain(void);

void put_char(char c);
void put_string(const char *s);
void put_decimal(u32 value);
void put_hex(u32 value, unsigned int min_digits);

void record(const char *kind);
void field_string(const char *key, const char *value);
void field_decimal(const char *key, u32 value);
void field_hex(const char *key, u32 value);
void field_devfn(const char *key, u8 devfn);
void field_id(const char *key, u16 vendor, u16 device);
void end_line(void);

#endif
