/*
 * Instructions about the machine itself: privilege, address spaces, page tables, flags, segment bases. Each template is put into the queue as a whole.
 *
 * A page table entry is changed with everything at hand that INVLPG needs, so that between the two nothing is fetched or read through it: what an engine would do there is its own affair.
 */
#include "sequence.h"

#include <string.h>

#define BYTES(m, ...) queue_template(m, (const uint8_t[]){__VA_ARGS__}, sizeof(const uint8_t[]){__VA_ARGS__})
#define FLAGS_RARE (RFLAGS_TF | RFLAGS_NT | RFLAGS_IOPL | RFLAGS_RF)

static uint8_t rex_b(unsigned reg)
{
    return (uint8_t)(0x48 | reg >> 3);
}

static void push(struct making *m, unsigned reg)
{
    BYTES(m, (uint8_t)(0x40 | reg >> 3), (uint8_t)(0x50 | (reg & 7)));
}

static uint64_t random_flags(struct making *m)
{
    uint64_t flags = generator_random(m->g) & (RFLAGS_OSZAPC | RFLAGS_DF | RFLAGS_IF | RFLAGS_ID);
    if (!encode_pick(m->g, 6))
        flags |= RFLAGS_AC;
    if (!encode_pick(m->g, 12))
        flags |= generator_random(m->g) & FLAGS_RARE;
    return flags;
}

static void queue_popf(struct making *m)
{
    uint32_t flags = (uint32_t)random_flags(m);
    uint8_t code[5] = {0x68};
    memcpy(code + 1, &flags, 4);
    stack_provide(m, 8);
    queue_add(m, code, 5);
    BYTES(m, 0x9d);
}

/* MOV reg, CRn; XOR reg, bit; MOV CRn, reg. */
static void control_toggle(struct making *m, unsigned number, unsigned bit)
{
    unsigned reg = register_pick(m);
    uint8_t modrm = (uint8_t)(0xc0 | number << 3 | (reg & 7)), extension = (uint8_t)(0x40 | reg >> 3);
    BYTES(m, extension, 0x0f, 0x20, modrm);
    BYTES(m, rex_b(reg), 0x0f, 0xba, (uint8_t)(0xf8 | (reg & 7)), (uint8_t)bit); /* btc */
    BYTES(m, extension, 0x0f, 0x22, modrm);
    m->s->tables_change = true;
}

static void queue_control(struct making *m)
{
    static const uint8_t cr4_bits[] = {2, 7, 16, 20, 21, 9};
    unsigned reg = register_pick(m);
    switch (encode_pick(m->g, 6)) {
    case 0:
        control_toggle(m, 0, encode_pick(m->g, 2) ? 3 : 16); /* TS, WP */
        break;
    case 1:
        control_toggle(m, 4, cr4_bits[encode_pick(m->g, sizeof cr4_bits)]);
        break;
    case 2:
        BYTES(m, 0x0f, 0x06); /* clts */
        break;
    default:
        BYTES(m, (uint8_t)(0x40 | reg >> 3), 0x0f, 0x20, (uint8_t)(0xc0 | (encode_pick(m->g, 4) ? 2 : 3) << 3 | (reg & 7)));
    }
}

/* To the other address space, or back to this one. */
static void queue_root(struct making *m)
{
    const struct cpu_state *cpu = &m->vm->vcpu->cpu;
    unsigned reg = register_pick(m), root = encode_pick(m->g, m->w->roots);
    uint64_t value = m->w->root[root];
    if (cpu->cr4 & CR4_PCIDE)
        value |= (root + 1) | (encode_pick(m->g, 2) ? 1ull << 63 : 0);
    queue_mov(m, reg, value);
    BYTES(m, (uint8_t)(0x40 | reg >> 3), 0x0f, 0x22, (uint8_t)(0xd8 | (reg & 7)));
    m->s->tables_change = true;
}

static gva_t editable_page(struct making *m)
{
    for (;;) {
        const struct page *page = &m->w->page[encode_pick(m->g, m->w->page_count)];
        if ((page->gva >> 12) - (m->rip >> 12) + 1 > 2) /* not what is being executed */
            return page->gva;
    }
}

