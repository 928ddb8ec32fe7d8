/*
 * Translation of one block: decode up to its end (analyze.c), then emit.
 *
 * A block lies in one page and goes on past conditional branches until something else transfers control. Some host registers are scratch at any time, at entries and exits
 * exactly R10 and R11.
 * Each instruction starts a site: host code that can be started again from there, because no guest state changes before the last access that can fault.
 * Threading: e->lock held.
 */
#include <assert.h>
#include <string.h>

#include "engine/bt/translate_priv.h"

/* ---- instructions ---- */

static void registers_provide(struct translation *t, const struct tinsn *i)
{
    uint16_t named = i->reads | i->writes;
    bool low = i->high_byte && i->memory; /* no REX prefix */
    registers_return(t, named);
    groups_provide(t, i);
    if (low)
        for (unsigned n = 0; n < GROUPS; n++)
            if (t->group[n].v != TI_NONE && t->group[n].v > 7)
                t->group[n].v = TI_NONE;
    t->s[0] = (uint8_t)register_scratch(t, named, named | pinned(t), low);
    t->s[1] = t->s[2] = (uint8_t)register_scratch(t, named, named | pinned(t) | BIT(t->s[0]), low);
    if (t->legacy)
        t->s[2] = (uint8_t)register_scratch(t, named, named | pinned(t) | BIT(t->s[0]) | BIT(t->s[1]), false);
}

/* Others need no way back to the state before them. */
static bool can_fault(const struct tinsn *i)
{
    return i->kind != TI_SKIP && i->kind != TI_COUNT && i->kind != TI_LEA_RIP && (i->kind != TI_COPY || i->traps);
}

/* Where x87's last instruction was: the processor would say where its translation is. After it, for it may fault. */
static void emit_x87_note(struct translation *t, const struct tinsn *i)
{
    const uint8_t *p = insn_bytes(t, i);
    if (!t->x87_page) {
        emit_load_gs(&t->out, t->s[0], BT_CTX(page_va));
        emit_store_gs(&t->out, t->s[0], BT_CTX(x87_page));
    }
    t->x87_page = true;
    uint32_t fop = (p[i->opcode_at] & 7u) << 8 | p[i->modrm_at];
    emit_store_gs_imm32(&t->out, BT_CTX(x87_last), BT_X87_RAN | fop << BT_X87_FOP_SHIFT | i->offset);
}

static void emit_insn(struct translation *t, const struct tinsn *i)
{
    registers_provide(t, i);
    struct bt_site *site = can_fault(i) ? site_here(t, i) : NULL;
    switch (i->kind) {
    case TI_COPY:
        emit_copy(t, i);
        break;
    case TI_MEMORY:
        emit_rewritten(t, i, emit_access(t, i, site));
        break;
    case TI_SKIP:
        break;
    case TI_COUNT:
        emit_count(t, i);
        break;
    case TI_MOFFS:
        emit_moffs(t, i, emit_access(t, i, site));
        break;
    case TI_LEA_RIP:
        emit_load_gs(&t->out, i->reg, BT_CTX(page_va));
        emit_lea(&t->out, i->reg, i->reg, EMIT_NONE, 0, i->disp + i->offset + i->length);
        break;
    case TI_PUSH_REG:
        emit_push_reg(t, site, i->reg);
        break;
    case TI_PUSH_IMM:
        emit_at(t, 0xc7, 0, emit_push_access(t, site));
        emit32(&t->out, (uint32_t)i->imm);
        emit_push_done(t);
        break;
    case TI_PUSH_MEM: {
        emit_at(t, 0x8b, t->s[1], emit_access(t, i, site));
        emit_store_gs(&t->out, t->s[1], BT_CTX(scratch[0]));
        struct address a = emit_push_access(t, site);
        emit_load_gs(&t->out, t->s[2], BT_CTX(scratch[0]));
        emit_at(t, 0x89, t->s[2], a);
        emit_push_done(t);
        break;
    }
    case TI_PUSH_SELECTOR: {
        struct address a = emit_push_access(t, site);
        emit_movzx16_gs(&t->out, t->s[2], i->imm);
        emit_at(t, 0x89, t->s[2], a);
        emit_push_done(t);
        break;
    }
    case TI_POP_REG:
        emit_pop_to(t, site, i->reg);
        if (i->reg != GPR_RSP)
            emit_rsp_add(t, (int32_t)stack_bytes(i));
        break;
    case TI_LEAVE:
        emit_at(t, 0x8b, t->s[1], emit_stack_access(t, site, GPR_RBP, 0));
        emit_lea_in_mode(t, GPR_RSP, GPR_RBP, EMIT_NONE, 0, (int32_t)stack_bytes(i));
        emit_mov(&t->out, GPR_RBP, t->s[1]);
        break;
    case TI_JCC:
        emit_jcc(t, i);
        break;
    case TI_LOOP:
        emit_loop(t, i);
        break;
    case TI_JMP:
        emit_jmp(t, i);
        break;
    case TI_JMP_REG:
        emit_transfer_indirect(t, i, i->reg, 0);
        break;
    case TI_JMP_MEM:
        emit_target_load(t, i, site);
        emit_transfer_indirect(t, i, EMIT_NONE, 0);
        break;
    case TI_CALL:
    case TI_CALL_REG:
    case TI_CALL_MEM:
        emit_call(t, i, site);
        break;
    case TI_RET:
        emit_ret(t, i, site);
        break;
    case TI_EXIT:
        canonicalize(t);
        emit_leave_in_page(t, i->offset, i->exit);
        break;
    default:
        emit_system(t, i, site);
        break;
    }
    if (i->x87_pointers && i->kind != TI_EXIT)
        emit_x87_note(t, i);
    t->clean &= (uint16_t)~i->writes;
    groups_move(t, i);
}

