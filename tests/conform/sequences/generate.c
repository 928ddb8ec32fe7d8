/*
 * Makes a sequence while the interpreter executes it: whenever RIP comes to a place where nothing has been written yet, one instruction is, and its operands are aimed with the
 * registers that it will find. Blind places stay INT3, which ends every case.
 */
#include "sequence.h"

#include <string.h>

#include "arch/paging.h"

/* ---- places for code ---- */

static bool is_free(const struct making *m, gva_t gva)
{
    int at = world_code_offset(m->w, m->vm, gva);
    return at >= 0 && !m->written[at / 4096][at % 4096];
}

static unsigned room(const struct making *m, gva_t gva)
{
    unsigned n = 0;
    int at = -1;
    for (; n < 15; n++, at++) {
        if (!n || !((gva + n) & PAGE_MASK_BITS))
            at = world_code_offset(m->w, m->vm, gva + n);
        if (at < 0 || m->written[at / 4096][at % 4096])
            break;
    }
    return n;
}

static gva_t code_page_pick(struct making *m)
{
    unsigned n = encode_pick(m->g, CODE_PAGES + 1);
    return n < CODE_PAGES ? m->w->code[n] : m->w->native ? m->w->code[0] : m->w->twin_code;
}

gva_t place_pick(struct making *m)
{
    for (unsigned tries = 0; tries < 20; tries++) {
        gva_t page = encode_pick(m->g, 2) ? m->rip & ~PAGE_MASK_BITS : code_page_pick(m), at = page + encode_pick(m->g, 4096);
        if (world_code_offset(m->w, m->vm, at) >= 0 && (room(m, at) == 15 || !encode_pick(m->g, 8)))
            return at;
    }
    return m->w->code[0] + encode_pick(m->g, 8192);
}

static void code_write(struct making *m, struct line *line)
{
    for (unsigned n = 0; n < line->length; n++) {
        int at = line->at[n] = world_code_offset(m->w, m->vm, line->gva + n);
        if (at < 0)
            continue;
        m->s->code[at / 4096][at % 4096] = line->bytes[n];
        m->written[at / 4096][at % 4096] = true;
        *(uint8_t *)physmap_get(m->vm->memory, m->w->code_gpa[at / 4096] + (unsigned)at % 4096, 1, PHYSMAP_READ) = line->bytes[n];
    }
}

/* ---- the queue ---- */

struct queued *queue_add(struct making *m, const void *bytes, unsigned length)
{
    struct queued *q = &m->queue[m->queued++];
    memset(q, 0, sizeof *q);
    memset(q->e.bytes, 0xcc, sizeof q->e.bytes);
    memcpy(q->e.bytes, bytes, length);
    encode_decode(m->g, &q->e);
    return q;
}

struct queued *queue_template(struct making *m, const void *bytes, unsigned length)
{
    unsigned skip = m->rules.narrow && (*(const uint8_t *)bytes & 0xf0) == 0x40;
    return queue_add(m, (const uint8_t *)bytes + skip, length - skip);
}

static void queue_relative(struct making *m, const void *bytes, unsigned length, gva_t target)
{
    struct queued *q = queue_template(m, bytes, length);
    q->relative = true;
    q->target = target;
}

void queue_mov(struct making *m, unsigned reg, uint64_t value)
{
    uint8_t code[10] = {(uint8_t)(0x48 | reg >> 3), (uint8_t)(0xb8 | (reg & 7))};
    memcpy(code + 2, &value, 8);
    if (value >> 32 && !m->rules.narrow) {
        queue_add(m, code, 10);
    } else {
        code[0] = (uint8_t)(0x40 | reg >> 3);
        queue_template(m, code, 6);
    }
}

/* ---- operands ---- */