static uint64_t new_entry(struct making *m, gva_t gva, uint64_t old)
{
    static const uint64_t bits[] = {1, 2, 2, 2, 4, 1ull << 63, 0x60, 0x100};
    const struct page *other = &m->w->page[encode_pick(m->g, m->w->page_count)];
    bool code = world_code_offset(m->w, m->vm, gva) >= 0;
    if (!encode_pick(m->g, 3) && !m->w->large && code == (other->kind == PAGE_CODE))
        return (old & ~0xffffff000ull) | other->gpa;
    uint64_t bit = bits[encode_pick(m->g, sizeof bits / sizeof *bits)];
    return bit == 0x100 && m->w->roots > 1 ? old : bit == 1ull << 63 && !code ? old ^ 2 : old ^ bit;
}

static void queue_table_edit(struct making *m)
{
    unsigned entry = register_pick(m), value = register_pick(m), linear = register_pick(m);
    gva_t gva = editable_page(m);
    gpa_t at = world_entry(m->w, m->vm, gva);
    uint64_t old;
    if (!at || entry == value || entry == linear || value == linear || (linear & 7) == 4 || (linear & 7) == 5)
        return;
    memcpy(&old, physmap_get(m->vm->memory, at, 8, PHYSMAP_READ), 8);
    queue_mov(m, entry, KERNEL + at);
    queue_mov(m, linear, gva + encode_pick(m->g, 4096));
    queue_mov(m, value, new_entry(m, gva, old));
    struct queued *q = BYTES(m, (uint8_t)(rex_b(entry) | value >> 3 << 2), 0x89, (uint8_t)(0x80 | (value & 7) << 3 | (entry & 7)), 0, 0, 0, 0);
    if ((entry & 7) == 4) { /* needs a SIB byte */
        uint8_t code[8] = {q->e.bytes[0], 0x89, (uint8_t)(0x84 | (value & 7) << 3), 0x24};
        m->queued--;
        queue_add(m, code, 8);
    }
    BYTES(m, (uint8_t)(0x40 | linear >> 3), 0x0f, 0x01, (uint8_t)(0x38 | (linear & 7))); /* invlpg */
    queue_mov(m, entry, encode_pick(m->g, 256)); /* nobody else is to read its accessed and dirty bits */
    m->edited = gva;
    m->s->tables_change = true;
}

static void queue_base(struct making *m)
{
    unsigned reg = register_pick(m), what = encode_pick(m->g, 4);
    uint8_t wide = encode_pick(m->g, 3) ? 8 : 0;
    if (what >= 2)
        queue_mov(m, reg, encode_pick(m->g, 8) ? target_pick(m, 8, true) - encode_pick(m->g, 256) : generator_random(m->g));
    BYTES(m, 0xf3, (uint8_t)(0x40 | wide | reg >> 3), 0x0f, 0xae, (uint8_t)(0xc0 | what << 3 | (reg & 7)));
}

static void queue_msr(struct making *m)
{
    uint64_t value = encode_pick(m->g, 8) ? target_pick(m, 8, true) : generator_random(m->g);
    if (m->loop_head && (m->loop_register < 3))
        return;
    queue_mov(m, GPR_RCX, 0xc0000100 + encode_pick(m->g, 3));
    queue_mov(m, GPR_RAX, (uint32_t)value);
    queue_mov(m, GPR_RDX, value >> 32);
    BYTES(m, 0x0f, encode_pick(m->g, 3) ? 0x30 : 0x32);
}

static void queue_iret(struct making *m)
{
    static const uint8_t to_user[] = {TINY_USER_DS, TINY_USER_CS64}, to_supervisor[] = {TINY_DS, TINY_CS64};
    const uint8_t *selectors = m->w->user && encode_pick(m->g, 3) ? to_user : to_supervisor;
    gva_t target = place_pick(m);
    unsigned reg = register_pick(m);
    stack_provide(m, 48);
    const uint64_t frame[] = {selectors[0], target_pick(m, 8, true) & ~7ull, random_flags(m), selectors[1], target};
    for (unsigned n = 0; n < 5; n++) {
        queue_mov(m, reg, frame[n]);
        push(m, reg);
    }
    BYTES(m, 0x48, 0xcf);
}

