/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The command table, and the commands that only set up and report. */
#include "commands.h"
#include "console.h"
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
		end_line();
	}
	put_string("ok");
	field_decimal("functions", function_count);
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

/* A reset takes effect in its own time, or never; the line's end must be out before. */
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

static const struct command {
	const char *name;
	u32 min, max;	/* words, the name among them */
	const char *(*handler)(u32 argc, char **argv);
} commands[] = {
	{ "version", 1, 1, command_version },
	{ "in", 3, 3, command_in },
	{ "out", 4, 4, command_out },
	{ "read", 3, 3, command_read },
	{ "write", 4, 4, command_write },
	{ "config", 5, 6, command_config },
	{ "lspci", 1, 1, command_lspci },
	{ "setup", 1, 1, command_setup },
	{ "run", 2, 4, command_run },
	{ "samples", 2, 2, command_samples },
	{ "stats", 1, 1, command_stats },
	{ "reroute", 2, 2, command_reroute },
	{ "intx", 2, 2, command_intx },
	{ "hold", 2, 2, command_hold },
	{ "release", 2, 2, command_release },
	{ "reboot", 1, 1, command_reboot },
};

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
