/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A process that notices when somebody meddles with its main thread.
 *
 *      target CHECK [eintr|stay]
 *
 * runs one check over and over in the main thread until standard input ends, then prints the number of rounds and
 * exits with 0. A wrong result prints a line and exits with 1. With "eintr" it puts up with what a tracer does that is
 * killed in the midst of its work: a call that waits for a time may fail with EINTR, or be restarted after a handler.
 * With "stay" the check of a coroutine stays in it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <linux/rseq.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/rseq.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static const char *check;
static int eintr_allowed;
static _Atomic int done;
static const struct timespec ms = { 0, 1000000 };

static _Noreturn void fail(const char *what, long got)
{
        printf("%s: %s: %ld, errno %d\n", check, what, got, errno);
        fflush(stdout);
        _exit(1);
}

static void expect(const char *what, long got, long want)
{
        if (got != want)
                fail(what, got);
}

/* The call had to fail, with this errno. */
static void expect_errno(const char *what, long got, int want)
{
        if (got == -1 && errno == EINTR && eintr_allowed)
                return;
        if (got != -1 || errno != want)
                fail(what, got);
}

/* The call had to return this, or -1 and EINTR where that is allowed. */
static void expect_or_eintr(const char *what, long got, long want)
{
        if (got == -1 && errno == EINTR && eintr_allowed)
                return;
        expect(what, got, want);
}

static void check_ppoll(void)
{
        expect("ppoll", ppoll(NULL, 0, &ms, NULL), 0);
}

static void check_poll(void)
{
        expect_or_eintr("poll", poll(NULL, 0, 1), 0);
}

static void check_pselect(void)
{
        sigset_t mask;

        sigemptyset(&mask);
        expect("pselect", pselect(0, NULL, NULL, NULL, &ms, &mask), 0);
}

static void check_nanosleep(void)
{
        expect_or_eintr("nanosleep", nanosleep(&ms, NULL), 0);
}

static void check_clock_nanosleep(void)
{
        struct timespec until;
        int error;

        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += 1000000;
        if (until.tv_nsec >= 1000000000) {
                until.tv_nsec -= 1000000000;
                until.tv_sec++;
        }
        error = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        if (!(error == EINTR && eintr_allowed))
                expect("clock_nanosleep", error, 0);
}

static void check_futex(void)
{
        static uint32_t word;
        struct timespec until;

        expect_errno("FUTEX_WAIT", syscall(SYS_futex, &word, FUTEX_WAIT, 0, &ms, NULL, 0), ETIMEDOUT);
        clock_gettime(CLOCK_MONOTONIC, &until);
        expect_errno("FUTEX_WAIT_BITSET",
                     syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, 0, &until, NULL, FUTEX_BITSET_MATCH_ANY),
                     ETIMEDOUT);
}

static void check_epoll_wait(void)
{
        static int epfd = -1;
        struct epoll_event event;
        sigset_t mask;

        if (epfd == -1)
                epfd = epoll_create1(EPOLL_CLOEXEC);
        sigemptyset(&mask);
        expect_or_eintr("epoll_wait", syscall(SYS_epoll_wait, epfd, &event, 1, 1), 0);
        expect_or_eintr("epoll_pwait", epoll_pwait(epfd, &event, 1, 1, &mask), 0);
        expect_or_eintr("epoll_pwait2", syscall(SYS_epoll_pwait2, epfd, &event, 1, &ms, &mask, 8), 0);
}

static void check_sigtimedwait(void)
{
        sigset_t set;

        sigemptyset(&set);
        sigaddset(&set, SIGUSR2);
        expect_errno("sigtimedwait", sigtimedwait(&set, NULL, &ms), EAGAIN);
}

static void check_semtimedop(void)
{
        static int id = -1;
        struct sembuf down = { 0, -1, 0 };

        if (id == -1) {
                id = semget(IPC_PRIVATE, 1, 0600);
                if (id == -1)
                        fail("semget", id);
        }
        expect_errno("semtimedop", semtimedop(id, &down, 1, &ms), EAGAIN);
        if (done)
                semctl(id, 0, IPC_RMID);
}

