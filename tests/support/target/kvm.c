/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A vCPU. */
#include "target.h"

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/*
 * The main thread runs a vCPU. The guest writes 0, 1, 2, ... to port 0x10 with a delay between them, so that most stops
 * come within KVM_RUN. Its IRQ 0 to 15 stay masked.
 */
void check_kvm_run(void)
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
