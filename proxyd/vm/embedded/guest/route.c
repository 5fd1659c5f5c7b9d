/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of a line that is asserted while its PIRQ is moved or switched off,
 * INTx is disabled, or the machine is reset.
 */
#include "commands.h"
#include "console.h"
#include "io.h"
#include "irq.h"

#define SERVED_WITHIN	(3 * TICKS_PER_SECOND)
#define SETTLE		3	/* ticks after which nothing is still on its way */

/* Can be level-triggered (PIIX3, ELCR2), and nothing here drives it. */
#define SPARE_IRQ	12

static const char step_failed[] = "a step had the wrong interrupts";

/* One step of a test: the function, and the counters at the start. */
struct step {
	struct function *fn;
	u8 irq;			/* where interrupts must arrive */
	u32 entries, elsewhere, served, master, slave;
};

static u32 entries_elsewhere(u8 irq)
{
	u32 sum = 0;
	u8 i;

	for (i = 0; i < IRQ_COUNT; i++) {
		if (i != irq)
			sum += irq_lines[i].entries;
	}
	return sum;
}

static void step_begin(struct step *step, struct function *fn, u8 irq)
{
	step->fn = fn;
	step->irq = irq;
	step->entries = irq_lines[irq].entries;
	step->elsewhere = entries_elsewhere(irq);
	step->served = fn->served;
	step->master = spurious_master;
	step->slave = spurious_slave;
}

/* Waits until the function has been served; counts it as lost if that takes too long. */
static void step_wait(const struct step *step)
{
	struct function *fn = step->fn;
	u32 start = ticks;

	while (fn->served == step->served && ticks - start < SERVED_WITHIN)
		cpu_idle();
	if (fn->served == step->served) {
		fn->lost++;
		function_quiesce(fn);
	}
	settle(SETTLE);
}

/* Prints what was counted since the start; true if it is what the arguments say. */
static bool step_end(const struct step *step, const char *name, u32 entries, u32 elsewhere, u32 served)
{
	u32 got_entries = irq_lines[step->irq].entries - step->entries;
	u32 got_elsewhere = entries_elsewhere(step->irq) - step->elsewhere;
	u32 got_served = step->fn->served - step->served;
	bool good = got_entries == entries && got_elsewhere == elsewhere && got_served == served;

	record("step");
	field_string("name", name);
	field_devfn("addr", step->fn->devfn);
	field_decimal("irq", step->irq);
	field_decimal("entries", got_entries);
	field_decimal("elsewhere", got_elsewhere);
	field_decimal("served", got_served);
	field_decimal("vector7", spurious_master - step->master);
	field_decimal("vector15", spurious_slave - step->slave);
	field_string("result", good ? "good" : "bad");
	end_line();
	return good;
}

/* A round for every function of the PIRQ, on the IRQ where it is routed now. */
static bool pirq_works(const char *name, u8 pirq, u8 irq)
{
	struct function *fn;
	bool good = true;

	for (fn = pirq_functions[pirq]; fn; fn = fn->next) {
		struct step step;

		step_begin(&step, fn, irq);
		function_raise(fn);
		step_wait(&step);
		good &= step_end(&step, name, 1, 0, 1);
	}
	return good;
}

static bool move_before_inta(struct function *fn, u8 to)
{
	struct step step;

	step_begin(&step, fn, to);
	function_raise(fn);
	pirq_route(fn->pirq, to);
	step_wait(&step);
	return step_end(&step, "before_inta", 1, 0, 1);
}

/* The first entry is on the old IRQ, moves the PIRQ and only then says EOI. */
static bool move_before_eoi(struct function *fn, u8 to)
{
	struct step step;

	step_begin(&step, fn, to);
	fn->hold = true;
	fn->move_to = to;
	function_raise(fn);
	step_wait(&step);
	fn->move_to = 0;
	return step_end(&step, "before_eoi", 1, 1, 1);
}

