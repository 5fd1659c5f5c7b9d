// SPDX-License-Identifier: GPL-2.0-or-later
// The asking end of one link, which costs every remote process the same: it asks, waits in a blocking system call
// as QEMU's vCPU thread does, and notes how long the answer took.
//
//     client TRANSPORT EXCHANGE WARMUP COUNT CPU LINK IRQFD RESAMPLEFD IO_BASE
//
// writes COUNT nanoseconds to stdout, each a host-endian u32, after WARMUP exchanges that it doesn't note. TRANSPORT
// is mpqemu or vfio-user. CPU is where it runs, -1 for anywhere. The fds are inherited; those of vfio-user are the
// trigger and the unmask eventfd. A pci-serial is at IO_BASE, or has its registers in BAR 0.
#define _GNU_SOURCE
#include <err.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PCI_CFGREAD = 3, BAR_WRITE = 4, BAR_READ = 5 };
enum { REGION_READ = 9, REGION_WRITE = 10, NO_REPLY = 0x10, CONFIG_REGION = 7 };
enum { UART_IER = 1, UART_IER_THRI = 2, UART_SCR = 7 };

struct header {
	int32_t command;
	uint32_t pad;
	uint64_t size;
};

struct config_request {
	struct header header;
	uint32_t addr, value;
	int32_t length;
} __attribute__((packed));

struct bar_request {
	struct header header;
	uint64_t addr, value;
	uint32_t size;
	uint8_t memory, pad[3];
} __attribute__((packed));

struct region_request {
	uint16_t id, command;
	uint32_t size, flags, error;
	uint64_t offset;
	uint32_t region, count;
	uint8_t data[4];
} __attribute__((packed));

enum { MPQEMU_REPLY = 24, REGION_HEAD = 32 };
/* In one burst: QEMU's vCPU goes on after a posted write. */
enum { BURST = 64 };

/* A request, and how many bytes its answer has. */
struct message {
	union {
		struct config_request config;
		struct bar_request bar;
		struct region_request region;
	};
	size_t size, answer;
};

static int link_fd, irqfd, resamplefd;
static uint64_t io_base;
static bool is_vfio_user;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void ask(const struct message *message)
{
	if (send(link_fd, message, message->size, MSG_NOSIGNAL) != (ssize_t)message->size)
		err(1, "sending a request");
}

static void await_reply(const struct message *message)
{
	char reply[64];

	if (recv(link_fd, reply, message->answer, MSG_WAITALL) != (ssize_t)message->answer)
		err(1, "receiving a reply");
}

static void await_irqfd(void)
{
	uint64_t count;

	if (read(irqfd, &count, sizeof(count)) != sizeof(count))
		err(1, "reading the irqfd");
}

static void signal_eoi(void)
{
	uint64_t one = 1;

	if (write(resamplefd, &one, sizeof(one)) != sizeof(one))
		err(1, "writing the resamplefd");
}

static struct message region(int command, int index, uint64_t offset, int count, int value)
{
	bool is_write = command == REGION_WRITE;

	return (struct message){
		.region = {
			.command = command,
			.size = REGION_HEAD + is_write * count,
			.offset = offset,
			.region = index,
			.count = count,
			.data = { value },
		},
		.size = REGION_HEAD + is_write * count,
		.answer = REGION_HEAD + !is_write * count,
	};
}

static struct message bar(int command, int reg, int value)
{
	if (is_vfio_user)
		return region(command == BAR_READ ? REGION_READ : REGION_WRITE, 0, reg, 1, value);
	return (struct message){
		.bar = {
			.header = { .command = command, .size = 24 },
			.addr = io_base + reg,
			.value = value,
			.size = 1,
		},
		.size = sizeof(struct bar_request),
		.answer = MPQEMU_REPLY,
	};
}

static struct message config(void)
{
	if (is_vfio_user)
		return region(REGION_READ, CONFIG_REGION, 0, 4, 0);
	return (struct message){
		.config = { .header = { .command = PCI_CFGREAD, .size = 12 }, .length = 4 },
		.size = sizeof(struct config_request),
		.answer = MPQEMU_REPLY,
	};
}