static void queue_sysret(struct making *m)
{
    if (m->loop_head && (m->loop_register == GPR_RCX || m->loop_register == GPR_R11))
        return;
    queue_mov(m, GPR_RCX, place_pick(m));
    queue_mov(m, GPR_R11, random_flags(m));
    BYTES(m, 0x48, 0x0f, 0x07);
}

/* Loading SS holds interrupts back for one instruction. */
static void queue_stack_segment(struct making *m)
{
    if (m->loop_head && m->loop_register == GPR_RAX)
        return;
    queue_mov(m, GPR_RAX, TINY_DS);
    BYTES(m, 0x8e, 0xd0);
}

static void queue_selector(struct making *m)
{
    unsigned reg = register_pick(m);
    BYTES(m, (uint8_t)(0x40 | reg >> 3 | (encode_pick(m->g, 2) ? 8 : 0)), 0x8c, (uint8_t)(0xc0 | encode_pick(m->g, 6) << 3 | (reg & 7)));
}

/* ---- 32-bit code, and ways between it and 64-bit code ---- */

/* A far return, or IRET, to code of the same privilege of any width. IRETD pops no stack then. */
static void queue_far(struct making *m)
{
    bool user = m->rules.user, narrow = encode_pick(m->g, 3) > (m->rules.narrow ? 1u : 0u), is_iret = encode_pick(m->g, 2);
    unsigned reg = register_pick(m), cs = user ? (narrow ? TINY_USER_CS32 : TINY_USER_CS64) : narrow ? TINY_CS32 : TINY_CS64;
    const uint64_t frame[] = {user ? TINY_USER_DS : TINY_DS, target_pick(m, 8, true) & ~7ull, random_flags(m), cs, place_pick(m)};
    stack_provide(m, 48);
    for (unsigned n = !is_iret ? 3 : m->rules.narrow ? 2 : 0; n < 5; n++) {
        queue_mov(m, reg, frame[n]);
        push(m, reg);
    }
    BYTES(m, 0x48, is_iret ? 0xcf : 0xcb);
}

static void queue_far_jump(struct making *m)
{
    bool user = m->rules.user;
    uint16_t cs = encode_pick(m->g, 2) ? (user ? TINY_USER_CS64 : TINY_CS64) : user ? TINY_USER_CS32 : TINY_CS32;
    uint32_t target = (uint32_t)place_pick(m);
    uint8_t code[7] = {encode_pick(m->g, 2) ? 0xea : 0x9a};
    if (code[0] == 0x9a)
        stack_provide(m, 8);
    memcpy(code + 1, &target, 4);
    memcpy(code + 5, &cs, 2);
    queue_add(m, code, 7);
}

/* From ring 0: five values. */
static void queue_iret_to_user(struct making *m)
{
    unsigned reg = register_pick(m);
    const uint64_t frame[] = {TINY_USER_DS, target_pick(m, 8, true) & ~7ull, random_flags(m), encode_pick(m->g, 2) ? TINY_USER_CS32 : TINY_USER_CS64, place_pick(m)};
    stack_provide(m, 48);
    for (unsigned n = 0; n < 5; n++) {
        queue_mov(m, reg, frame[n]);
        push(m, reg);
    }
    BYTES(m, 0x48, 0xcf);
}

/* Mostly what leaves 32-bit code with segments that the translator can use. */
static void queue_segment_load(struct making *m)
{
    static const uint16_t odd[] = {0, WORLD_LIMITED, WORLD_BASED, WORLD_READ_ONLY, WORLD_DOWN, TINY_USER_CS32, WORLD_THREAD, WORLD_THREAD};
    static const uint8_t segments[] = {0, 3, 4, 5, 4, 5, 0, 3};
    unsigned segment = segments[encode_pick(m->g, sizeof segments)];
    if (m->loop_head && m->loop_register == GPR_RAX)
        return;
    bool usual = encode_pick(m->g, segment < 4 ? 3 : 2);
    queue_mov(m, GPR_RAX, usual ? TINY_USER_DS : odd[encode_pick(m->g, sizeof odd / sizeof *odd)]);
    BYTES(m, 0x8e, (uint8_t)(0xc0 | segment << 3));
}