static bool disable_and_enable(struct function *fn)
{
	struct step step;
	bool good;

	step_begin(&step, fn, fn->irq);
	function_raise(fn);
	pirq_route(fn->pirq, PIRQ_DISABLED);
	settle(SETTLE);
	good = step_end(&step, "disabled", 0, 0, 0);
	step_begin(&step, fn, fn->irq);
	pirq_route(fn->pirq, fn->irq);
	step_wait(&step);
	return good & step_end(&step, "enabled", 1, 0, 1);
}

/* The named function, if its line is not held; or the reason. */
static const char *idle_function(const char *text, struct function **fn)
{
	const char *error = named_function(text, fn);

	if (!error && (*fn)->parked)
		error = "the function's line is held";
	return error;
}

/* reroute ADDR */
const char *command_reroute(u32 argc, char **argv)
{
	struct function *fn;
	const char *error = idle_function(argv[1], &fn);
	bool good;

	(void)argc;
	if (error)
		return error;
	tick_start();
	pic_set_level(SPARE_IRQ, true);
	pic_unmask(SPARE_IRQ);

	good = move_before_inta(fn, SPARE_IRQ);
	good &= pirq_works("on_new_irq", fn->pirq, SPARE_IRQ);
	good &= move_before_eoi(fn, fn->irq);
	pirq_route(fn->pirq, fn->irq);
	good &= disable_and_enable(fn);
	good &= pirq_works("restored", fn->pirq, fn->irq);

	pic_mask(SPARE_IRQ);
	pic_set_level(SPARE_IRQ, false);
	tick_stop();
	if (!good)
		return step_failed;
	put_string("ok");
	return NULL;
}

/*
 * intx ADDR.  On an IRQ that is shared, one entry is allowed while INTx is
 * disabled: the line may have been counted as pending before it fell.
 */
const char *command_intx(u32 argc, char **argv)
{
	struct function *fn;
	const char *error = idle_function(argv[1], &fn);
	u32 entries, shared;
	struct step step;
	bool good, status;

	(void)argc;
	if (error)
		return error;
	tick_start();
	shared = fn->next || pirq_functions[fn->pirq] != fn;
	step_begin(&step, fn, fn->irq);
	function_raise(fn);
	function_set_intx_disable(fn, true);
	settle(SETTLE);
	entries = irq_lines[fn->irq].entries - step.entries;
	status = pci_intx_status(fn->devfn);
	good = step_end(&step, "disabled", shared && entries ? 1 : 0, 0, 0) && status;

	step_begin(&step, fn, fn->irq);
	function_set_intx_disable(fn, false);
	step_wait(&step);
	good &= step_end(&step, "enabled", 1, 0, 1);
	tick_stop();
	if (!status)
		return "the status bit was clear while INTx was disabled";
	if (!good)
		return step_failed;
	put_string("ok");
	return NULL;
}

/* hold ADDR: leaves the line high, for a reset of the machine to find it so */
const char *command_hold(u32 argc, char **argv)
{
	struct function *fn;
	const char *error = idle_function(argv[1], &fn);

	(void)argc;
	if (error)
		return error;
	pic_mask(fn->irq);
	fn->parked = true;
	function_raise(fn);
	put_string("ok");
	field_decimal("status", pci_intx_status(fn->devfn));
	return NULL;
}

/* release ADDR: the line that was held interrupts, once */
const char *command_release(u32 argc, char **argv)
{
	struct function *fn;
	const char *error = named_function(argv[1], &fn);
	struct step step;
	bool good;

	(void)argc;
	if (error)
		return error;
	if (!fn->parked)
		return "the function's line is not held";
	fn->parked = false;
	tick_start();
	step_begin(&step, fn, fn->irq);
	pic_unmask(fn->irq);
	step_wait(&step);
	good = step_end(&step, "released", 1, 0, 1);
	tick_stop();
	if (!good)
		return step_failed;
	put_string("ok");
	return NULL;
}