static void check_socket(void)
{
        static int pair[2] = { -1, -1 }, listener;
        static char much[1 << 20];
        struct timeval timeout = { 0, 1000 };
        struct sockaddr_un name = { .sun_family = AF_UNIX };
        char byte;
        struct iovec vector = { &byte, 1 };
        struct mmsghdr messages[1] = { { .msg_hdr = { .msg_iov = &vector, .msg_iovlen = 1 } } };
        struct msghdr message = { 0 };

        if (pair[0] == -1) {
                socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
                listener = socket(AF_UNIX, SOCK_STREAM, 0);
                expect("bind", bind(listener, (struct sockaddr *)&name, sizeof(sa_family_t)), 0);
                expect("listen", listen(listener, 1), 0);
                setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
                setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
                setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
                while (send(pair[0], much, sizeof(much), MSG_DONTWAIT) > 0)
                        ;
                while (send(pair[0], much, 1, MSG_DONTWAIT) > 0)
                        ;
        }
        expect_errno("recv", recv(pair[0], &byte, 1, 0), EAGAIN);
        expect_errno("recvmsg", recvmsg(pair[0], &message, 0), EAGAIN);
        expect_errno("recvmmsg", recvmmsg(pair[0], messages, 1, 0, NULL), EAGAIN);
        expect_errno("read", read(pair[0], &byte, 1), EAGAIN);
        expect_errno("readv", readv(pair[0], &vector, 1), EAGAIN);
        expect_errno("send", send(pair[0], much, 1, 0), EAGAIN);
        expect_errno("sendmsg", sendmsg(pair[0], &messages[0].msg_hdr, 0), EAGAIN);
        expect_errno("sendmmsg", sendmmsg(pair[0], messages, 1, 0), EAGAIN);
        expect_errno("write", write(pair[0], much, 1), EAGAIN);
        expect_errno("writev", writev(pair[0], &vector, 1), EAGAIN);
        expect_errno("accept", syscall(SYS_accept, listener, NULL, NULL), EAGAIN);
        expect_errno("accept4", accept4(listener, NULL, NULL, 0), EAGAIN);
}

static void check_io_uring(void)
{
        static int fd = -1;
        struct __kernel_timespec timeout = { 0, 1000000 };
        struct io_uring_getevents_arg argument = { .ts = (uintptr_t)&timeout };
        struct io_uring_params parameters = { 0 };

        if (fd == -1) {
                fd = syscall(SYS_io_uring_setup, 4, &parameters);
                if (fd < 0)
                        fail("io_uring_setup", fd);
        }
        expect_errno("io_uring_enter",
                     syscall(SYS_io_uring_enter, fd, 0, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &argument,
                             sizeof(argument)),
                     ETIME);
}

static void check_io_getevents(void)
{
        static aio_context_t context;
        struct io_event event;

        if (!context)
                expect("io_setup", syscall(SYS_io_setup, 4, &context), 0);
        expect_or_eintr("io_getevents", syscall(SYS_io_getevents, context, 1L, 1L, &event, &ms), 0);
        expect_or_eintr("io_pgetevents", syscall(SYS_io_pgetevents, context, 1L, 1L, &event, &ms, NULL), 0);
}

/* A byte goes round between two threads: the reads block for an unknown time. */
static int there[2], back[2];

static void *echo(void *unused)
{
        char byte;

        while (read(there[0], &byte, 1) == 1) {
                usleep(300);
                if (write(back[1], &byte, 1) != 1)
                        break;
        }
        return unused;
}

static void check_read(void)
{
        static unsigned char next;
        static pthread_t thread;
        unsigned char got;

        if (!thread) {
                if (pipe(there) || pipe(back) || pthread_create(&thread, NULL, echo, NULL))
                        fail("pipe", -1);
        }
        next++;
        expect("write", write(there[1], &next, 1), 1);
        expect("read", read(back[0], &got, 1), 1);
        expect("byte", got, next);
}

/*
 * User code without a system call: all registers, the red zone, what is below it, the flags and the vector registers,
 * looked at a few hundred microseconds after they were set. A tracer that was killed leaves its traces below the red
 * zone, where no program may keep anything: a signal handler's frame goes there.
 */