/* Absent, but a handler makes it present. */
static bool is_fixable(const struct making *m, gva_t gva)
{
    for (unsigned n = 0; n < m->w->page_count; n++) {
        uint64_t entry;
        if (m->w->page[n].gva != (gva & ~PAGE_MASK_BITS) || (m->w->page[n].kind != PAGE_ORDINARY && m->w->page[n].kind != PAGE_ABSENT))
            continue;
        memcpy(&entry, physmap_get(m->vm->memory, world_entry(m->w, m->vm, gva), 8, PHYSMAP_READ), 8);
        return (entry & 3) == 2 && (entry >> 2 & 1) == m->w->user;
    }
    return false;
}

static bool is_good(const struct making *m, gva_t gva)
{
    gpa_t gpa;
    if (!world_walk(m->vm, gva, PAGING_WRITE, &gpa))
        return m->w->fixing && is_fixable(m, gva);
    for (unsigned n = 0; n < CODE_PAGES; n++)
        if (m->w->code_gpa[n] == (gpa & ~PAGE_MASK_BITS))
            return false;
    return physmap_get(m->vm->memory, gpa, 1, PHYSMAP_WRITE);
}

static gva_t ordinary_page(struct making *m)
{
    for (unsigned tries = 0; tries < 30; tries++) {
        const struct page *page = &m->w->page[encode_pick(m->g, m->w->page_count)];
        if (page->kind != PAGE_CODE && is_good(m, page->gva) && !(m->rules.narrow && page->gva >> 32))
            return page->gva;
    }
    return m->w->data;
}

gva_t target_pick(struct making *m, unsigned size, bool careful)
{
    unsigned what = careful ? 50 : encode_pick(m->g, 100), offset = encode_pick(m->g, PAGE_SIZE_BYTES + 1 - (size < 4096 ? size : 4096));
    if (encode_pick(m->g, 2))
        offset &= ~63u;
    else if (encode_pick(m->g, 2))
        offset &= ~7u;
    if (what < 5 && size > 1)
        return ordinary_page(m) + PAGE_SIZE_BYTES - 1 - encode_pick(m->g, size - 1);
    if (what < 9)
        return m->w->page[encode_pick(m->g, m->w->page_count)].gva + offset;
    if (what < 10)
        return m->w->data + (uint64_t)encode_pick(m->g, (DATA_PAGES + 2) * 4096) - 4096;
    return ordinary_page(m) + offset;
}

static uint64_t segment_base(const struct making *m, ZydisRegister segment)
{
    const struct segment *seg = m->vm->vcpu->cpu.seg;
    if (m->rules.narrow)
        return segment >= ZYDIS_REGISTER_ES && segment <= ZYDIS_REGISTER_GS ? seg[segment - ZYDIS_REGISTER_ES].base : 0;
    return segment == ZYDIS_REGISTER_FS ? seg[SEG_FS].base : segment == ZYDIS_REGISTER_GS ? seg[SEG_GS].base : 0;
}

static bool patch_disp32(struct making *m, struct encoded *e, uint64_t value)
{
    int32_t disp = (int32_t)value;
    if (e->zi.raw.disp.size != 32 || (e->zi.address_width == 64 && (uint64_t)(int64_t)disp != value))
        return false;
    memcpy(e->bytes + e->zi.raw.disp.offset, &disp, 4);
    return encode_decode(m->g, e);
}

/* From the address of a bit string's operand to what is accessed. */
static uint64_t bit_string_distance(const struct making *m, const struct encoded *e)
{
    switch (e->zi.mnemonic) {
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC:
        break;
    default:
        return 0;
    }
    if (e->op[1].type != ZYDIS_OPERAND_TYPE_REGISTER)
        return 0;
    int64_t bit = (int64_t)m->gpr[encode_gpr(e->op[1].reg.value)];
    switch (e->op[1].size) {
    case 16:
        return (uint64_t)(((int16_t)bit >> 4) * 2);
    case 32:
        return (uint64_t)(((int32_t)bit >> 5) * 4ll);
    default:
        return (uint64_t)((bit >> 6) * 8);
    }
}

