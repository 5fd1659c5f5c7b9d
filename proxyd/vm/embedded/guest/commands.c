/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The command table, and the commands that only set up and report. */
#include "commands.h"
#include "console.h"
#include "generic.h"
#include "io.h"
#include "irq.h"
#include "setup.h"

#define RESET_CONTROL		0xcf9	/* PIIX3 */
#define RESET_CONTROL_HARD	0x06

const char *named_function(const char *text, struct function **fn)
{
	u8 devfn;

	if (!parse_devfn(text, &devfn))
		return "bad address, SLOT.FN is meant";
	*fn = function_find(devfn);
	return *fn ? NULL : "no function with a driver at this address";
}

static void identify(const struct function *fn)
{
	record("function");
	field_devfn("addr", fn->devfn);
	field_id("id", fn->driver->vendor, fn->driver->device);
	field_string("model", fn->driver->model);
	field_decimal("gsi", fn->irq);
}

static const char *command_version(u32 argc, char **argv)
{
	(void)argc;
	(void)argv;
	put_string("ok");
	field_string("guest", "iohub-guest");
	field_decimal("version", 1);
	return NULL;
}

/* memoryN= or ioN= for each BAR that has an address. */
static void locate(const u32 bars[PCI_BAR_COUNT])
{
	char key[] = "memoryN";
	u32 i;

	for (i = 0; i < PCI_BAR_COUNT; i++) {
		if (!bars[i])
			continue;
		key[6] = '0' + i;
		if (bar_is_io(bars[i])) {
			key[4] = 'i';
			key[5] = 'o';
		} else {
			key[4] = 'r';
			key[5] = 'y';
		}
		field_hex(bar_is_io(bars[i]) ? key + 4 : key, bar_address(bars[i]));
	}
}

static const char *command_setup(u32 argc, char **argv)
{
	const char *error = functions_setup();
	u32 i;

	(void)argc;
	(void)argv;
	if (error)
		return error;
	for (i = 0; i < function_count; i++) {
		identify(&functions[i]);
		locate(functions[i].bars);
		end_line();
	}
	for (i = 0; i < generic_count; i++) {
		const struct generic *fn = &generics[i];

		record("device");
		field_devfn("addr", fn->devfn);
		field_id("id", config_read(fn->devfn, PCI_VENDOR_ID, 2), config_read(fn->devfn, PCI_DEVICE_ID, 2));
		if (fn->irq)
			field_decimal("gsi", fn->irq);
		locate(fn->bars);
		end_line();
	}
	put_string("ok");
	field_decimal("functions", function_count);
	field_decimal("devices", generic_count);
	return NULL;
}

static const char *command_stats(u32 argc, char **argv)
{
	u32 i;

	(void)argc;
	(void)argv;
	for (i = 0; i < function_count; i++) {
		const struct function *fn = &functions[i];

		identify(fn);
		field_decimal("raised", fn->raised);
		field_decimal("served", fn->served);
		field_decimal("lost", fn->lost);
		field_decimal("redone", fn->redone);
		field_decimal("eois", fn->eois);
		field_decimal("held", fn->held);
		field_decimal("reasserts", fn->reasserts);
		end_line();
	}
	for (i = 0; i < IRQ_COUNT; i++) {
		const struct irq_line *line = &irq_lines[i];

		if (!line->first && !line->entries)
			continue;
		record("irq");
		field_decimal("irq", i);
		field_decimal("entries", line->entries);
		field_decimal("eois", line->eois);
		field_decimal("spurious", line->spurious);
		field_decimal("orphaned", line->orphaned);
		field_decimal("stuck", line->stuck);
		end_line();
	}
	record("vectors");
	field_decimal("spurious7", spurious_master);
	field_decimal("spurious15", spurious_slave);
	end_line();
	put_string("ok");
	return NULL;
}

/* The reset may come at once, so the answer is sent completely before. */
static const char *command_reboot(u32 argc, char **argv)
{
	(void)argc;
	(void)argv;
	put_string("ok");
	end_line();
	console_drain();
	outb(RESET_CONTROL, RESET_CONTROL_HARD);
	cpu_stop();
}

static const char *command_help(u32 argc, char **argv);

static const struct command {
	const char *name;
	u32 min, max;	/* words, the name among them */
	const char *(*handler)(u32 argc, char **argv);
	const char *usage, *help;
} commands[] = {
	{ "help", 1, 1, command_help, "", "this list" },
	{ "version", 1, 1, command_version, "", "the guest's name and version" },
	{ "lspci", 1, 1, command_lspci, "", "the functions on the bus" },
	{ "setup", 1, 1, command_setup, "", "gives all functions addresses and an IRQ" },
	{ "read", 3, 3, command_read, "WIDTH ADDRESS", "reads memory; WIDTH is 8, 16 or 32 bits" },
	{ "write", 4, 4, command_write, "WIDTH ADDRESS VALUE", "writes memory" },
	{ "in", 3, 3, command_in, "WIDTH PORT", "reads an I/O port" },
	{ "out", 4, 4, command_out, "WIDTH PORT VALUE", "writes an I/O port" },
	{ "config", 5, 6, command_config, "read|write WIDTH ADDR OFFSET [VALUE]", "accesses config space" },
	{ "irq", 2, 3, command_irq, "ADDR [enable]", "interrupts of a function without a driver" },
	{ "run", 2, 4, command_run, "ROUNDS [held EVERY]", "so many interrupts of each function with a driver" },
	{ "stats", 1, 1, command_stats, "", "counts since setup" },
	{ "samples", 2, 2, command_samples, "ADDR", "latencies of the last run" },
	{ "reroute", 2, 2, command_reroute, "ADDR", "moves the IRQ while the line is high" },
	{ "intx", 2, 2, command_intx, "ADDR", "sets and clears INTX_DISABLE while the line is high" },
	{ "hold", 2, 2, command_hold, "ADDR", "raises the line with its IRQ masked" },
	{ "release", 2, 2, command_release, "ADDR", "unmasks the IRQ after hold" },
	{ "reboot", 1, 1, command_reboot, "", "resets the machine" },
};

static const char *command_help(u32 argc, char **argv)
{
	u32 i;

	(void)argc;
	(void)argv;
	for (i = 0; i < ARRAY_SIZE(commands); i++) {
		put_string("# ");
		put_string(commands[i].name);
		if (*commands[i].usage)
			put_char(' ');
		put_string(commands[i].usage);
		put_string(": ");
		put_string(commands[i].help);
		end_line();
	}
	put_string("ok");
	return NULL;
}

static const char *dispatch(u32 argc, char **argv)
{
	u32 i;

	if (!argc)
		return "empty line";
	for (i = 0; i < ARRAY_SIZE(commands); i++) {
		if (!same(commands[i].name, argv[0]))
			continue;
		if (argc < commands[i].min || argc > commands[i].max)
			return "wrong number of arguments";
		return commands[i].handler(argc, argv);
	}
	return "unknown command";
}

void execute(char *line)
{
	char *argv[ARGUMENT_MAX];
	const char *error = dispatch(split(line, argv), argv);

	if (error) {
		put_string("err ");
		put_string(error);
	}
	end_line();
}