static void queue_sysret_narrow(struct making *m)
{
    if (m->loop_head && (m->loop_register == GPR_RCX || m->loop_register == GPR_R11))
        return;
    queue_mov(m, GPR_RCX, place_pick(m));
    queue_mov(m, GPR_R11, random_flags(m));
    BYTES(m, 0x0f, 0x07);
}

static void queue_narrow(struct making *m)
{
    static void (*const for_all[])(struct making *) = {queue_far, queue_far_jump, queue_segment_load, queue_segment_load, queue_popf, queue_selector};
    static void (*const for_supervisor[])(struct making *) = {queue_control, queue_msr, queue_stack_segment, queue_iret_to_user};
    static const uint8_t plain[][3] = {{0xfa}, {0xfb}, {0x0f, 0x01, 0xca}, {0x0f, 0x01, 0xcb}, {0xcd, SOFTWARE_INTERRUPT}, {0x0f, 0x05}, {0x0f, 0x34}};
    unsigned what = encode_pick(m->g, m->rules.user ? 7 : 14);
    if (what < 6) {
        for_all[what](m);
    } else if (what == 6 && m->rules.user) {
        BYTES(m, 0xcd, SOFTWARE_INTERRUPT);
    } else if (what < 10 && (m->w->user || what < 9)) {
        for_supervisor[what - 6](m);
    } else {
        const uint8_t *code = plain[encode_pick(m->g, sizeof plain / sizeof *plain)];
        queue_add(m, code, code[1] == 1 ? 3 : code[1] ? 2 : 1);
    }
}

static void queue_for_user(struct making *m)
{
    switch (encode_pick(m->g, m->w->fixing ? 9 : 8)) {
    case 8:
        BYTES(m, 0xcd, SOFTWARE_INTERRUPT);
        break;
    case 0:
    case 1:
    case 2:
        if (m->loop_head && (m->loop_register == GPR_RCX || m->loop_register == GPR_R11))
            return;
        BYTES(m, 0x0f, 0x05); /* syscall */
        break;
    case 3:
        queue_popf(m);
        break;
    case 4:
        queue_selector(m);
        break;
    default:
        queue_base(m);
    }
}

void queue_system(struct making *m)
{
    if (m->rules.narrow) {
        queue_narrow(m);
        return;
    }
    if (m->w->low && !encode_pick(m->g, 3)) {
        if (!m->rules.user && !encode_pick(m->g, 4))
            queue_sysret_narrow(m);
        else if (encode_pick(m->g, 4))
            queue_far(m);
        else
            queue_segment_load(m);
        return;
    }
    static void (*const templates[])(struct making *) = {
        queue_popf, queue_control, queue_root,   queue_root,          queue_table_edit, queue_table_edit, queue_table_edit,
        queue_base, queue_msr,     queue_iret,   queue_stack_segment, queue_selector,   queue_sysret,
    };
    static const uint8_t plain[][3] = {{0xfa}, {0xfb}, {0xfb}, {0x0f, 0x01, 0xca}, {0x0f, 0x01, 0xcb}, {0x0f, 0x01, 0xf8}};
    if (m->rules.user) {
        queue_for_user(m);
        return;
    }
    if (m->w->user && !encode_pick(m->g, 3)) { /* back where it came from */
        queue_sysret(m);
        return;
    }
    unsigned what = encode_pick(m->g, 18);
    if (what < sizeof templates / sizeof *templates) {
        templates[what](m);
        return;
    }
    const uint8_t *code = plain[encode_pick(m->g, sizeof plain / sizeof *plain)]; /* cli sti clac stac swapgs */
    queue_add(m, code, code[0] == 0x0f ? 3 : 1);
}
