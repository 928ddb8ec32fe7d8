/*
 * The processor's state in one form, its hash, and the names of its fields.
 *
 * Left out of the comparison: XSTATE_BV, for a processor may call initial state used (SDM vol. 1, 13.6) and Linux does so after signals (the interpreter shows guests none of it); where the last x87 instruction was and what it accessed (FOP, FIP, FDP), which the translator does not keep (tests/conform/README.md); what lies between
 * the XSAVE image's components, and components in their initial state, whose bytes in the image mean nothing (SDM vol. 1, 13.7); RF, see resume_flag_dropped in engine/bt/bt.c.
 */
#include <cpuid.h>
#include <string.h>

#include "lockstep.h"

#define XSAVE_FCW_INIT 0x37f
#define XSAVE_BV_AT 512
#define COMPONENTS 8

/* ---- hashing ---- */

#define LANES 4
#define MULTIPLIER 0x9e3779b97f4a7c15ull

static inline uint64_t mix(uint64_t lane, uint64_t word)
{
    lane = (lane ^ word) * MULTIPLIER;
    return lane ^ lane >> 29;
}

uint64_t hash_bytes(const void *data, uint64_t length_bytes, uint64_t seed)
{
    const uint64_t *p = data;
    uint64_t words = length_bytes / 8, n = 0, lane[LANES] = {seed, seed + 1, seed + 2, seed + 3};
    for (; n + LANES <= words; n += LANES)
        for (unsigned k = 0; k < LANES; k++)
            lane[k] = mix(lane[k], p[n + k]);
    for (; n < words; n++)
        lane[0] = mix(lane[0], p[n]);
    uint64_t h = length_bytes;
    for (unsigned k = 0; k < LANES; k++)
        h = mix(h, lane[k]);
    return h ? h : 1;
}

/* ---- one form ---- */

struct component {
    unsigned size, offset;
};

/* CPUID is asked once: under a hypervisor it is slow. */
static const struct component *components(void)
{
    static struct component table[COMPONENTS];
    for (unsigned n = 2; n < COMPONENTS && !table[2].size; n++) {
        unsigned c, d;
        struct component *to = &table[COMPONENTS + 1 - n]; /* component 2 last */
        if (!__get_cpuid_count(0xd, COMPONENTS + 1 - n, &to->size, &to->offset, &c, &d) || to->offset + to->size > CPU_XSAVE_BYTES)
            *to = (struct component){0};
    }
    return table;
}

static void vector_state_clean(uint8_t image[CPU_XSAVE_BYTES])
{
    uint8_t clean[CPU_XSAVE_BYTES] = {0};
    uint64_t bv;
    memcpy(&bv, image + XSAVE_BV_AT, 8);
    if (bv & XCR0_X87) {
        memcpy(clean, image, 5); /* FCW, FSW, FTW */
        for (unsigned n = 0; n < 8; n++)
            memcpy(clean + 32 + 16 * n, image + 32 + 16 * n, 10);
    } else {
        clean[0] = XSAVE_FCW_INIT & 0xff;
        clean[1] = XSAVE_FCW_INIT >> 8;
    }
    memcpy(clean + 24, image + 24, 4); /* MXCSR belongs to no component's bit (SDM vol. 1, 13.7) */
    if (bv & XCR0_SSE)
        memcpy(clean + 160, image + 160, 256);
    for (unsigned n = 2; n < COMPONENTS; n++)
        if (bv >> n & 1)
            memcpy(clean + components()[n].offset, image + components()[n].offset, components()[n].size);
    memcpy(image, clean, sizeof clean);
}

static struct segment segment_clean(const struct segment *from)
{
    struct segment to;
    memset(&to, 0, sizeof to); /* padding, too */
    to.base = from->base;
    to.limit = from->limit;
    to.selector = from->selector;
    to.attributes = from->attributes;
    to.unusable = from->unusable;
    return to;
}

void state_capture(struct cpu_state *to, const struct vcpu *vcpu, bool running)
{
    const struct cpu_state *from = &vcpu->cpu;
    *to = *from;
    if (running)
        to->rflags = flags_get((const struct icpu *)vcpu);
    to->rflags &= ~RFLAGS_RF;
    for (unsigned n = 0; n < SEG_COUNT; n++)
        to->seg[n] = segment_clean(&from->seg[n]);
    to->ldtr = segment_clean(&from->ldtr);
    to->tr = segment_clean(&from->tr);
    vector_state_clean(to->xsave);
}

#define BYTES_OF(state, first, last) &(state)->first, offsetof(struct cpu_state, last) + sizeof((state)->last) - offsetof(struct cpu_state, first)

