/*
 * A process without a life of its own: an address space that holds pages of guest RAM where the caller says, in which guest user code runs on the processor itself.
 *
 * It is traced by the thread that made it, and every function here is for that thread. Whatever its code does ends in a stop: its system calls are not
 * executed (PTRACE_SYSEMU, and a seccomp filter behind that), its faults are signals. Its descriptors are the guest's RAM and nothing else.
 * One page of it, direct_child_hidden, is not the guest's: code for changing the mappings.
 */
#ifndef DOPPEL_ENGINE_BT_DIRECT_CHILD_H
#define DOPPEL_ENGINE_BT_DIRECT_CHILD_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

#include "util/error.h"

#define DIRECT_ADDRESS_FIRST 0x10000ull        /* what lies below may be forbidden (vm.mmap_min_addr) */
#define DIRECT_ADDRESS_LIMIT 0x7ffffffff000ull /* what lies above cannot be mapped */
#define DIRECT_HIDDEN_BYTES 0x21000ull

enum direct_stop {
    DIRECT_SYSCALL, /* system call instruction executed: RIP is behind it, orig_rax has the guest's RAX */
    DIRECT_FAULT,   /* an exception: the instruction at RIP has had no effect */
    DIRECT_TRAP,    /* INT3 and the like: RIP is behind it */
    DIRECT_STEP,    /* TF was set before the last instruction */
    DIRECT_KICKED,  /* direct_child_kick, or somebody's signal */
    DIRECT_REFUSED, /* the kernel does not take these registers, or the process is gone: nothing has run */
    DIRECT_GONE,    /* the process was killed while it ran: its registers are lost */
};

struct direct_child;

/* ram_fd: guest memory. -errno: not on this host, or not now, with the reason in *err. */
int direct_child_create(struct direct_child **child, int ram_fd, struct error *err) __attribute__((warn_unused_result));
void direct_child_destroy(struct direct_child *child);

/* Queues: [address, +bytes) becomes the RAM at `offset` with PROT_* rights; prot 0: nothing. Page aligned. */
void direct_child_map(struct direct_child *child, uint64_t address, uint64_t bytes, uint64_t offset, int prot);
/* Queues: nothing is mapped any more. */
void direct_child_unmap_all(struct direct_child *child);
/* Does what is queued. -errno: not all of it was done, and the address space must be thrown away. */
int direct_child_flush(struct direct_child *child) __attribute__((warn_unused_result));

/*
 * Runs until a stop. *regs: in and out; of RFLAGS those bits that user code may change, but for ID: it stays what the process's code made it, and is as
 * direct_child_fixed_flags says. RDTSC faults.
 */
enum direct_stop direct_child_run(struct direct_child *child, struct user_regs_struct *regs);
uint64_t direct_child_fixed_flags(const struct direct_child *child);
/* DIRECT_FAULT was a memory access: its address; ~0: another exception. */
uint64_t direct_child_fault_address(const struct direct_child *child);
/* The x87/SSE/AVX state in the standard XSAVE layout, `bytes` of it at most. 0 or -errno. */
int direct_child_vectors_set(struct direct_child *child, void *xsave, unsigned bytes) __attribute__((warn_unused_result));
int direct_child_vectors_get(struct direct_child *child, void *xsave, unsigned bytes) __attribute__((warn_unused_result));

/* Stops before the instructions at these addresses from now on (DIRECT_FAULT); 0: none. 0 or -errno. */
#define DIRECT_BREAKPOINTS 4u
int direct_child_break_at(struct direct_child *child, const uint64_t address[DIRECT_BREAKPOINTS]) __attribute__((warn_unused_result));

/* Makes it run on the processor `cpu` only. */
void direct_child_pin(struct direct_child *child, int cpu);
uint64_t direct_child_cpu_ns(const struct direct_child *child); /* processor time it has had by its last stop, to the microsecond */
pid_t direct_child_pid(const struct direct_child *child);
/* Any thread, while the process is not destroyed: ends a run under way, or the next one. */
int direct_child_kicker(const struct direct_child *child);
void direct_child_kick(int kicker);
/* First address of DIRECT_HIDDEN_BYTES that the guest must not have mapped. */
uint64_t direct_child_hidden(const struct direct_child *child);

#endif
