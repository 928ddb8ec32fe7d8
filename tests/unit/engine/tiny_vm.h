/*
 * A machine for fragments: 16 MiB of RAM, one vCPU, and host_ops that record what they are asked.
 *
 * The processor starts in a mode of choice with flat segments at TINY_CODE. Vector n's handler is HLT at TINY_HANDLER + 16 * n, so that after a fault rip tells which one and the
 * stack holds the frame. In 64-bit mode the first GiB is mapped one to one by 2 MiB pages (user, writable), without paging otherwise.
 */
#ifndef DOPPEL_TESTS_TINY_VM_H
#define DOPPEL_TESTS_TINY_VM_H

#include "engine/engine.h"

#define TINY_RAM_BYTES (16u << 20)
#define TINY_PML4 0x1000u
#define TINY_PDPT 0x2000u
#define TINY_PD 0x3000u
#define TINY_GDT 0x4000u
#define TINY_IDT 0x5000u
#define TINY_TSS 0x6000u
#define TINY_STACK 0x7ff0u    /* ring 0, from here down */
#define TINY_HANDLER 0x9000u
#define TINY_CODE 0x10000u
#define TINY_DATA 0x20000u
#define TINY_USER_STACK 0x30000u
#define TINY_MMIO 0x3f000000u /* below 1 GiB and above the RAM */

enum tiny_selector {
    TINY_CS64 = 0x08,
    TINY_DS = 0x10,
    TINY_CS32 = 0x18,
    TINY_USER_DS = 0x23,
    TINY_USER_CS64 = 0x2b,
    TINY_USER_CS32 = 0x33,
    TINY_CS16 = 0x38,
    TINY_TR = 0x40,
};

enum tiny_mode { TINY_REAL, TINY_PROTECTED, TINY_LONG };

struct tiny_vm {
    const struct engine_ops *ops;
    struct physmap *memory;
    struct cpuid_table *cpuid;
    struct engine *engine;
    struct vcpu *vcpu;
    /* Recorded and played by host_ops. */
    int pending_vector; /* -1: none */
    bool pending_nmi;
    bool exit_wanted;
    uint16_t port;
    uint32_t port_value;
    unsigned port_writes;
    gpa_t mmio_gpa;
    uint64_t mmio_value;
    unsigned mmio_size, mmio_reads, mmio_writes;
};

/* 0 or -errno. */
int tiny_vm_create(struct tiny_vm *vm); /* of the interpreter */
int tiny_vm_create_with(struct tiny_vm *vm, const struct engine_ops *ops);
void tiny_vm_destroy(struct tiny_vm *vm);
/* Zeroes RAM, builds tables, copies code to TINY_CODE and points the processor at it. */
void tiny_vm_load(struct tiny_vm *vm, enum tiny_mode mode, const void *code, uint64_t size_bytes);
/* In 64-bit mode: continue in ring 3. */
void tiny_vm_enter_user(struct tiny_vm *vm, bool bits64);
/* Guest memory, for reading and writing by the test. */
void *tiny_vm_at(struct tiny_vm *vm, gpa_t gpa);
/* Maps one 4 KiB page in 64-bit mode at gva 1 GiB + 4096 * n to gpa with the entry bits given (tables at 0xa0000). */
#define TINY_PAGES 0x40000000ull
void tiny_vm_map(struct tiny_vm *vm, unsigned n, uint64_t entry);

#endif