static uint64_t exchange(const struct message *message)
{
	uint64_t begin = now();

	ask(message);
	await_reply(message);
	return now() - begin;
}

static uint64_t config_read(void)
{
	struct message message = config();

	return exchange(&message);
}

static uint64_t bar_read(void)
{
	struct message message = bar(BAR_READ, UART_SCR, 0);

	return exchange(&message);
}

static uint64_t bar_write(void)
{
	struct message message = bar(BAR_WRITE, UART_SCR, 0x5a);

	return exchange(&message);
}

/* The share of one write in a burst of them, which ends when the device has seen all: a read has come back. */
static uint64_t write_burst(void)
{
	struct message write = bar(BAR_WRITE, UART_SCR, 0x5a), read = bar(BAR_READ, UART_SCR, 0);
	uint64_t begin = now();

	if (is_vfio_user)
		write.region.flags = NO_REPLY;
	for (int i = 0; i < BURST; i++) {
		ask(&write);
		if (!is_vfio_user)
			await_reply(&write);
	}
	exchange(&read);
	return (now() - begin) / BURST;
}

static uint64_t level(bool high)
{
	struct message message = bar(BAR_WRITE, UART_IER, high ? UART_IER_THRI : 0);
	uint64_t begin = now(), time = 0;

	ask(&message);
	if (high) {
		await_irqfd();
		time = now() - begin;
	}
	await_reply(&message);
	return time;
}

/* Over vfio-user a line that was asserted is masked until an EOI, which the remote process has to have noticed. */
static void lower_line(void)
{
	struct pollfd eoi = { .fd = resamplefd, .events = POLLIN };

	level(false);
	if (!is_vfio_user)
		return;
	signal_eoi();
	while (poll(&eoi, 1, 0) > 0)
		sched_yield();
}

static uint64_t raise_line(void)
{
	uint64_t time = level(true);

	lower_line();
	return time;
}

static uint64_t resample_echo(void)
{
	uint64_t begin = now();

	signal_eoi();
	await_irqfd();
	return now() - begin;
}

static const struct {
	const char *name;
	uint64_t (*run)(void);
} exchanges[] = {
	{ "config-read", config_read },
	{ "bar-read", bar_read },
	{ "bar-write", bar_write },
	{ "write-burst", write_burst },
	{ "raise", raise_line },
	{ "resample-echo", resample_echo },
};

static void pin(int cpu)
{
	cpu_set_t set;

	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "CPU %d", cpu);
}

static void measure(uint64_t (*run)(void), long warmup, long count)
{
	uint32_t *times = malloc(count * sizeof(*times));
	const char *rest = (const char *)times;
	size_t left = count * sizeof(*times);

	if (!times)
		err(1, "%ld exchanges", count);
	for (long i = 0; i < warmup; i++)
		run();
	for (long i = 0; i < count; i++) {
		uint64_t time = run();

		times[i] = time < UINT32_MAX ? time : UINT32_MAX;
	}
	while (left) {
		ssize_t written = write(STDOUT_FILENO, rest, left);

		if (written < 0)
			err(1, "stdout");
		rest += written;
		left -= written;
	}
}

int main(int argc, char **argv)
{
	if (argc != 10)
		errx(2, "TRANSPORT EXCHANGE WARMUP COUNT CPU LINK IRQFD RESAMPLEFD IO_BASE");
	is_vfio_user = !strcmp(argv[1], "vfio-user");
	pin(atoi(argv[5]));
	link_fd = atoi(argv[6]);
	irqfd = atoi(argv[7]);
	resamplefd = atoi(argv[8]);
	io_base = strtoull(argv[9], NULL, 0);
	for (size_t i = 0; i < sizeof(exchanges) / sizeof(*exchanges); i++) {
		if (strcmp(argv[2], exchanges[i].name))
			continue;
		if (exchanges[i].run == resample_echo)
			level(true);
		measure(exchanges[i].run, atol(argv[3]), atol(argv[4]));
		if (exchanges[i].run == resample_echo)
			lower_line();
		return 0;
	}
	errx(2, "no exchange %s", argv[2]);
}