static void check_registers(void)
{
        static const uint64_t vector[4] __attribute__((aligned(32))) = {
                0x0123456789abcdef, 0xfedcba9876543210, 0x5555aaaa5555aaaa, 0xdeadbeefcafef00d,
        };
        static uint64_t after[4] __attribute__((aligned(32)));
        uint32_t mxcsr = 0x1f80 | 0x6000, mxcsr_after = 0, normal = 0x1f80;
        long wrong;

        __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr));
        __asm__ volatile(
                "movups %[vector], %%xmm0\n\t"
                "movups 16+%[vector], %%xmm15\n\t"
                "movq %%rbp, %%xmm7\n\t"
                "leaq -16512(%%rsp), %%rdi\n\t"
                "movq $2048, %%rcx\n\t"
                "movq $0x5aa5, %%rax\n\t"
                "rep stosq\n\t"
                "movq $0x1111, %%rax\n\t"
                "movq $0x2222, %%rbx\n\t"
                "movq $0x3333, %%rdx\n\t"
                "movq $0x4444, %%rsi\n\t"
                "movq $0x5555, %%rdi\n\t"
                "movq $0x6666, %%r8\n\t"
                "movq $0x7777, %%r9\n\t"
                "movq $0x8888, %%r10\n\t"
                "movq $0x9999, %%r11\n\t"
                "movq $0xaaaa, %%r12\n\t"
                "movq $0xbbbb, %%r13\n\t"
                "movq $0xcccc, %%r14\n\t"
                "movq $0xdddd, %%rbp\n\t"
                "movq $0xeeee, -8(%%rsp)\n\t"
                "movq $0xffff, -128(%%rsp)\n\t"
                "movq $200000, %%rcx\n\t"
                "stc\n\t"
                "1: leaq -1(%%rcx), %%rcx\n\t"
                "jrcxz 2f\n\t"
                "jc 1b\n\t"
                "2: movq $1, %%r15\n\t"
                "jnc 3f\n\t"
                "incq %%r15\n\t"
                "testq %%rcx, %%rcx\n\t jnz 3f\n\t incq %%r15\n\t"
                "cmpq $0x1111, %%rax\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x2222, %%rbx\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x3333, %%rdx\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x4444, %%rsi\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x5555, %%rdi\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x6666, %%r8\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x7777, %%r9\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x8888, %%r10\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x9999, %%r11\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xaaaa, %%r12\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xbbbb, %%r13\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xcccc, %%r14\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xdddd, %%rbp\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xeeee, -8(%%rsp)\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xffff, -128(%%rsp)\n\t jne 3f\n\t"
                "incq %%r15\n\t"
                "testl $1, %[careless]\n\t"
                "jnz 4f\n\t"
                "leaq -16512(%%rsp), %%rdi\n\t"
                "movq $2048, %%rcx\n\t"
                "movq $0x5aa5, %%rax\n\t"
                "repe scasq\n\t jne 3f\n\t"
                "4: xorq %%r15, %%r15\n\t"
                "3: movq %%xmm7, %%rbp\n\t"
                "movq %%r15, %%rax"
                : "=a"(wrong)
                : [vector] "m"(vector), [careless] "m"(eintr_allowed)
                : "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0",
                  "xmm7", "xmm15", "cc", "memory");
        __asm__ volatile("movups %%xmm0, %0\n\tmovups %%xmm15, %1\n\tstmxcsr %2"
                         : "=m"(after[0]), "=m"(after[2]), "=m"(mxcsr_after));
        __asm__ volatile("ldmxcsr %0" : : "m"(normal));
        expect("registers", wrong, 0);
        expect("mxcsr", mxcsr_after, mxcsr);
        expect("xmm", memcmp(vector, after, 8) || memcmp(vector + 2, after + 2, 8), 0);
}

/* User code with something in every byte of the vector registers, as wide as the CPU has them. */
static const char pattern[64] = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_";

static __attribute__((target("avx512f"))) void keep_zmm(char *after)
{
        __asm__ volatile(
                "vmovdqu64 (%1), %%zmm3\n\t"
                "vmovdqu64 (%1), %%zmm20\n\t"
                "movq $300000, %%rcx\n\t"
                "1: decq %%rcx\n\t"
                "jnz 1b\n\t"
                "vpandq %%zmm3, %%zmm20, %%zmm20\n\t"
                "vmovdqu64 %%zmm20, (%0)"
                :
                : "r"(after), "r"(pattern)
                : "rcx", "xmm3", "xmm20", "cc", "memory");
}

static __attribute__((target("avx"))) void keep_ymm(char *after)
{
        __asm__ volatile(
                "vmovdqu (%1), %%ymm3\n\t"
                "vmovdqu 32(%1), %%ymm12\n\t"
                "movq $300000, %%rcx\n\t"
                "1: decq %%rcx\n\t"
                "jnz 1b\n\t"
                "vmovdqu %%ymm3, (%0)\n\t"
                "vmovdqu %%ymm12, 32(%0)"
                :
                : "r"(after), "r"(pattern)
                : "rcx", "xmm3", "xmm12", "cc", "memory");
}

