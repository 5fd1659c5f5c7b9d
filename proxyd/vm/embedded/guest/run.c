/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The interrupt run: every function in turn raises its line and waits for the
 * handler.  Interrupts may be lost, and functions may vanish and return.
 */
#include "commands.h"
#include "console.h"
#include "io.h"
#include "irq.h"

#define SERVED_WITHIN	(3 * TICKS_PER_SECOND)
#define BACK_WITHIN	(20 * TICKS_PER_SECOND)
#define LOST_IN_A_ROW	10
#define PROGRESS_STEPS	20
#define ROUNDS_MAX	1000000
#define SAMPLES_A_LINE	16

static const char gone[] = "a function did not come back";
static const char bad_number[] = "bad number";

enum outcome {
	SERVED,
	LOST,
	RESET,
};

/*
 * Waits until the function answers with its vendor id and keeps the cookie.
 * What the line interrupts from the reset until a tick after the return is
 * counted as orphaned.
 */
static bool function_recover(struct function *fn)
{
	u32 start = ticks;
	bool rewritten = false;

	fn->recovering = true;
	for (;;) {
		if (config_read(fn->devfn, PCI_VENDOR_ID, 2) == fn->driver->vendor) {
			rewritten |= function_restore_config(fn);
			function_quiesce(fn);
			if (function_alive(fn))
				break;
		}
		if (ticks - start >= BACK_WITHIN) {
			fn->recovering = false;
			record("gone");
			field_devfn("addr", fn->devfn);
			end_line();
			return false;
		}
		wait_tick();
	}
	record("back");
	field_devfn("addr", fn->devfn);
	field_decimal("after_ticks", ticks - start);
	field_string("config", rewritten ? "rewritten" : "kept");
	end_line();
	settle(1);
	fn->recovering = false;
	return true;
}

/*
 * Recovers every function that has been reset: what reset one has probably
 * reset others, too.  The one that was found dead is recovered in any case: it
 * may answer again by now, its line still high.
 */
static bool functions_recover(const struct function *dead)
{
	struct function *fn;

	for (fn = functions; fn < functions + function_count; fn++) {
		if ((fn == dead || !function_alive(fn)) && !function_recover(fn))
			return false;
	}
	return true;
}

static enum outcome round_attempt(struct function *fn, bool hold)
{
	u32 served = fn->served;
	u32 start, tick;

	fn->hold = hold;
	function_raise(fn);
	start = tick = ticks;
	for (;;) {
		cpu_idle();
		if (fn->served != served)
			return SERVED;
		if (tick == ticks)
			continue;
		tick = ticks;
		if (!function_alive(fn))
			return RESET;
		if (tick - start >= SERVED_WITHIN)
			return LOST;
	}
}

/* One round, however often the device is reset under it. */
static const char *round(struct function *fn, bool hold, u32 *lost_in_a_row)
{
	for (;;) {
		u32 raised = fn->raised, served = fn->served, held = fn->held, reasserts = fn->reasserts;
		bool back;

		switch (round_attempt(fn, hold)) {
		case SERVED:
			*lost_in_a_row = 0;
			return NULL;
		case LOST:
			fn->lost++;
			function_quiesce(fn);
			if (irq_lines[fn->irq].stuck)
				return "an IRQ is stuck";
			return ++*lost_in_a_row == LOST_IN_A_ROW ? "too many rounds in a row were lost" : NULL;
		case RESET:
			back = functions_recover(fn);
			/* A device that continued may have interrupted meanwhile: that belongs to no round. */
			fn->raised = raised;
			fn->served = served;
			fn->held = held;
			fn->reasserts = reasserts;
			fn->redone++;
			if (!back)
				return gone;
			break;
		}
	}
}

/* Also recovers functions whose reset no round has noticed; the last call is at the end. */
static const char *progress(u32 done, u32 total)
{
	record("progress");
	field_decimal("done", done);
	field_decimal("total", total);
	end_line();
	return functions_recover(NULL) ? NULL : gone;
}

static const char *rounds_run(u32 rounds, u32 every)
{
	u32 total = rounds * function_count;
	u32 step = total / PROGRESS_STEPS ? total / PROGRESS_STEPS : 1;
	u32 next = step, done = 0, lost_in_a_row = 0;
	const char *error;
	u32 number, i;

	for (number = 1; number <= rounds; number++) {
		bool hold = every && number % every == 0;

		for (i = 0; i < function_count; i++) {
			error = round(&functions[i], hold, &lost_in_a_row);
			if (error)
				return error;
			if (++done < next && done < total)
				continue;
			next += step;
			error = progress(done, total);
			if (error)
				return error;
		}
	}
	return NULL;
}

/* run ROUNDS [held EVERY] */
const char *command_run(u32 argc, char **argv)
{
	u32 rounds, start, i, every = 0;
	const char *error;

	if (!parse_number(argv[1], &rounds) || !rounds || rounds > ROUNDS_MAX)
		return bad_number;
	if (argc != 2 && (argc != 4 || !same(argv[2], "held")))
		return "run ROUNDS [held EVERY] is meant";
	if (argc == 4 && (!parse_number(argv[3], &every) || !every))
		return bad_number;
	if (!function_count)
		return "no function with a driver: setup finds them";
	for (i = 0; i < function_count; i++) {
		if (functions[i].parked)
			return "a line is held, release comes first";
	}

	tick_start();
	sampling_start();
	start = ticks;
	error = rounds_run(rounds, every);
	start = ticks - start;
	sampling_stop();
	tick_stop();
	if (error)
		return error;
	put_string("ok");
	field_decimal("ticks", start);
	return NULL;
}

static void print_samples(const char *kind, const struct samples *samples)
{
	u32 count = samples->count < SAMPLE_MAX ? samples->count : SAMPLE_MAX;
	u32 i;

	for (i = 0; i < count; i++) {
		if (i % SAMPLES_A_LINE == 0) {
			record(kind);
			put_string(" tsc=");
		} else {
			put_char(',');
		}
		put_hex(samples->tsc[i], 1);
		if (i % SAMPLES_A_LINE == SAMPLES_A_LINE - 1 || i == count - 1)
			end_line();
	}
}

/* samples ADDR */
const char *command_samples(u32 argc, char **argv)
{
	struct function *fn;
	const char *error = named_function(argv[1], &fn);

	(void)argc;
	if (error)
		return error;
	print_samples("raise_to_handler", &fn->raise_to_handler);
	print_samples("eoi_to_reassert", &fn->eoi_to_reassert);
	put_string("ok");
	return NULL;
}