/* ---- blocks ---- */

/* The last instruction of a page, of which `here` bytes are in it, is decoded with those in the next page. */
static void decode_crossing(struct translation *t, const struct analyze_context *a, struct tinsn *i, unsigned here)
{
    struct bt_engine *e = t->e;
    if (t->next_ram_offset == ~0ull || here >= INSN_BYTES_MAX)
        return;
    const struct bt_page *next = cache_page(e, t->next_ram_offset, physmap_gpa(e->interp.memory, t->next_ram_offset), &t->page->mode);
    if (!next || (t->page->crosses && t->page->crosses != next))
        return;
    memcpy(t->crossing, insn_bytes(t, i), here);
    memcpy(t->crossing + here, e->layout.window_r + next->offset, INSN_BYTES_MAX);
    analyze_insn(a, t->crossing, INSN_BYTES_MAX, i->offset, i);
    if (i->kind == TI_EXIT) {
        i->exit = BT_EXIT_interp; /* which fetches it again: IRET's own exit does not, and the next page may have changed */
        return;
    }
    cache_page_cross(e, t->page, next);
    t->next = next;
}

/* Another block begins there: a jump to it is shorter than the same code again. */
static bool goes_on_elsewhere(const struct translation *t, unsigned offset)
{
    return t->count && !t->careful && t->page->dt[offset];
}

static void exit_instead(struct tinsn *i, enum bt_exit why)
{
    i->kind = TI_EXIT;
    i->exit = (uint8_t)why;
    i->implied = TI_NONE;
}

/* The block's bytes up to `end`, as far as the page goes, are in t->code. */
static void code_copy(struct translation *t, unsigned end)
{
    const uint8_t *page = t->e->layout.window_r + t->page->offset;
    while (t->code_end < end && t->code_end < PAGE_SIZE_BYTES) {
        unsigned left = (unsigned)PAGE_SIZE_BYTES - t->code_end;
        uint8_t *to = t->code + (t->code_end - t->code_offset);
        if (likely(left >= CODE_PIECE))
            memcpy(to, page + t->code_end, CODE_PIECE);
        else
            memcpy(to, page + t->code_end, left);
        t->code_end += left < CODE_PIECE ? left : CODE_PIECE;
    }
}