uint64_t state_hash(const struct cpu_state *s)
{
    uint64_t h = hash_bytes(BYTES_OF(s, gpr, rflags), 0);
    for (unsigned n = 0; n < SEG_COUNT; n++)
        h = hash_bytes(&s->seg[n], sizeof s->seg[n], h);
    h = hash_bytes(&s->ldtr, sizeof s->ldtr, h);
    h = hash_bytes(&s->tr, sizeof s->tr, h);
    const uint64_t tables[] = {s->gdtr.base, s->gdtr.limit, s->idtr.base, s->idtr.limit, s->activity, s->interrupt_shadow, s->nmi_blocked};
    h = hash_bytes(tables, sizeof tables, h);
    h = hash_bytes(BYTES_OF(s, cr0, tsc_offset), h);
    return hash_bytes(s->xsave, sizeof s->xsave, h);
}

/* ---- names ---- */

static const struct field {
    const char *name;
    uint16_t offset, size, count; /* of an array of 64-bit numbers: how many */
} fields[] = {
#define FIELD(member) {#member, offsetof(struct cpu_state, member), sizeof((struct cpu_state *)0)->member, 1},
#define ARRAY(member, count) {#member, offsetof(struct cpu_state, member), 8, count},
#define SEGMENT(name, member) {name " base", offsetof(struct cpu_state, member.base), 8, 1}, {name " limit", offsetof(struct cpu_state, member.limit), 4, 1}, \
        {name " selector", offsetof(struct cpu_state, member.selector), 2, 1}, {name " attributes", offsetof(struct cpu_state, member.attributes), 2, 1}, \
        {name " unusable", offsetof(struct cpu_state, member.unusable), 1, 1},
#define GPR(name, n) {name, offsetof(struct cpu_state, gpr) + 8 * n, 8, 1},
    GPR("RAX", 0) GPR("RCX", 1) GPR("RDX", 2) GPR("RBX", 3) GPR("RSP", 4) GPR("RBP", 5) GPR("RSI", 6) GPR("RDI", 7)
    GPR("R8", 8) GPR("R9", 9) GPR("R10", 10) GPR("R11", 11) GPR("R12", 12) GPR("R13", 13) GPR("R14", 14) GPR("R15", 15)
    GPR("RIP", 16) FIELD(rflags)
    SEGMENT("ES", seg[SEG_ES]) SEGMENT("CS", seg[SEG_CS]) SEGMENT("SS", seg[SEG_SS]) SEGMENT("DS", seg[SEG_DS]) SEGMENT("FS", seg[SEG_FS])
    SEGMENT("GS", seg[SEG_GS]) SEGMENT("LDTR", ldtr) SEGMENT("TR", tr)
    FIELD(gdtr.base) FIELD(gdtr.limit) FIELD(idtr.base) FIELD(idtr.limit)
    FIELD(cr0) FIELD(cr2) FIELD(cr3) FIELD(cr4) FIELD(efer) ARRAY(dr, 8) FIELD(xcr0) ARRAY(pdpte, 4)
    FIELD(msr_star) FIELD(msr_lstar) FIELD(msr_cstar) FIELD(msr_sfmask) FIELD(msr_kernel_gs_base)
    FIELD(msr_sysenter_cs) FIELD(msr_sysenter_esp) FIELD(msr_sysenter_eip)
    FIELD(msr_pat) FIELD(msr_tsc_aux) FIELD(msr_tsc_adjust) FIELD(msr_misc_enable) FIELD(msr_spec_ctrl)
    FIELD(msr_mtrr_def_type) ARRAY(msr_mtrr_fixed, 11) ARRAY(msr_mtrr_base, 8) ARRAY(msr_mtrr_mask, 8) FIELD(msr_mcg_status) FIELD(msr_mcg_ctl)
    FIELD(tsc_offset) FIELD(activity) FIELD(interrupt_shadow) FIELD(nmi_blocked)
    ARRAY(xsave, CPU_XSAVE_BYTES / 8)
};

static unsigned field_differences(const struct field *f, const struct cpu_state *a, const struct cpu_state *b, const char *const names[2])
{
    unsigned count = 0;
    for (unsigned n = 0; n < f->count; n++) {
        uint64_t x = 0, y = 0;
        memcpy(&x, (const uint8_t *)a + f->offset + f->size * n, f->size);
        memcpy(&y, (const uint8_t *)b + f->offset + f->size * n, f->size);
        if (x == y)
            continue;
        char name[48];
        if (f->count > 1)
            snprintf(name, sizeof name, "%s[%u]", f->name, n);
        else
            snprintf(name, sizeof name, "%s", f->name);
        printf("    %-20s %s %016llx  %s %016llx\n", name, names[0], (unsigned long long)x, names[1], (unsigned long long)y);
        count++;
    }
    return count;
}

unsigned state_differences(const struct cpu_state *a, const struct cpu_state *b, const char *const names[2])
{
    unsigned count = 0;
    for (unsigned n = 0; n < sizeof fields / sizeof *fields; n++)
        count += field_differences(&fields[n], a, b, names);
    return count;
}