/* Close to where the base points already, like compilers' accesses to frames and structures. */
static bool aim_near(struct making *m, struct encoded *e, const ZydisDecodedOperand *op, gva_t *target)
{
    uint64_t at = m->gpr[m->rules.base] + segment_base(m, op->mem.segment);
    unsigned size = op->size / 8;
    if (e->zi.raw.disp.size == 32) {
        int32_t disp = (int32_t)encode_pick(m->g, encode_pick(m->g, 3) ? 128 : 1400) - 64;
        if (size > 8 && encode_pick(m->g, 2))
            disp -= (int32_t)((at + (uint64_t)(int64_t)disp) & (size - 1));
        if (!patch_disp32(m, e, (uint64_t)(int64_t)disp))
            return false;
        op = encode_memory(e);
    }
    *target = at + (uint64_t)op->mem.disp.value;
    if (m->rules.narrow)
        *target = (uint32_t)*target;
    return is_good(m, *target) && (is_good(m, *target + size - 1) || !encode_pick(m->g, 10));
}

/* The operand described by ModRM. False: the instruction is not to be used. */
static bool aim_explicit(struct making *m, struct encoded *e, bool *relative, gva_t *target)
{
    const ZydisDecodedOperand *op = encode_memory(e);
    if (op->mem.type == ZYDIS_MEMOP_TYPE_VSIB)
        return !encode_pick(m->g, 10);
    if (op->mem.type != ZYDIS_MEMOP_TYPE_MEM)
        return true;
    *target = target_pick(m, op->size / 8, false);
    if (op->mem.base == ZYDIS_REGISTER_RIP || op->mem.base == ZYDIS_REGISTER_EIP) {
        *relative = true;
        return true;
    }
    unsigned base = encode_gpr(op->mem.base), index = encode_gpr(op->mem.index), scale = op->mem.scale;
    if (base == m->rules.base && index == 16 && e->zi.address_width == (m->rules.narrow ? 32 : 64) && encode_pick(m->g, 8) && aim_near(m, e, op, target))
        return true;
    uint64_t wanted = *target - segment_base(m, op->mem.segment);
    wanted -= bit_string_distance(m, e);
    if (m->rules.narrow)
        wanted = (uint32_t)wanted;
    uint64_t scaled = index < 16 ? m->gpr[index] * scale : 0, disp = (uint64_t)op->mem.disp.value;
    if (e->zi.address_width == 32 && wanted >> 32)
        return !encode_pick(m->g, 8);
    if (encode_pick(m->g, 4)) {
        encode_widen(m->g, e);
        if (patch_disp32(m, e, wanted - scaled - (base < 16 ? m->gpr[base] : 0)))
            return true;
        op = encode_memory(e);
        disp = (uint64_t)op->mem.disp.value;
    }
    if (base == 16 || base == index || (m->loop_head && base == m->loop_register))
        return false;
    queue_mov(m, base, wanted - scaled - disp);
    return true;
}

/* Operands that go without saying: stack, strings. */
static bool aim_implied(struct making *m, struct encoded *e, const ZydisDecodedOperand *op)
{
    unsigned base = encode_gpr(op->mem.base);
    if (op->encoding == ZYDIS_OPERAND_ENCODING_DISP16_32_64) {
        uint64_t value = target_pick(m, op->size / 8, false) - segment_base(m, op->mem.segment);
        memcpy(e->bytes + e->zi.raw.disp.offset, &value, e->zi.raw.disp.size / 8);
        return encode_decode(m->g, e);
    }
    if (base == 16 || !encode_pick(m->g, 30))
        return true;
    gva_t now = m->gpr[base];
    if (is_good(m, now) && is_good(m, now - 8))
        return true;
    if (m->loop_head && base == m->loop_register)
        return false;
    gva_t target = target_pick(m, 8, base == GPR_RSP);
    queue_mov(m, base, base == GPR_RSP && encode_pick(m->g, 6) ? target & ~7ull : target);
    return true;
}

static bool is_repeated(const struct encoded *e)
{
    return e->zi.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE);
}