static void check_vectors(void)
{
        char after[sizeof(pattern)];

        if (__builtin_cpu_supports("avx512f")) {
                keep_zmm(after);
                expect("zmm", memcmp(after, pattern, sizeof(pattern)), 0);
        }
        if (__builtin_cpu_supports("avx")) {
                keep_ymm(after);
                expect("ymm", memcmp(after, pattern, sizeof(pattern)), 0);
        }
}

/*
 * The main thread is on a small stack of its own for a while, with another thread's memory right below it; then it
 * waits on its main stack, unless told to stay.
 */
enum { SMALL_STACK = 4096, BELOW = 16384 };

static _Atomic uint64_t *below;
static ucontext_t on_main, on_small;
static int stays;

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

static void check_coroutine(void)
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
static void check_deep(void)
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

/*
 * A restartable sequence that never commits: it spins until the kernel, or whoever took its place, sends it to the
 * abort handler, which counts and starts it anew. If a sequence is forgotten, the counter stops for good.
 */
static _Atomic long aborts;

static void *report_aborts(void *unused)
{
        char byte;

        /* One line for every byte on standard input. */
        while (read(0, &byte, 1) == 1) {
                printf("%ld\n", aborts);
                fflush(stdout);
        }
        printf("%ld\n", aborts);
        fflush(stdout);
        _exit(0);
        return unused;
}

static void check_rseq(void)
{
        struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
        pthread_t thread;

        if (__rseq_size == 0)
                fail("no rseq", 0);
        if (pthread_create(&thread, NULL, report_aborts, NULL))
                fail("pthread_create", -1);
        __asm__ volatile(
                ".pushsection __rseq_cs, \"aw\"\n\t"
                ".balign 32\n\t"
                "1: .long 0, 0\n\t"
                ".quad 2f, 3f - 2f, 4f\n\t"
                ".popsection\n\t"
                "5: leaq 1b(%%rip), %%rax\n\t"
                "movq %%rax, %[rseq_cs]\n\t"
                "2: pause\n\t"
                "jmp 2b\n\t"
                "3: ud2\n\t"
                ".long 0x53053053\n\t"           /* RSEQ_SIG, as glibc registers it */
                "4: lock incq %[aborts]\n\t"
                "jmp 5b"
                : [rseq_cs] "+m"(area->rseq_cs), [aborts] "+m"(aborts)
                :
                : "rax", "cc", "memory");
}

/* Queued signals arrive all of them, in order, each with its value, and interrupt what they interrupt. */
static _Atomic int received;

static void on_queued(int number, siginfo_t *info, void *context)
{
        (void)number;
        (void)context;
        if (info->si_code != SI_QUEUE || info->si_value.sival_int != received + 1)
                fail("queued signal", info->si_value.sival_int);
        received++;
}

static void *queue_signals(void *unused)
{
        union sigval value = { .sival_int = 0 };

        while (!done) {
                value.sival_int++;
                while (sigqueue(getpid(), SIGRTMIN, value))
                        ;
                while (received != value.sival_int && !done)
                        usleep(50);
        }
        return unused;
}

static void check_signals(void)
{
        static pthread_t thread;
        static sigset_t inside;
        sigset_t now;
        int before, result;

        if (!thread) {
                struct sigaction action = { .sa_sigaction = on_queued, .sa_flags = SA_SIGINFO };

                sigaction(SIGRTMIN, &action, NULL);
                sigemptyset(&inside);
                if (pthread_create(&thread, NULL, queue_signals, NULL))
                        fail("pthread_create", -1);
        }
        before = received;
        result = ppoll(NULL, 0, &ms, &inside);
        if (result == 0 && received != before && !eintr_allowed)
                fail("ppoll missed a signal", received);
        if (result == -1 && (errno != EINTR || received == before))
                fail("ppoll", result);
        pthread_sigmask(SIG_SETMASK, NULL, &now);
        expect("SIGRTMIN blocked", sigismember(&now, SIGRTMIN), 1);
        expect("SIGUSR1 blocked", sigismember(&now, SIGUSR1), 0);
}

/*
 * The main thread runs a vCPU. The guest writes 0, 1, 2, ... to port 0x10 with a delay between them, so that most stops
 * come within KVM_RUN. Its IRQ 0 to 15 stay masked.
 */
