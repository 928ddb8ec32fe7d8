/*
 * Cases on the processor itself, in this process: in native worlds data and code have the same linear addresses here, and nothing else is mapped below 2 GiB.
 *
 * What the interpreter has executed step by step without an instruction that this process must not execute, and without an access outside these pages, is safe to run freely.
 */
#include "sequence.h"

#include <string.h>
#include <sys/mman.h>

#include "arch/paging.h"

#define CODE_AREA (AREA + 0x400000)

int native_init(const struct generator *g)
{
    if (processor_init(g->xcr0, g->image_bytes) || munmap((void *)CODE_PAGE, PAGE_SIZE_BYTES) || mprotect((void *)AREA, AREA_BYTES, PROT_READ | PROT_WRITE))
        return -1;
    static const unsigned pages[CODE_PAGES] = {0, 1, 3, 5}; /* as in world.c */
    for (unsigned n = 0; n < CODE_PAGES; n++) {
        void *at = (void *)(CODE_AREA + pages[n] * PAGE_SIZE_BYTES);
        if (mmap(at, PAGE_SIZE_BYTES, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != at)
            return -1;
    }
    return 0;
}

/* ---- may it run here? ---- */

static bool splits_a_line(const struct test_case *test, const struct cpu_state *cpu)
{
    if (!(test->zi.attributes & ZYDIS_ATTRIB_HAS_LOCK) && test->zi.mnemonic != ZYDIS_MNEMONIC_XCHG)
        return false;
    ZydisRegisterContext context = {0};
    for (unsigned n = 0; n < 16; n++)
        context.values[ZYDIS_REGISTER_RAX + n] = cpu->gpr[n];
    for (unsigned n = 0; n < test->zi.operand_count_visible; n++) {
        ZyanU64 address;
        if (test->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY &&
            (!ZYAN_SUCCESS(ZydisCalcAbsoluteAddressEx(&test->zi, &test->op[n], cpu->gpr[GPR_RIP], &context, &address)) ||
             (address & 63) + test->op[n].size / 8 > 64))
            return true;
    }
    return false;
}

/* Processors differ in what such instructions do (../README.md). */
static bool is_disputed(const struct test_case *test)
{
    bool repeated = test->zi.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE);
    return (repeated && test->zi.address_width == 32) || test->zi.mnemonic == ZYDIS_MNEMONIC_PUSHFQ || test->zi.mnemonic == ZYDIS_MNEMONIC_PUSHF;
}

bool native_may_execute(const struct generator *g, struct tiny_vm *vm)
{
    const struct cpu_state *cpu = &vm->vcpu->cpu;
    struct test_case test;
    for (unsigned n = 0; n < 15; n++) {
        gpa_t gpa;
        bool there = world_walk(vm, cpu->gpr[GPR_RIP] + n, PAGING_FETCH, &gpa);
        if (!there && !n)
            return true; /* it faults */
        test.code[n] = there ? *(const uint8_t *)physmap_get(vm->memory, gpa, 1, PHYSMAP_READ) : 0xcc;
    }
    test.code[15] = 0xcc;
    test.decoded = ZYAN_SUCCESS(ZydisDecoderDecodeFull(&g->decoder, test.code, 15, &test.zi, test.op));
    if (!test.decoded)
        return false;
    return test.zi.mnemonic == ZYDIS_MNEMONIC_INT3 || (!generator_forbidden(&test) && !is_disputed(&test) && !splits_a_line(&test, cpu));
}

/* Faults of accesses that would reach something else here, or code that is read-only in the guest. */
bool native_may_end(const struct outcome *right)
{
    if (right->vector != VECTOR_PF)
        return right->vector >= 0;
    gva_t page = right->cr2 & ~PAGE_MASK_BITS;
    return page - (AREA - 0x100000) < 0x200000 || page == CODE_AREA + 2 * PAGE_SIZE_BYTES || page == CODE_AREA + 4 * PAGE_SIZE_BYTES;
}

/* ---- running ---- */

void native_case_run(const struct world *w, const struct sequence *s, struct outcome *to)
{
    struct state from = {.rip = s->start.gpr[GPR_RIP], .rflags = s->start.rflags};
    memcpy(from.gpr, s->start.gpr, sizeof from.gpr);
    memcpy(from.xsave, s->start.xsave, sizeof from.xsave);
    for (unsigned n = 0; n < w->page_count; n++)
        for (unsigned k = 0; k < w->tracked_tables && w->page[n].kind != PAGE_CODE; k++)
            if (w->tracked[k] == w->page[n].gpa)
                memcpy((void *)w->page[n].gva, w->snapshot[k], PAGE_SIZE_BYTES);
    for (unsigned n = 0; n < CODE_PAGES; n++)
        memcpy((void *)w->code[n], s->code[n], PAGE_SIZE_BYTES);
    memset(to, 0, sizeof *to);
    processor_run_on(&from, &to->state);
    to->vector = to->state.vector;
    to->rip = to->state.rip;
    to->rflags = to->state.rflags;
    to->rsp = to->state.gpr[GPR_RSP];
    to->error = to->state.error;
    to->cr2 = to->state.cr2;
}

gva_t native_memory_differs(const struct world *w, struct tiny_vm *vm)
{
    for (unsigned n = 0; n < w->page_count; n++) {
        const uint8_t *a = (const uint8_t *)w->page[n].gva, *b = physmap_get(vm->memory, w->page[n].gpa, PAGE_SIZE_BYTES, PHYSMAP_READ);
        if (w->page[n].kind == PAGE_CODE || !memcmp(a, b, PAGE_SIZE_BYTES))
            continue;
        unsigned k = 0;
        while (a[k] == b[k])
            k++;
        return w->page[n].gva + k;
    }
    return 0;
}
