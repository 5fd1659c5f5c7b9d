/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the checks of target share. */
#ifndef TARGET_H
#define TARGET_H

#define _GNU_SOURCE
#include <stdatomic.h>
#include <time.h>

/* The second argument: whether a call may fail with EINTR, and whether the check of a coroutine stays in it. */
extern int eintr_allowed, stays;
/* Set when the check is to end. */
extern _Atomic int done;
extern const struct timespec ms;

/* Prints what was wrong, and ends the process. */
_Noreturn void fail(const char *what, long got);
void expect(const char *what, long got, long want);
/* The call had to fail, with this errno. */
void expect_errno(const char *what, long got, int want);
/* The call had to return this, or -1 and EINTR where that is allowed. */
void expect_or_eintr(const char *what, long got, long want);

/* One round each. */
void check_ppoll(void);
void check_poll(void);
void check_pselect(void);
void check_nanosleep(void);
void check_clock_nanosleep(void);
void check_futex(void);
void check_epoll_wait(void);
void check_sigtimedwait(void);
void check_semtimedop(void);
void check_socket(void);
void check_io_uring(void);
void check_io_getevents(void);
void check_read(void);
void check_registers(void);
void check_vectors(void);
void check_coroutine(void);
void check_deep(void);
void check_rseq(void);
void check_signals(void);
void check_kvm_run(void);
void check_vfork(void);

#endif
