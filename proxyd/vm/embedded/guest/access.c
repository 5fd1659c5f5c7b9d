/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Single accesses to ports, memory and config space, and the bus listing. */
#include "commands.h"
#include "console.h"
#include "io.h"

static const char bad_number[] = "bad number";
static const char bad_width[] = "width is 8, 16 or 32";
static const char bad_address[] = "bad address, SLOT.FN is meant";

static void ok_value(u32 value)
{
	put_string("ok");
	field_hex("value", value);
}

static bool fits(u32 value, u8 bytes)
{
	return bytes == 4 || !(value >> (8 * bytes));
}

const char *command_in(u32 argc, char **argv)
{
	u32 port;
	u8 bytes;

	(void)argc;
	if (!parse_width(argv[1], &bytes))
		return bad_width;
	if (!parse_number(argv[2], &port) || port > 0xffff)
		return bad_number;
	ok_value(in(port, bytes));
	return NULL;
}

const char *command_out(u32 argc, char **argv)
{
	u32 port, value;
	u8 bytes;

	(void)argc;
	if (!parse_width(argv[1], &bytes))
		return bad_width;
	if (!parse_number(argv[2], &port) || port > 0xffff || !parse_number(argv[3], &value) || !fits(value, bytes))
		return bad_number;
	out(port, bytes, value);
	put_string("ok");
	return NULL;
}

const char *command_read(u32 argc, char **argv)
{
	u32 address;
	u8 bytes;

	(void)argc;
	if (!parse_width(argv[1], &bytes))
		return bad_width;
	if (!parse_number(argv[2], &address))
		return bad_number;
	ok_value(bytes == 1 ? readb(address) : bytes == 2 ? readw(address) : readl(address));
	return NULL;
}

const char *command_write(u32 argc, char **argv)
{
	u32 address, value;
	u8 bytes;

	(void)argc;
	if (!parse_width(argv[1], &bytes))
		return bad_width;
	if (!parse_number(argv[2], &address) || !parse_number(argv[3], &value) || !fits(value, bytes))
		return bad_number;
	if (bytes == 1)
		writeb(address, value);
	else if (bytes == 2)
		writew(address, value);
	else
		writel(address, value);
	put_string("ok");
	return NULL;
}

/* config read WIDTH ADDR OFFSET, config write WIDTH ADDR OFFSET VALUE */
const char *command_config(u32 argc, char **argv)
{
	bool write = same(argv[1], "write");
	u32 offset, value;
	u8 devfn, bytes;

	if (!write && !same(argv[1], "read"))
		return "read or write";
	if (argc != (write ? 6 : 5))
		return "wrong number of arguments";
	if (!parse_width(argv[2], &bytes))
		return bad_width;
	if (!parse_devfn(argv[3], &devfn))
		return bad_address;
	if (!parse_number(argv[4], &offset) || offset > 0xff)
		return bad_number;
	if ((offset & 3) + bytes > 4)
		return "the access crosses a doubleword";
	if (!write) {
		ok_value(config_read(devfn, offset, bytes));
		return NULL;
	}
	if (!parse_number(argv[5], &value) || !fits(value, bytes))
		return bad_number;
	config_write(devfn, offset, bytes, value);
	put_string("ok");
	return NULL;
}

static void list_function(u8 devfn)
{
	u32 class = config_read(devfn, PCI_CLASS_REVISION, 4);

	record("pci");
	field_devfn("addr", devfn);
	field_id("id", config_read(devfn, PCI_VENDOR_ID, 2), config_read(devfn, PCI_DEVICE_ID, 2));
	field_hex("class", class >> 8);
	field_hex("revision", class & 0xff);
	field_decimal("pin", config_read(devfn, PCI_INTERRUPT_PIN, 1));
	field_decimal("line", config_read(devfn, PCI_INTERRUPT_LINE, 1));
	end_line();
}

const char *command_lspci(u32 argc, char **argv)
{
	u32 count = 0;
	int devfn;

	(void)argc;
	(void)argv;
	for (devfn = pci_next(-1); devfn >= 0; devfn = pci_next(devfn)) {
		list_function(devfn);
		count++;
	}
	put_string("ok");
	field_decimal("count", count);
	return NULL;
}