static void decode_block(struct translation *t, unsigned start)
{
    struct analyze_context a = {.c = NULL, .mode = t->page->mode, .forms = t->e->forms};
    for (unsigned n = 0; !a.c; n++)
        a.c = t->e->interp.vcpus[n];
    unsigned offset = start;
    t->code_offset = t->code_end = start;
    while (t->count < t->e->debug.block_insns && offset < PAGE_SIZE_BYTES && !goes_on_elsewhere(t, offset)) {
        struct tinsn *i = &t->insn[t->count++];
        code_copy(t, offset + FORM_WINDOW);
        analyze_insn(&a, t->code + (offset - start), t->code_end - offset, offset, i);
        if (!i->length)
            decode_crossing(t, &a, i, (unsigned)PAGE_SIZE_BYTES - offset);
        if (cache_marked(t->e, t->page, offset, BT_MARK_CALLS))
            exit_instead(i, BT_EXIT_data);
        if (i->kind == TI_STRING && cache_marked(t->e, t->page, offset, BT_MARK_CROSSES))
            exit_instead(i, BT_EXIT_crossing);
        if (TI_ENDS(i->kind))
            break;
        offset += i->length;
    }
}

int insn_number(const struct translation *t, int32_t offset)
{
    int low = 0, high = (int)t->count - 1;
    while (low <= high) {
        int middle = (low + high) / 2;
        int32_t at = t->insn[middle].offset;
        if (at == offset)
            return middle;
        if (at < offset)
            low = middle + 1;
        else
            high = middle - 1;
    }
    return -1;
}

/* Jumps inside the block need neither the run loop nor a second translation of what they lead to. Careful blocks are left as soon as possible. */
static void joins_find(struct translation *t)
{
    t->joins = 0;
    for (unsigned n = 0; n < t->count && !t->careful; n++) {
        const struct tinsn *i = &t->insn[n];
        int to = i->kind == TI_JCC || i->kind == TI_LOOP || i->kind == TI_JMP ? insn_number(t, i->target) : -1;
        if (to > 0)
            t->joins |= 1ull << to;
    }
}

/* What looks at the guards may have been jumped over. */
static void guards_forget(struct translation *t)
{
    t->x87_page = false;
    t->guarded[TI_FS] = t->guarded[TI_GS] = false;
}

static void join_emit(struct translation *t)
{
    canonicalize(t);
    guards_forget(t);
    t->clean = 0;
    t->join_at[t->at] = t->out.at;
}

static void translation_emit(struct translation *t)
{
    for (t->at = 0; t->at < t->count; t->at++) {
        const struct tinsn *i = &t->insn[t->at];
        if (is_join(t, t->at))
            join_emit(t);
        if (t->next && t->at == t->count - 1) {
            canonicalize(t);
            emit_next_page_check(t, i);
        }
        emit_insn(t, i);
    }
    const struct tinsn *last = &t->insn[t->count - 1];
    if (!TI_ENDS(last->kind)) {
        canonicalize(t);
        emit_goto(t, last, last->offset + last->length);
    }
}

static void emit_entry(struct translation *t, unsigned start)
{
    if (start)
        emit_lea(&t->out, 10, 11, EMIT_NONE, 0, -(int32_t)start);
    emit_store_gs(&t->out, start ? 10 : 11, BT_CTX(page_va));
    assert(t->out.at == t->start + entry_bytes(start));
}

struct bt_block *translate_block(struct bt_engine *e, struct bt_page *page, unsigned start, uint64_t next_ram_offset, bool careful, struct bt_vcpu *b)
{
    struct translation t;
    t.e = e;
    t.b = b;
    t.page = page;
    t.careful = careful;
    t.next_ram_offset = next_ram_offset;
    t.next = NULL;
    t.legacy = page->mode.code_bits == 32;
    t.free = t.canonical = t.legacy ? CANONICAL_LEGACY : CANONICAL;
    t.clean = 0;
    guards_forget(&t);
    for (unsigned n = 0; n < GROUPS; n++)
        t.group[n].v = TI_NONE;
    t.count = t.at = t.sites = t.deferred_count = 0;
    t.start = t.out.at = e->layout.tc_write + e->tc_used;
    decode_block(&t, start);
    joins_find(&t);
    emit_entry(&t, start);
    t.chain = t.out.at;
    struct bt_block block = {
        .page = page,
        .tc_start = e->tc_used,
        .tc_chain = (uint32_t)(t.out.at - e->layout.tc_write),
        .start = (uint16_t)start,
        .valid = true,
        .careful = careful,
    };
    translation_emit(&t);
    block.tc_end = (uint32_t)(t.out.at - e->layout.tc_write);
    block.hot_sites = (uint16_t)t.sites;
    block.cold_start = e->cold_used;
    t.start = t.out.at = e->layout.tc_write + e->cold_used;
    for (unsigned n = 0; n < t.deferred_count; n++)
        deferred_emit(&t, &t.deferred[n]);
    block.cold_end = (uint32_t)(t.out.at - e->layout.tc_write);
    const struct tinsn *last = &t.insn[t.count - 1];
    unsigned end = last->offset + last->length;
    block.length = (uint16_t)((end < PAGE_SIZE_BYTES ? end : PAGE_SIZE_BYTES) - start);
    block.insns = (uint16_t)t.count;
    block.site_count = (uint16_t)t.sites;
    return cache_publish(e, &block, t.site);
}

