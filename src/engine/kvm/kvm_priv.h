/*
 * The inside of the KVM engine: kvm.c (the engine: probing, creation, memory slots, dirty log), vcpu.c (the run loop and exits), kvm_state.c (cpu_state to and from KVM's
 * structures), kvm_msr.c (MSRs that are kept here and not in KVM), kvm_cpuid.c, kvm_irqchip.c (local APICs in the host's kernel).
 */
#ifndef DOPPEL_ENGINE_KVM_KVM_PRIV_H
#define DOPPEL_ENGINE_KVM_KVM_PRIV_H

#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/types.h>
#include <time.h>

#include "engine/engine.h"

#define KVM_MSRS_MAX 16u
#define KVM_IOAPIC_PINS 24u

struct memory_slot {
    bool used;
    struct physmap_range range;
};

struct engine {
    struct physmap *memory;
    int kvm, vm;
    size_t run_bytes, xsave_bytes;
    bool split;          /* local APICs are in the host's kernel */
    bool manual_protect; /* the dirty log is cleared apart from reading it */
    bool has_tsc_aux, has_spec_ctrl;
    atomic_bool told_no_offset;
    uint64_t arch_capabilities;

    pthread_mutex_t lock; /* slots, logging, level pins */
    struct memory_slot *slots; /* by KVM's number */
    unsigned slot_count, slots_max;
    bool logging;
    struct {
        uint64_t address;
        uint32_t data;
    } level_pin[KVM_IOAPIC_PINS];
};

/* Everything of a vCPU that KVM keeps, in KVM's own structures. */
struct kvm_image {
    struct kvm_regs regs;
    struct kvm_sregs2 sregs;
    struct kvm_debugregs debug;
    struct kvm_vcpu_events events;
    struct kvm_xcrs xcrs;
    struct kvm_mp_state mp;
    struct kvm_msr_entry msr[KVM_MSRS_MAX];
    unsigned msr_count;
    uint64_t tsc_offset;
    struct kvm_xsave *xsave; /* engine->xsave_bytes, the caller's */
};

struct kvm_cpu {
    struct vcpu v; /* first */
    struct engine *engine;
    int fd;
    struct kvm_run *run;
    struct kvm_xsave *xsave;
    bool stale;           /* KVM's state is older than v.cpu */
    bool has_cpuid;
    bool extint_given;    /* split: an 8259's vector was handed to KVM, and the guest may not have been entered since */
    _Atomic pid_t thread; /* inside run: the thread to interrupt; 0: none */
    pid_t prepared;       /* the thread that has the kick signal unblocked, and `alarm` aimed at it */
    timer_t alarm;
    bool has_alarm;
};

/* 0 or -errno. */
static inline int kvm_call(int fd, unsigned long request, const void *argument)
{
    return ioctl(fd, request, argument) < 0 ? -errno : 0;
}

/* kvm_state.c: conversion alone. The image's MSRs are those that engine has; its apic_base and cr8 are the caller's. */
void kvm_image_from(struct kvm_image *image, const struct engine *engine, const struct cpu_state *cpu);
void kvm_image_to(const struct kvm_image *image, struct cpu_state *cpu);
/* All of a vCPU's state into KVM, and out of it. 0 or -errno, with a logged line. */
int kvm_state_push(struct kvm_cpu *c);
int kvm_state_pull(struct kvm_cpu *c);
int kvm_push_tsc_offset(struct kvm_cpu *c); /* v.cpu.tsc_offset; afterwards it is what KVM has */

/* kvm_msr.c */
int kvm_msr_filter_set(struct engine *e, struct error *err);
/* An RDMSR or WRMSR that KVM leaves to us. */
void kvm_msr_exit(struct kvm_cpu *c);

/* kvm_cpuid.c */
int kvm_limit_cpuid(struct engine *e, struct cpuid_table *cpuid, struct error *err);
int kvm_cpuid_push(struct kvm_cpu *c);

/* kvm_irqchip.c */
int kvm_irqchip_split(struct engine *e);
const struct engine_irqchip_ops *kvm_irqchip(struct engine *e);

/* vcpu.c */
int kvm_vcpu_create(struct engine *e, const struct vcpu_config *config, struct vcpu **out, struct error *err);
void kvm_vcpu_destroy(struct vcpu *v);
enum engine_exit kvm_vcpu_run(struct vcpu *v);
void kvm_vcpu_kick(struct vcpu *v);
void kvm_vcpu_state_changed(struct vcpu *v);
int kvm_kick_handler_install(void);

#endif