static bool writes_register(const struct encoded *e, unsigned reg)
{
    for (unsigned n = 0; n < e->zi.operand_count; n++)
        if (e->op[n].type == ZYDIS_OPERAND_TYPE_REGISTER && e->op[n].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE && encode_gpr(e->op[n].reg.value) == reg)
            return true;
    return false;
}

/* Locked accesses across cache lines are costly for the whole machine. */
static bool may_split(const struct encoded *e, gva_t target)
{
    const ZydisDecodedOperand *op = encode_memory(e);
    bool locked = e->zi.attributes & ZYDIS_ATTRIB_HAS_LOCK || e->zi.mnemonic == ZYDIS_MNEMONIC_XCHG;
    return locked && op && (target & 63) + op->size / 8 > 64 && (target & 4095) + op->size / 8 <= 4096;
}

/* Sets the base that most operands are relative to, sometimes just before a page's end; or moves it a little. */
static void queue_base_register(struct making *m)
{
    unsigned reg = m->rules.base;
    uint8_t wide = (uint8_t)(0x48 | reg >> 3), low = reg & 7, by = (uint8_t)encode_pick(m->g, 256);
    unsigned what = encode_pick(m->g, 4);
    if (what == 0 || !is_good(m, m->gpr[reg])) {
        m->rules.base = (uint8_t)(encode_pick(m->g, 3) ? register_pick(m) : GPR_RSP);
        gva_t at = encode_pick(m->g, 3) ? target_pick(m, 8, true) & ~7ull : (target_pick(m, 8, true) | PAGE_MASK_BITS) - encode_pick(m->g, 160);
        queue_mov(m, m->rules.base, m->rules.base == GPR_RSP ? at & ~7ull : at);
    } else if (what == 1 && low != 4) {
        queue_template(m, (const uint8_t[]){(uint8_t)(wide | reg >> 3 << 2), 0x8d, (uint8_t)(0x40 | low << 3 | low), by}, 4); /* lea */
    } else {
        queue_template(m, (const uint8_t[]){wide, 0x83, (uint8_t)((what == 2 ? 0xc0 : 0xe8) | low), by & 0xf8}, 4); /* add, sub */
    }
}

/* Source and destination of a string instruction in the same memory, or their ends near pages' ends. */
static void queue_ranges(struct making *m, unsigned size)
{
    if (encode_pick(m->g, 2)) {
        gva_t at = target_pick(m, 8, true);
        queue_mov(m, GPR_RSI, at);
        queue_mov(m, GPR_RDI, at + encode_pick(m->g, 64) - 32);
        return;
    }
    unsigned count = encode_pick(m->g, PAGE_SIZE_BYTES / size);
    queue_mov(m, GPR_RCX, count);
    for (unsigned n = 0; n < 2; n++) {
        gva_t end = (target_pick(m, 8, true) | PAGE_MASK_BITS) + 1 + (encode_pick(m->g, 4) ? encode_pick(m->g, 2 * size + 1) - size : 0);
        queue_mov(m, n ? GPR_RSI : GPR_RDI, end - (uint64_t)count * size);
    }
}

