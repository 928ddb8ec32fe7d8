/*
 * CPUID: the guest's table cut down to what KVM can give on this host, and handed to each vCPU.
 *
 * KVM's list does not have what is the table's own (topology, OSXSAVE, the hypervisor bit) or depends on where the local APIC is; those bits stay. TSC-deadline timers are offered with the
 * local APIC in the kernel only: elsewhere KVM's fast path for that MSR may take the write away from us (KVM_GET_SUPPORTED_CPUID in api.rst says the same).
 * Threading: before the first vCPU runs.
 */
#include <stdlib.h>
#include <string.h>

#include "engine/kvm/kvm_priv.h"
#include "util/log.h"

#define ENTRIES_MAX 256u
#define BIT(n) (1u << (n))
#define L1_ECX_DEADLINE BIT(24)

struct supported {
    struct engine *engine;
    struct kvm_cpuid2 *list;
};

/* Bits that are not KVM's to give or take. */
static const struct {
    uint32_t leaf, subleaf;
    struct cpuid_regs own;
} own_bits[] = {
    {1, 0, {.ecx = BIT(21) /* x2APIC */ | BIT(27) /* OSXSAVE */ | BIT(31) /* hypervisor */, .edx = BIT(9) /* APIC */ | BIT(28) /* HTT */}},
    {0x80000001, 0, {.ecx = BIT(1) /* CmpLegacy */ | BIT(22) /* topology extensions */, .edx = BIT(9)}},
};

static struct cpuid_regs allowed(void *ctx, uint32_t leaf, uint32_t subleaf)
{
    const struct supported *s = ctx;
    struct cpuid_regs r = {0};
    for (unsigned n = 0; n < s->list->nent; n++) {
        const struct kvm_cpuid_entry2 *e = &s->list->entries[n];
        if (e->function == leaf && (!(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e->index == subleaf))
            r = (struct cpuid_regs){e->eax, e->ebx, e->ecx, e->edx};
    }
    for (unsigned n = 0; n < sizeof own_bits / sizeof *own_bits; n++) {
        if (own_bits[n].leaf != leaf || own_bits[n].subleaf != subleaf)
            continue;
        r.ecx |= own_bits[n].own.ecx;
        r.edx |= own_bits[n].own.edx;
    }
    if (leaf == 1)
        r.ecx = s->engine->split ? r.ecx | L1_ECX_DEADLINE : r.ecx & ~L1_ECX_DEADLINE;
    return r;
}

static struct kvm_cpuid2 *list_create(void)
{
    struct kvm_cpuid2 *list = calloc(1, sizeof *list + ENTRIES_MAX * sizeof *list->entries);
    if (list)
        list->nent = ENTRIES_MAX;
    return list;
}

int kvm_limit_cpuid(struct engine *e, struct cpuid_table *cpuid, struct error *err)
{
    struct supported s = {e, list_create()};
    if (!s.list)
        return error_set(err, -ENOMEM, "out of memory");
    int r = kvm_call(e->kvm, KVM_GET_SUPPORTED_CPUID, s.list);
    if (r)
        error_set(err, r, "/dev/kvm does not say which processor features it has: %s", strerror(-r));
    else
        r = cpuid_limit(cpuid, allowed, &s, err);
    free(s.list);
    return r;
}

int kvm_cpuid_push(struct kvm_cpu *c)
{
    struct kvm_cpuid2 *list = list_create();
    uint32_t leaf, subleaf;
    unsigned n = 0;
    if (!list)
        return -ENOMEM;
    for (; n < ENTRIES_MAX && cpuid_entry(c->v.cpuid, n, &leaf, &subleaf); n++) {
        bool any = subleaf == CPUID_ANY_SUBLEAF;
        struct cpuid_regs r = cpuid_query(c->v.cpuid, &c->v.cpu, c->v.index, leaf, any ? 0 : subleaf);
        list->entries[n] = (struct kvm_cpuid_entry2){
            .function = leaf, .index = any ? 0 : subleaf, .flags = any ? 0 : KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .eax = r.eax, .ebx = r.ebx, .ecx = r.ecx, .edx = r.edx};
    }
    list->nent = n;
    int r = kvm_call(c->fd, KVM_SET_CPUID2, list);
    if (r)
        log_error("kvm: processor %u: CPUID was refused: %s", c->v.index, strerror(-r));
    free(list);
    return r;
}
