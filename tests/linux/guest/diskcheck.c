// SPDX-License-Identifier: GPL-2.0-or-later
/* Writes a disk in the Linux guest past its caches, and verifies every sector.
 *
 * diskcheck DEVICE MEBIBYTES write|verify|both [PASS]: each CPU has a thread, which takes its share of the blocks in
 * a random order. A sector holds its number, the pass, and words that follow from both; the pass (1 by default) tells
 * the sectors of one run from those of another. "verify" wants all sectors as "write" leaves them. Threads write from
 * buffers with different offsets within a page, and read what another thread has written.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SECTOR = 512, WORDS = SECTOR / 8, BLOCK = 65536, PAGE = 4096, CPUS_MAX = 64 };

static int disk;
static uint64_t pass = 1;
static long blocks, cpus;

struct share {
	pthread_t thread;
	long cpu;
	int is_write;
};

static uint64_t mix(uint64_t value)
{
	value ^= value >> 30;
	value *= 0xbf58476d1ce4e5b9;
	value ^= value >> 27;
	value *= 0x94d049bb133111eb;
	return value ^ value >> 31;
}

static uint64_t word(uint64_t sector, int index)
{
	return index ? mix(sector * WORDS + index + (pass << 48)) : sector;
}

static void fill(uint64_t *buffer, long block)
{
	for (int i = 0; i < BLOCK / 8; i++)
		buffer[i] = word((uint64_t)block * (BLOCK / SECTOR) + i / WORDS, i % WORDS);
}

static void verify(const uint64_t *buffer, long block)
{
	for (int i = 0; i < BLOCK / 8; i++) {
		uint64_t sector = (uint64_t)block * (BLOCK / SECTOR) + i / WORDS;

		if (buffer[i] != word(sector, i % WORDS))
			errx(1, "sector %llu, word %d: %#llx instead of %#llx", (unsigned long long)sector, i % WORDS,
			     (unsigned long long)buffer[i], (unsigned long long)word(sector, i % WORDS));
	}
}

static void *work(void *argument)
{
	struct share *share = argument;
	cpu_set_t set;
	long count = 0, *order = malloc(blocks * sizeof *order);
	char *memory = aligned_alloc(PAGE, BLOCK + PAGE);
	uint64_t *buffer = (uint64_t *)(memory + share->cpu % 4 * SECTOR);

	if (!order || !memory)
		errx(1, "no memory");
	CPU_ZERO(&set);
	CPU_SET(share->cpu, &set);
	if (sched_setaffinity(0, sizeof set, &set))
		err(1, "CPU %ld", share->cpu);
	// A reader's share is its neighbour's.
	for (long block = (share->cpu + !share->is_write) % cpus; block < blocks; block += cpus) {
		long place = mix(block + pass) % ++count;

		order[count - 1] = order[place];
		order[place] = block;
	}
	for (long i = 0; i < count; i++) {
		off_t offset = (off_t)order[i] * BLOCK;
		ssize_t done;

		if (share->is_write) {
			fill(buffer, order[i]);
			done = pwrite(disk, buffer, BLOCK, offset);
		} else {
			memset(buffer, 0, BLOCK);
			done = pread(disk, buffer, BLOCK, offset);
		}
		if (done != BLOCK)
			errx(1, "%s at %lld: %s", share->is_write ? "write" : "read", (long long)offset,
			     done < 0 ? strerror(errno) : "short");
		if (!share->is_write)
			verify(buffer, order[i]);
	}
	free(memory);
	free(order);
	return NULL;
}

static void run(int is_write)
{
	struct share shares[CPUS_MAX];

	for (long cpu = 0; cpu < cpus; cpu++) {
		shares[cpu] = (struct share){.cpu = cpu, .is_write = is_write};
		if (pthread_create(&shares[cpu].thread, NULL, work, &shares[cpu]))
			errx(1, "no thread");
	}
	for (long cpu = 0; cpu < cpus; cpu++)
		pthread_join(shares[cpu].thread, NULL);
	if (is_write && fsync(disk))
		err(1, "fsync");
}

int main(int argc, char **argv)
{
	if (argc < 4)
		errx(2, "which device, how much, and what to do?");
	disk = open(argv[1], O_RDWR | O_DIRECT);
	if (disk < 0)
		err(1, "%s", argv[1]);
	blocks = atol(argv[2]) * (1048576 / BLOCK);
	if (argc > 4)
		pass = atol(argv[4]);
	cpus = sysconf(_SC_NPROCESSORS_ONLN);
	if (cpus < 1 || cpus > CPUS_MAX)
		errx(1, "%ld CPUs", cpus);
	if (strcmp(argv[3], "verify"))
		run(1);
	if (strcmp(argv[3], "write"))
		run(0);
	return 0;
}