/* ---- for fault handling ---- */

static uint64_t register_value(const struct bt_vcpu *b, unsigned reg)
{
    return reg == TI_NONE ? 0 : b->c.v.cpu.gpr[reg];
}

static gva_t operand_address(const struct bt_vcpu *b, const struct tinsn *i)
{
    uint64_t disp = i->disp_bytes == sizeof(i->absolute) ? i->absolute : (uint64_t)(int64_t)i->disp;
    uint64_t ea = register_value(b, i->base) + (register_value(b, i->index) << i->scale) + disp;
    if (i->rip_relative)
        ea += b->c.v.cpu.gpr[GPR_RIP] + i->length;
    if (i->address32)
        ea = (uint32_t)ea;
    if (i->segment != TI_FLAT)
        ea += b->c.segment_base[i->segment == TI_FS ? SEG_FS : SEG_GS];
    return i->legacy ? (uint32_t)ea : ea;
}

/* Vector instructions may be masked; calls check their target, some before they push. */
static bool faults_exactly(const struct tinsn *i)
{
    return i->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && i->kind != TI_CALL_REG && i->kind != TI_CALL_MEM;
}

/* What it pushes or pops besides its operand (bases_note). */
static struct bt_access implied_access(const struct bt_vcpu *b, const struct tinsn *i)
{
    gva_t gva = b->c.v.cpu.gpr[i->implied] + (int64_t)i->implied_disp;
    return (struct bt_access){i->legacy ? (uint32_t)gva : gva, (uint16_t)stack_bytes(i), .write = i->implied_disp < 0, .stack = true};
}

/* With what is known of the instruction's form, and under the lock for that. */
static void access_decode(struct bt_vcpu *b, const uint8_t *bytes, unsigned available, struct tinsn *i)
{
    struct bt_engine *e = b->engine;
    struct analyze_context a = {.c = &b->c, .mode = b->mode, .forms = e->forms};
    pthread_mutex_lock(&e->lock);
    analyze_insn(&a, bytes, available, 0, i);
    pthread_mutex_unlock(&e->lock);
}

static bool segment_is_usable(const struct bt_vcpu *b, const struct tinsn *i)
{
    if (!i->legacy || i->segment == TI_FLAT)
        return true;
    return bt_flat_segments(&b->c.v.cpu) >> (i->segment == TI_FS ? SEG_FS : SEG_GS) & 1;
}

int translate_accesses(struct bt_vcpu *b, const uint8_t *bytes, unsigned available, struct bt_access access[4])
{
    struct tinsn i;
    int count = 0;
    access_decode(b, bytes, available, &i);
    if (i.kind == TI_EXIT || !segment_is_usable(b, &i))
        return -1;
    if (i.memory)
        access[count++] = (struct bt_access){operand_address(b, &i), i.mem_size, i.mem_write};
    if (i.aligned && (access[0].gva & (i.mem_size - 1u)))
        return -1; /* raises #GP, and the page is neither accessed nor dirty */
    if (i.kind == TI_STRING)
        count = (int)string_accesses(b, &i, access);
    if (i.kind == TI_BIT_STRING)
        access[0].gva = (access[0].gva + (uint64_t)bit_string_distance(b, &i)) & (i.legacy ? UINT32_MAX : ~0ull);
    if (i.implied != TI_NONE)
        access[count++] = implied_access(b, &i);
    for (int n = 0; n < count; n++)
        access[n].exact = faults_exactly(&i);
    return count;
}
