/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Stacks: a small one of its own, and one that has to grow. */
#include "target.h"

#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <ucontext.h>

/*
 * The main thread is on a small stack of its own for a while, with another thread's memory right below it; then it
 * waits on its main stack, unless told to stay.
 */
enum { SMALL_STACK = 4096, BELOW = 16384 };

static _Atomic uint64_t *below;
static ucontext_t on_main, on_small;

static void *write_below(void *unused)
{
        const size_t count = BELOW / sizeof(*below);

        for (uint64_t round = 1; !done; round++) {
                for (size_t i = 0; i < count; i++) {
                        if (below[i] != round - 1)
                                fail("memory below the small stack", below[i]);
                        below[i] = round;
                }
        }
        return unused;
}

static void small_stack(void)
{
        struct epoll_event event;
        int epfd = epoll_create1(EPOLL_CLOEXEC);

        for (;;) {
                for (int i = 0; i < 2 || (stays && !done); i++)
                        expect_or_eintr("epoll_wait on a small stack", epoll_wait(epfd, &event, 1, 1), 0);
                swapcontext(&on_small, &on_main);
        }
}

void check_coroutine(void)
{
        pthread_t thread;

        if (!below) {
                char *memory = mmap(NULL, BELOW + SMALL_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

                below = (void *)memory;
                getcontext(&on_small);
                on_small.uc_stack.ss_sp = memory + BELOW;
                on_small.uc_stack.ss_size = SMALL_STACK;
                makecontext(&on_small, small_stack, 0);
                if (pthread_create(&thread, NULL, write_below, NULL))
                        fail("pthread_create", -1);
        }
        swapcontext(&on_main, &on_small);
        for (int i = 0; i < 3; i++)
                ppoll(NULL, 0, &ms, NULL);
}

/* The main thread waits ever deeper in its stack, which has to grow for it. */
void check_deep(void)
{
        static size_t depth = 1;
        char room[depth];

        memset(room, 'x', depth);
        expect("ppoll", ppoll(NULL, 0, &ms, NULL), 0);
        for (size_t i = 0; i < depth; i++)
                expect("room", ((volatile char *)room)[i], 'x');
        if (depth < 300000)
                depth += 16384;
}