static void queue_ordinary(struct making *m)
{
    for (;;) {
        struct encoded e;
        bool usable = true, relative = false;
        gva_t target = 0;
        unsigned before = m->queued;
        encode_random(m->g, &m->rules, &e);
        if (m->loop_head && writes_register(&e, m->loop_register))
            continue;
        if (e.zi.meta.category == ZYDIS_CATEGORY_CALL || e.zi.meta.category == ZYDIS_CATEGORY_RET || e.zi.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE)
            if (encode_pick(m->g, 40))
                continue;
        if (is_repeated(&e) && m->gpr[GPR_RCX] > 40 && encode_pick(m->g, 25)) {
            if (m->loop_head && m->loop_register == GPR_RCX)
                continue;
            uint64_t count = encode_pick(m->g, encode_pick(m->g, 4) ? 12 : 5000);
            if (!encode_pick(m->g, 5)) /* until it faults; bytes overflow */
                count |= encode_pick(m->g, 2) ? 1ull << (64 - __builtin_ctz(e.zi.operand_width / 8)) % 64 : 1ull << 40;
            queue_mov(m, GPR_RCX, count);
        }
        bool ranges = is_repeated(&e) && !m->loop_head && !encode_pick(m->g, 2);
        if (ranges)
            queue_ranges(m, e.zi.operand_width / 8);
        bool wild = !encode_pick(m->g, 60);
        for (unsigned n = 0; usable && !wild && n < e.zi.operand_count; n++)
            if (e.op[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
                usable = e.op[n].encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM ? aim_explicit(m, &e, &relative, &target) : ranges || aim_implied(m, &e, &e.op[n]);
        if (!usable || may_split(&e, target)) {
            m->queued = before;
            continue;
        }
        struct queued *q = queue_add(m, e.bytes, e.zi.length);
        q->relative = relative;
        q->target = target;
        return;
    }
}

/* ---- control transfers ---- */

static void queue_indirect(struct making *m, gva_t target, bool call)
{
    unsigned reg = register_pick(m), slot = encode_pick(m->g, 16);
    bool to_memory = encode_pick(m->g, 2);
    queue_mov(m, reg, target);
    if (!to_memory) {
        uint8_t code[3] = {(uint8_t)(0x40 | reg >> 3), 0xff, (uint8_t)((call ? 0xd0 : 0xe0) | (reg & 7))};
        queue_template(m, code, 3);
        return;
    }
    gva_t at = target_pick(m, 8, true) + slot % 2 * 8;
    if (m->rules.narrow) { /* absolute there */
        uint8_t store32[6] = {0x89, (uint8_t)(0x05 | reg << 3)}, jump32[6] = {0xff, call ? 0x15 : 0x25};
        memcpy(store32 + 2, &at, 4);
        memcpy(jump32 + 2, &at, 4);
        queue_add(m, store32, 6);
        queue_add(m, jump32, 6);
        return;
    }
    uint8_t store[7] = {(uint8_t)(0x48 | reg >> 3 << 2), 0x89, (uint8_t)(0x05 | (reg & 7) << 3)}; /* mov [rip + d], reg */
    uint8_t jump[6] = {0xff, call ? 0x15 : 0x25};
    queue_relative(m, store, 7, at);
    queue_relative(m, jump, 6, at);
}

unsigned register_pick(struct making *m)
{
    for (;;) {
        unsigned reg = encode_pick(m->g, m->rules.narrow ? 8 : 16);
        if (reg != GPR_RSP && !(m->loop_head && reg == m->loop_register))
            return reg;
    }
}

void stack_provide(struct making *m, unsigned bytes)
{
    gva_t rsp = m->gpr[GPR_RSP];
    if (!is_good(m, rsp) || !is_good(m, rsp - bytes))
        queue_mov(m, GPR_RSP, (target_pick(m, 8, true) & ~7ull) | 0x800);
}

static void queue_return(struct making *m, gva_t target)
{
    unsigned reg = register_pick(m);
    uint8_t push[2] = {(uint8_t)(0x40 | reg >> 3), (uint8_t)(0x50 | (reg & 7))};
    uint8_t ret[3] = {0xc2, (uint8_t)(encode_pick(m->g, 16) * 8), 0};
    stack_provide(m, 8);
    queue_mov(m, reg, target);
    queue_template(m, push, 2);
    queue_add(m, encode_pick(m->g, 2) ? ret : (const uint8_t[]){0xc3, 0xcc, 0xcc}, 3);
}

/* RET when the stack's top leads to code. */
static bool queue_plain_return(struct making *m)
{
    gpa_t gpa;
    uint64_t target = 0;
    if (!is_good(m, m->gpr[GPR_RSP]) || (m->gpr[GPR_RSP] & 4095) > 4088 || !world_walk(m->vm, m->gpr[GPR_RSP], PAGING_READ, &gpa))
        return false;
    memcpy(&target, physmap_get(m->vm->memory, gpa, 8, PHYSMAP_READ), m->rules.narrow ? 4 : 8);
    if (world_code_offset(m->w, m->vm, target) < 0)
        return false;
    queue_add(m, "\xc3", 1);
    return true;
}

static void queue_call(struct making *m, gva_t target)
{
    stack_provide(m, 8);
    if (encode_pick(m->g, 2))
        queue_relative(m, "\xe8\0\0\0\0", 5, target);
    else
        queue_indirect(m, target, true);
}

static void queue_short(struct making *m, unsigned opcode)
{
    uint8_t code[2] = {(uint8_t)opcode, (uint8_t)encode_pick(m->g, 60)};
    queue_add(m, code, 2);
}

static void queue_loop_open(struct making *m)
{
    m->loop_register = encode_pick(m->g, 3) ? register_pick(m) : GPR_RCX;
    queue_mov(m, m->loop_register, 1 + encode_pick(m->g, 5));
    m->loop_head = ~0ull; /* settled when it is written */
}

static void queue_loop_close(struct making *m)
{
    unsigned reg = m->loop_register;
    gva_t head = m->loop_head;
    int64_t back = (int64_t)(head - m->rip);
    m->loop_head = 0;
    if (head == ~0ull)
        return;
    if (reg == GPR_RCX && back > -120 && back < 0) {
        uint8_t code[2] = {(uint8_t)(0xe0 + encode_pick(m->g, 3)), (uint8_t)(back - 2)};
        queue_add(m, code, 2);
        return;
    }
    uint8_t dec[3] = {(uint8_t)(0x48 | reg >> 3), 0xff, (uint8_t)(0xc8 | (reg & 7))};
    queue_template(m, dec, 3);
    queue_relative(m, "\x0f\x85\0\0\0\0", 6, head);
}

static void queue_transfer(struct making *m)
{
    gva_t target = place_pick(m);
    uint8_t jcc[6] = {0x0f, (uint8_t)(0x80 | encode_pick(m->g, 16))};
    switch (encode_pick(m->g, 12)) {
    case 0:
    case 1:
        queue_short(m, 0x70 | encode_pick(m->g, 16));
        break;
    case 2:
    case 3:
        queue_relative(m, jcc, 6, target);
        break;
    case 4:
        queue_short(m, encode_pick(m->g, 3) ? 0xe0 + encode_pick(m->g, 4) : 0xeb);
        break;
    case 5:
        queue_relative(m, "\xe9\0\0\0\0", 5, target);
        break;
    case 6:
        queue_indirect(m, target, false);
        break;
    case 7:
    case 8:
        queue_call(m, target);
        break;
    case 9:
        if (!queue_plain_return(m))
            queue_return(m, target);
        break;
    default:
        if (m->loop_head)
            queue_loop_close(m);
        else
            queue_loop_open(m);
    }
}

/* ---- writing ---- */

static void line_write(struct making *m, struct queued *q)
{
    struct sequence *s = m->s;
    unsigned length = q->e.zi.length;
    if (q->relative) {
        int64_t distance = (int64_t)(q->target - m->rip - length);
        int32_t d = (int32_t)distance;
        unsigned offset = q->e.zi.raw.disp.size ? q->e.zi.raw.disp.offset : q->e.zi.raw.imm[0].offset;
        if (d == distance)
            memcpy(q->e.bytes + offset, &d, 4);
    }
    if (room(m, m->rip) < length && encode_pick(m->g, 4)) { /* sometimes it runs into what is not free */
        gva_t target = place_pick(m);
        int64_t distance = (int64_t)(target - m->rip - 5);
        uint8_t jump[5] = {0xe9};
        int32_t d = (int32_t)distance;
        memcpy(jump + 1, &d, 4);
        if (room(m, m->rip) >= 5 && d == distance) {
            m->taken--;
            length = 5;
            memcpy(q->e.bytes, jump, 5);
        }
    }
    struct line *line = &s->line[s->lines++];
    line->gva = m->rip;
    line->length = (uint8_t)length;
    line->narrow = m->rules.narrow;
    line->constants = q->e.zi.raw.disp.size ? q->e.zi.raw.disp.offset : q->e.zi.raw.imm[0].size ? q->e.zi.raw.imm[0].offset : 255;
    memcpy(line->bytes, q->e.bytes, length);
    code_write(m, line);
    if (m->loop_head == ~0ull && m->taken == m->queued)
        m->loop_head = m->rip + length;
}

static void line_make(struct making *m)
{
    if (m->taken == m->queued) {
        m->taken = m->queued = 0;
        unsigned what = encode_pick(m->g, 36);
        if (what < 4)
            queue_transfer(m);
        else if (what < (m->w->low ? 6 : m->rules.user ? 5 : 8) && !m->w->native)
            queue_system(m);
        else if (what < 11 && !m->loop_head)
            queue_base_register(m);
        else
            queue_ordinary(m);
        if (!m->queued)
            return;
    }
    struct queued q = m->queue[m->taken++];
    line_write(m, &q);
}

static void start_make(struct making *m)
{
    struct state state;
    struct test_case none = {.decoded = false};
    struct cpu_state *cpu = &m->s->start;
    *cpu = m->w->start;
    generator_state(m->g, &none, &state);
    for (unsigned n = 0; n < 16; n++)
        cpu->gpr[n] = encode_pick(m->g, 2) ? target_pick(m, 8, false) : state.gpr[n];
    cpu->gpr[GPR_RSP] = target_pick(m, 8, true) & ~7ull;
    cpu->gpr[GPR_RIP] = m->w->code[0] + (encode_pick(m->g, 6) ? encode_pick(m->g, 4096) : 4096 - encode_pick(m->g, 32));
    m->s->interrupt = m->w->native || encode_pick(m->g, 3) ? -1 : INTERRUPT;
    cpu->rflags = (state.rflags & ~RFLAGS_IF) | (m->s->interrupt < 0 && encode_pick(m->g, 2) ? RFLAGS_IF : 0);
    memcpy(cpu->xsave, state.xsave, sizeof cpu->xsave);
}

/* The code is of another width from here on; what was to come in the other one is forgotten. */
static void width_follow(struct making *m, bool narrow)
{
    encode_width(m->g, narrow);
    if (narrow == m->rules.narrow)
        return;
    m->rules.narrow = narrow;
    m->queued = m->taken = 0;
    m->loop_head = 0;
    m->rules.base &= 7;
}

/* Is the instruction at RIP a REP MOVS of which a page of the source and another of the destination are one frame? */
static bool copies_aliased(struct making *m)
{
    int at = world_code_offset(m->w, m->vm, m->rip);
    bool repeated = false, narrow = false;
    unsigned n = at < 0 ? 15 : 0;
    const uint8_t *code = NULL;
    for (; n < 15 && (unsigned)at + n < CODE_PAGES * PAGE_SIZE_BYTES; n++) {
        code = &m->s->code[(at + (int)n) / 4096][(at + (int)n) % 4096];
        if (*code == 0xf2 || *code == 0xf3)
            repeated = true;
        else if (*code == 0x67)
            narrow = true;
        else if (*code != 0x66 && (*code & 0xf0) != 0x40 && *code != 0x26 && *code != 0x2e && *code != 0x36 && *code != 0x3e && (*code & 0xfe) != 0x64)
            break;
    }
    if (n == 15 || !repeated || !code || (*code & 0xfe) != 0xa4)
        return false;
    uint64_t mask = narrow || m->rules.narrow ? 0xffffffffu : ~0ull;
    gva_t from = m->gpr[GPR_RSI] & mask, to = m->gpr[GPR_RDI] & mask;
    for (unsigned a = 0; a < m->w->page_count; a++)
        for (unsigned b = 0; b < m->w->page_count; b++) {
            const struct page *x = &m->w->page[a], *y = &m->w->page[b];
            /* Either way, and as far as counts go. */
            if (x->gpa == y->gpa && x->gva != y->gva && x->gva + (64 << 10) - from < 128 << 10 && y->gva + (64 << 10) - to < 128 << 10)
                return true;
        }
    return false;
}

void sequence_make(struct sequence *s, struct generator *g, const struct world *w, uint64_t seed, uint64_t number, struct tiny_vm *vm)
{
    static struct making m;
    memset(&m, 0, sizeof m);
    m.s = s, m.g = g, m.w = w, m.vm = vm;
    m.rules = (struct encode_rules){.native = w->native, .base = (uint8_t)encode_pick(g, 16)};
    g->seed = (seed << 40 ^ number) * 0x9e3779b97f4a7c15ull | 1;
    for (unsigned n = 0; n < 4; n++)
        generator_random(g);
    memset(s, 0, sizeof *s);
    memset(s->code, 0xcc, sizeof s->code);
    s->number = number;
    m.wanted = 1 + encode_pick(g, encode_pick(g, 3) ? LINES_WANTED : 6);
    world_restore(w, vm, true);
    sequence_place(s, w, vm);
    vm->vcpu->cpu = w->start; /* what is good to aim at depends on it */
    width_follow(&m, !cpu_in_64bit_mode(&w->start));
    start_make(&m);
    engines_start(vm, s, true);
    const struct cpu_state *cpu = &vm->vcpu->cpu;
    for (unsigned n = 0; n < STEPS_MAX && !engines_in_handler(vm) && cpu->activity == CPU_RUNNING; n++) {
        m.rip = cpu->gpr[GPR_RIP];
        m.gpr = cpu->gpr;
        m.rules.user = cpu_cpl(cpu) == 3;
        width_follow(&m, !cpu_in_64bit_mode(cpu));
        if (is_free(&m, m.rip) && (s->lines < m.wanted || m.taken < m.queued) && s->lines < sizeof s->line / sizeof *s->line)
            line_make(&m);
        else if (m.taken < m.queued && s->tables_change)
            s->cut = true;
        s->cut |= m.taken < m.queued && s->tables_change && (m.rip >> 12) - (m.edited >> 12) + 1 <= 2;
        s->copies_aliased |= copies_aliased(&m);
        vm->ops->step(vm->vcpu);
    }
}

void sequence_mutate(struct sequence *s, struct generator *g, uint64_t seed)
{
    g->seed = (seed << 40 ^ s->number ^ 0xabcull << 48) * 0x9e3779b97f4a7c15ull | 1;
    for (unsigned n = 0; n < 4; n++)
        generator_random(g);
    struct line *line = s->lines ? &s->line[encode_pick(g, s->lines)] : NULL;
    if (!line || line->constants >= line->length || s->tables_change) /* without its INVLPG a change of page tables may or may not be seen */
        return;
    unsigned byte = line->constants + encode_pick(g, line->length - line->constants);
    line->bytes[byte] ^= (uint8_t)(1u << encode_pick(g, 8));
    if (line->at[byte] >= 0)
        s->code[line->at[byte] / 4096][line->at[byte] % 4096] = line->bytes[byte];
}

void sequence_place(const struct sequence *s, const struct world *w, struct tiny_vm *vm)
{
    for (unsigned n = 0; n < CODE_PAGES; n++) {
        void *to = physmap_get(vm->memory, w->code_gpa[n], PAGE_SIZE_BYTES, PHYSMAP_READ);
        if (!memcmp(to, s->code[n], PAGE_SIZE_BYTES))
            continue;
        memcpy(to, s->code[n], PAGE_SIZE_BYTES);
        physmap_mark_dirty(vm->memory, w->code_gpa[n], PAGE_SIZE_BYTES);
    }
}
