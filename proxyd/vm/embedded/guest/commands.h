/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The commands.  Each prints its records and its "ok" without the line's end,
 * and returns NULL; or returns the reason that follows "err".  argv[0] is the
 * command's name.
 */
#ifndef GUEST_COMMANDS_H
#define GUEST_COMMANDS_H

#include "function.h"
#include "types.h"

#define ARGUMENT_MAX	6

void execute(char *line);

/* parse.c */
bool parse_number(const char *text, u32 *value);
bool parse_devfn(const char *text, u8 *devfn);
bool parse_width(const char *text, u8 *bytes);
bool same(const char *a, const char *b);
u32 split(char *line, char *argv[ARGUMENT_MAX]);

/* access.c */
const char *command_in(u32 argc, char **argv);
const char *command_out(u32 argc, char **argv);
const char *command_read(u32 argc, char **argv);
const char *command_write(u32 argc, char **argv);
const char *command_config(u32 argc, char **argv);
const char *command_lspci(u32 argc, char **argv);

/* generic.c */
const char *command_irq(u32 argc, char **argv);

/* run.c */
const char *command_run(u32 argc, char **argv);
const char *command_samples(u32 argc, char **argv);

/* route.c */
const char *command_reroute(u32 argc, char **argv);
const char *command_intx(u32 argc, char **argv);
const char *command_hold(u32 argc, char **argv);
const char *command_release(u32 argc, char **argv);

/* commands.c: the function that an argument names, or why there is none */
const char *named_function(const char *text, struct function **fn);

#endif
