/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Parsing of a command line: words, numbers, addresses. */
#include "commands.h"
#include "pci.h"

/* The digit's value, or 16. */
static u32 digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	if (c >= 'A' && c <= 'F')
		return c - 'A' + 10;
	return 16;
}

/* Decimal, or hexadecimal behind 0x; 32 bits. */
bool parse_number(const char *text, u32 *value)
{
	u32 base = 10;
	u32 sum = 0;

	if (text[0] == '0' && (text[1] == 'x' || text[1] == 'X')) {
		base = 16;
		text += 2;
	}
	if (!*text)
		return false;
	for (; *text; text++) {
		u32 d = digit(*text);

		if (d >= base || sum > (0xffffffff - d) / base)
			return false;
		sum = sum * base + d;
	}
	*value = sum;
	return true;
}

/* SLOT.FN, the slot in two hexadecimal digits. */
bool parse_devfn(const char *text, u8 *devfn)
{
	u32 slot, fn;

	if (digit(text[0]) > 15 || digit(text[1]) > 15 || text[2] != '.' || digit(text[3]) > 7 || text[4])
		return false;
	slot = digit(text[0]) << 4 | digit(text[1]);
	fn = digit(text[3]);
	if (slot > 31)
		return false;
	*devfn = PCI_DEVFN(slot, fn);
	return true;
}

/* 8, 16 or 32 bits. */
bool parse_width(const char *text, u8 *bytes)
{
	u32 bits;

	if (!parse_number(text, &bits) || (bits != 8 && bits != 16 && bits != 32))
		return false;
	*bytes = bits / 8;
	return true;
}

bool same(const char *a, const char *b)
{
	while (*a && *a == *b) {
		a++;
		b++;
	}
	return *a == *b;
}

/* Cuts the line at its blanks; more words than fit are counted, not kept. */
u32 split(char *line, char *argv[ARGUMENT_MAX])
{
	u32 argc = 0;

	for (;;) {
		while (*line == ' ')
			*line++ = '\0';
		if (!*line)
			return argc;
		if (argc < ARGUMENT_MAX)
			argv[argc] = line;
		argc++;
		while (*line && *line != ' ')
			line++;
	}
}
