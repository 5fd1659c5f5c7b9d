// SPDX-License-Identifier: GPL-2.0-or-later
/* Measures a disk in the Linux guest past its caches.
 *
 * diskbench DEVICE BLOCK DEPTH SECONDS random|sequential: keeps DEPTH reads of BLOCK bytes under way for so many
 * seconds, at random places or one after the other, and prints how many ended in each second (io_submit(2)).
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { DEPTH_MAX = 256, PAGE = 4096 };

static int disk, is_random;
static uint64_t blocks, size, following;
static aio_context_t context;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void submit(struct iocb *request)
{
	uint64_t block = is_random ? (uint64_t)random() % blocks : following++ % blocks;

	request->aio_offset = block * size;
	if (syscall(SYS_io_submit, context, 1, &request) != 1)
		err(1, "io_submit");
}

int main(int argc, char **argv)
{
	static struct iocb requests[DEPTH_MAX];
	struct io_event events[DEPTH_MAX];
	uint64_t bytes, ended = 0;
	int depth;

	if (argc != 6)
		errx(2, "DEVICE BLOCK DEPTH SECONDS random|sequential");
	disk = open(argv[1], O_RDONLY | O_DIRECT);
	if (disk < 0 || ioctl(disk, BLKGETSIZE64, &bytes))
		err(1, "%s", argv[1]);
	size = strtoull(argv[2], NULL, 0);
	depth = atoi(argv[3]);
	is_random = !strcmp(argv[5], "random");
	if (size < 512 || depth < 1 || depth > DEPTH_MAX || bytes < size)
		errx(2, "impossible");
	blocks = bytes / size;
	if (syscall(SYS_io_setup, DEPTH_MAX, &context))
		err(1, "io_setup");

	double begin = now(), end = begin + atof(argv[4]);

	for (int i = 0; i < depth; i++) {
		void *buffer = aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);

		if (!buffer)
			err(1, "%d buffers", depth);
		requests[i] = (struct iocb){
			.aio_lio_opcode = IOCB_CMD_PREAD,
			.aio_fildes = disk,
			.aio_buf = (uintptr_t)buffer,
			.aio_nbytes = size,
		};
		submit(&requests[i]);
	}
	while (now() < end) {
		int count = syscall(SYS_io_getevents, context, 1, DEPTH_MAX, events, NULL);

		if (count < 0)
			err(1, "io_getevents");
		for (int i = 0; i < count; i++) {
			if (events[i].res != (int64_t)size)
				errx(1, "a read ended with %lld", (long long)events[i].res);
			submit((struct iocb *)(uintptr_t)events[i].obj);
		}
		ended += count;
	}
	printf("%.0f\n", ended / (now() - begin));
	return 0;
}