static void check_kvm_run(void)
{
        /* 1: outb %al, $0x10; inc %ax; mov $2000, %cx; loop .; jmp 1b */
        static const unsigned char code[] = { 0xe6, 0x10, 0x40, 0xb9, 0xd0, 0x07, 0xe2, 0xfe, 0xeb, 0xf6 };
        static struct kvm_run *run;
        static int vcpu;
        static unsigned char expected;

        if (!run) {
                int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
                int vm = ioctl(kvm, KVM_CREATE_VM, 0);
                unsigned char *ram = mmap(NULL, 0x1000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
                struct kvm_userspace_memory_region region = { 0, 0, 0, 0x1000, (uintptr_t)ram };
                struct kvm_sregs sregs;
                struct kvm_regs regs = { .rip = 0x100, .rflags = 2 };

                if (kvm < 0 || vm < 0)
                        fail("KVM_CREATE_VM", vm);
                memcpy(ram + 0x100, code, sizeof(code));
                expect("KVM_SET_TSS_ADDR", ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), 0);
                expect("KVM_CREATE_IRQCHIP", ioctl(vm, KVM_CREATE_IRQCHIP, 0), 0);
                expect("KVM_SET_USER_MEMORY_REGION", ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), 0);
                vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
                run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
                expect("KVM_GET_SREGS", ioctl(vcpu, KVM_GET_SREGS, &sregs), 0);
                sregs.cs.base = sregs.cs.selector = 0;
                expect("KVM_SET_SREGS", ioctl(vcpu, KVM_SET_SREGS, &sregs), 0);
                expect("KVM_SET_REGS", ioctl(vcpu, KVM_SET_REGS, &regs), 0);
        }
        if (ioctl(vcpu, KVM_RUN, 0)) {
                expect_or_eintr("KVM_RUN", -1, 0);
                return;
        }
        expect("exit reason", run->exit_reason, KVM_EXIT_IO);
        expect("port data", ((unsigned char *)run)[run->io.data_offset], expected);
        expected++;
}

/*
 * The main thread is in uninterruptible sleep until its child, which shares its memory, ends: no signal and no tracer
 * can reach it. A child says so: a second one would mean that the call was made twice.
 */
static void check_vfork(void)
{
        char byte;
        pid_t child = vfork();

        if (child == 0) {
                while (read(0, &byte, 1) > 0)
                        ;
                _exit(write(1, "child\n", 6) != 6);
        }
        done = 1;
}

static const struct {
        const char *name;
        void (*round)(void);
} checks[] = {
        { "ppoll", check_ppoll },
        { "poll", check_poll },
        { "pselect", check_pselect },
        { "nanosleep", check_nanosleep },
        { "clock_nanosleep", check_clock_nanosleep },
        { "futex", check_futex },
        { "epoll_wait", check_epoll_wait },
        { "sigtimedwait", check_sigtimedwait },
        { "semtimedop", check_semtimedop },
        { "socket", check_socket },
        { "io_uring", check_io_uring },
        { "io_getevents", check_io_getevents },
        { "read", check_read },
        { "registers", check_registers },
        { "vectors", check_vectors },
        { "coroutine", check_coroutine },
        { "deep", check_deep },
        { "rseq", check_rseq },
        { "signals", check_signals },
        { "kvm_run", check_kvm_run },
        { "vfork", check_vfork },
};

static void *until_end_of_input(void *unused)
{
        char byte;

        while (read(0, &byte, 1) > 0)
                ;
        done = 1;
        return unused;
}

int main(int argc, char **argv)
{
        void (*round)(void) = NULL;
        long rounds = 0;
        pthread_t thread;
        sigset_t queued;

        check = argc > 1 ? argv[1] : "";
        eintr_allowed = argc > 2 && strcmp(argv[2], "eintr") == 0;
        stays = argc > 2 && strcmp(argv[2], "stay") == 0;
        for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++)
                if (strcmp(checks[i].name, check) == 0)
                        round = checks[i].round;
        if (!round)
                fail("no such check", 0);
        /* Blocked in every thread, let in only where check_signals() waits. */
        sigemptyset(&queued);
        sigaddset(&queued, SIGRTMIN);
        pthread_sigmask(SIG_BLOCK, &queued, NULL);
        printf("ready\n");
        fflush(stdout);
        if (round != check_rseq && round != check_vfork && pthread_create(&thread, NULL, until_end_of_input, NULL))
                fail("pthread_create", -1);
        do {
                round();
                rounds++;
        } while (!done);
        printf("%ld rounds\n", rounds);
        return 0;
}
