/* Random instructions and states: see cases.h. */
#include "cases.h"

#include <cpuid.h>
#include <string.h>

#include "arch/host.h"

#define XSAVE_BV 512
#define M(name) ZYDIS_MNEMONIC_##name

/* ---- random numbers ---- */

uint64_t generator_random(struct generator *g)
{
    g->seed ^= g->seed << 13;
    g->seed ^= g->seed >> 7;
    g->seed ^= g->seed << 17;
    return g->seed * 0x2545f4914f6cdd1dull;
}

static unsigned pick(struct generator *g, unsigned limit)
{
    return (unsigned)(generator_random(g) >> 33) % limit;
}

void generator_bytes(struct generator *g, void *data, size_t length)
{
    uint8_t *p = data;
    for (size_t n = 0; n < length; n += 8) {
        uint64_t value = generator_random(g);
        memcpy(p + n, &value, length - n < 8 ? length - n : 8);
    }
}

void generator_init(struct generator *g, uint64_t seed, uint64_t xcr0)
{
    memset(g, 0, sizeof *g);
    g->seed = seed * 0x9e3779b97f4a7c15ull | 1;
    g->xcr0 = xcr0;
    g->image_bytes = 576;
    for (unsigned n = 0; n < 20; n++)
        generator_random(g);
    for (unsigned n = 2; n < 8; n++) {
        unsigned a, b, c, d;
        __cpuid_count(0xd, n, a, b, c, d);
        if (xcr0 >> n & 1 && b + a <= CPU_XSAVE_BYTES) {
            g->component_bytes[n] = a;
            g->component_offset[n] = b;
            if (b + a > g->image_bytes)
                g->image_bytes = b + a;
        }
    }
    ZydisDecoderInit(&g->decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
}

/* ---- what may not be executed ---- */

/* They enter this machine's kernel or hypervisor, change what this process stands on, or answer differently each time or in a guest. */
static const ZydisInstructionCategory forbidden_categories[] = {
    ZYDIS_CATEGORY_SYSCALL, ZYDIS_CATEGORY_SYSRET, ZYDIS_CATEGORY_INTERRUPT, ZYDIS_CATEGORY_VTX, ZYDIS_CATEGORY_SGX, ZYDIS_CATEGORY_RDWRFSGS,
    ZYDIS_CATEGORY_SEGOP, ZYDIS_CATEGORY_XSAVE, ZYDIS_CATEGORY_XSAVEOPT, ZYDIS_CATEGORY_RDRAND, ZYDIS_CATEGORY_RDSEED, ZYDIS_CATEGORY_KEYLOCKER,
    ZYDIS_CATEGORY_KEYLOCKER_WIDE, ZYDIS_CATEGORY_UINTR, ZYDIS_CATEGORY_WAITPKG, ZYDIS_CATEGORY_AMX_TILE, ZYDIS_CATEGORY_CET, ZYDIS_CATEGORY_PKU,
    ZYDIS_CATEGORY_CLDEMOTE, ZYDIS_CATEGORY_ENQCMD, ZYDIS_CATEGORY_HRESET, ZYDIS_CATEGORY_TSX_LDTRK,
};
static const ZydisMnemonic forbidden[] = {
    M(CPUID), M(RDTSC), M(RDTSCP), M(RDPMC), M(RDPID), M(XGETBV), M(XSETBV), M(XBEGIN), M(XEND), M(XABORT), M(XTEST), M(LAR), M(LSL), M(VERR), M(VERW),
    M(SGDT), M(SIDT), M(SLDT), M(STR), M(SMSW), M(LMSW), M(PUSHF), M(PUSHFD), M(PUSHFQ), M(POPF), M(POPFD), M(POPFQ), M(IRET), M(IRETD), M(IRETQ), M(INT1), M(INT3), M(INT), M(LSS), M(LFS),
    M(LGS), M(MONITORX), M(MWAITX), M(MONITOR), M(MWAIT), M(GETSEC), M(MOVDIR64B), M(PCONFIG), M(VMCALL), M(VMMCALL), M(VMRUN), M(CLZERO), M(RDPRU), M(PTWRITE), M(SEAMCALL), M(SEAMOPS), M(SEAMRET), M(TDCALL),
    M(SKINIT), M(STGI), M(CLGI), M(VMLOAD), M(VMSAVE), M(INVLPGA), M(WRPKRU), M(RDPKRU), M(MCOMMIT), M(SERIALIZE), M(XSUSLDTRK), M(XRESLDTRK),
    M(PVALIDATE), M(PSMASH), M(RMPADJUST), M(RMPUPDATE), M(INVLPGB), M(TLBSYNC),
};

bool generator_forbidden(const struct test_case *test)
{
    const ZydisDecodedInstruction *zi = &test->zi;
    for (unsigned n = 0; n < sizeof forbidden_categories / sizeof *forbidden_categories; n++)
        if (zi->meta.category == forbidden_categories[n])
            return true;
    for (unsigned n = 0; n < sizeof forbidden / sizeof *forbidden; n++)
        if (zi->mnemonic == forbidden[n])
            return true;
    if (zi->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR || zi->mnemonic == M(RET))
        if (zi->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR || zi->opcode == 0xca || zi->opcode == 0xcb)
            return true;
    for (unsigned n = 0; n < zi->operand_count; n++) {
        const ZydisDecodedOperand *op = &test->op[n];
        if (op->type == ZYDIS_OPERAND_TYPE_MEMORY && (op->mem.segment == ZYDIS_REGISTER_FS || op->mem.segment == ZYDIS_REGISTER_GS))
            return true; /* this process's thread pointer */
        if (op->type == ZYDIS_OPERAND_TYPE_REGISTER && op->visibility != ZYDIS_OPERAND_VISIBILITY_HIDDEN &&
            ZydisRegisterGetClass(op->reg.value) == ZYDIS_REGCLASS_SEGMENT)
            return true;
    }
    return false;
}

/* ---- instructions ---- */

static uint8_t *put_legacy_prefixes(struct generator *g, uint8_t *p)
{
    static const uint8_t prefixes[] = {0x66, 0x66, 0x67, 0xf2, 0xf3, 0xf3, 0xf0, 0x2e, 0x36, 0x3e, 0x26};
    unsigned count = pick(g, 8);
    for (unsigned n = 0; n < (count > 5 ? 2u : count > 2 ? 1u : 0u); n++)
        *p++ = prefixes[pick(g, sizeof prefixes)];
    return p;
}

bool generator_case(struct generator *g, struct test_case *test)
{
    uint8_t *p = test->code;
    generator_bytes(g, test->code, 16);
    unsigned map = pick(g, 16);
    if (map < 9 || map == 15) {
        p = put_legacy_prefixes(g, p);
        if (pick(g, 2))
            *p++ = (uint8_t)(0x40 | pick(g, 16));
    }
    if (map < 3) {
        static const uint8_t strings[] = {0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf};
        if (!pick(g, 16))
            *p = strings[pick(g, sizeof strings)];
    } else if (map < 5) {
        *p++ = 0x0f;
    } else if (map < 7) {
        *p++ = 0x0f;
        *p = 0x38;
    } else if (map < 8) {
        *p++ = 0x0f;
        *p = 0x3a;
    } else if (map < 9) {
        *p = (uint8_t)(0xd8 + pick(g, 8));
    } else if (map < 12) {
        p[0] = pick(g, 3) ? 0xc4 : 0xc5;
        if (p[0] == 0xc4)
            p[1] = (uint8_t)((p[1] & 0xe0) | (1 + pick(g, 3)));
    } else if (map < 15) {
        static const uint8_t maps[] = {1, 2, 3, 5, 6};
        p[0] = 0x62;
        p[1] = (uint8_t)((p[1] & 0xf0) | maps[pick(g, 5)]);
        p[2] |= 4;
    }
    test->decoded = ZYAN_SUCCESS(ZydisDecoderDecodeFull(&g->decoder, test->code, 15, &test->zi, test->op));
    return test->decoded && !generator_forbidden(test);
}

/* ---- states ---- */

static unsigned gpr_of(ZydisRegister reg)
{
    ZydisRegister large = ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg);
    return large >= ZYDIS_REGISTER_RAX && large <= ZYDIS_REGISTER_R15 ? (unsigned)(large - ZYDIS_REGISTER_RAX) : 16;
}

static void put_random_numbers(struct generator *g, uint8_t *data, size_t length)
{
    generator_bytes(g, data, length);
    for (size_t n = 0; n + 8 <= length; n += 8) {
        float single[2] = {(float)(int32_t)generator_random(g) / 65536, (float)(int16_t)generator_random(g)};
        double number = (double)(int64_t)generator_random(g) / 4294967296.0;
        switch (pick(g, 6)) {
        case 0:
        case 1:
            memcpy(data + n, single, 8);
            break;
        case 2:
        case 3:
            memcpy(data + n, &number, 8);
            break;
        default:
            break;
        }
    }
}

/* Elements small enough for a gather's or scatter's index. */
static void put_indices(struct generator *g, uint8_t *data, size_t length, bool wide)
{
    for (size_t n = 0; n + 8 <= length; n += 8) {
        uint64_t value = wide ? pick(g, 512) : pick(g, 512) | (uint64_t)pick(g, 512) << 32;
        memcpy(data + n, &value, 8);
    }
}

static void put_xsave(struct generator *g, const struct test_case *test, struct state *state)
{
    uint8_t *image = state->xsave;
    memset(image, 0, sizeof state->xsave);
    uint16_t fcw = (uint16_t)(0x37f | (generator_random(g) & 0xf00));
    uint16_t fsw = generator_random(g) & 0x7800;
    uint32_t mxcsr = 0x1f80 | (generator_random(g) & 0xe000);
    if (!pick(g, 8))
        fcw = (uint16_t)(0x340 | (generator_random(g) & 0xf3f));
    if (!pick(g, 8))
        mxcsr = (uint32_t)generator_random(g) & 0xffff;
    memcpy(image, &fcw, 2);
    memcpy(image + 2, &fsw, 2);
    image[4] = (uint8_t)(generator_random(g) | generator_random(g));
    memcpy(image + 24, &mxcsr, 4);
    for (unsigned n = 0; n < 8; n++) {
        uint8_t *st = image + 32 + n * 16;
        generator_bytes(g, st, 10);
        if (pick(g, 4)) {
            uint16_t exponent = (uint16_t)((0x3ff0 + pick(g, 64)) | (generator_random(g) & 0x8000));
            st[7] |= 0x80;
            memcpy(st + 8, &exponent, 2);
        }
    }
    bool vsib = false, wide = false;
    for (unsigned n = 0; test->decoded && n < test->zi.operand_count; n++)
        if (test->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && test->op[n].mem.type == ZYDIS_MEMOP_TYPE_VSIB) {
            vsib = pick(g, 8);
            wide = test->zi.mnemonic == M(VGATHERQPD) || test->zi.mnemonic == M(VGATHERQPS) || test->zi.mnemonic == M(VPGATHERQD) ||
                   test->zi.mnemonic == M(VPGATHERQQ) || test->zi.mnemonic == M(VSCATTERQPD) || test->zi.mnemonic == M(VSCATTERQPS) ||
                   test->zi.mnemonic == M(VPSCATTERQD) || test->zi.mnemonic == M(VPSCATTERQQ);
        }
    put_random_numbers(g, image + 160, 256);
    for (unsigned n = 2; n < 8; n++)
        put_random_numbers(g, image + g->component_offset[n], g->component_bytes[n]);
    if (vsib) {
        put_indices(g, image + 160, 256, wide);
        put_indices(g, image + g->component_offset[2], g->component_bytes[2], wide);
        put_indices(g, image + g->component_offset[6], g->component_bytes[6], wide);
        put_indices(g, image + g->component_offset[7], g->component_bytes[7], wide);
        if (test->op[0].type == ZYDIS_OPERAND_TYPE_REGISTER && pick(g, 2) && (g->component_bytes[2])) /* AVX2's masks: the signs */
            for (unsigned n = 0; n < 256; n += 4)
                if (pick(g, 2))
                    image[160 + n + 3] |= 0x80 * !pick(g, 3);
    }
    memcpy(image + XSAVE_BV, &g->xcr0, 8);
}

/* Points a memory operand into the area. */
static void aim(struct generator *g, struct test_case *test, struct state *state, const ZydisDecodedOperand *op)
{
    uint64_t target = AREA + 0x4000 + pick(g, 0x8000);
    unsigned base = gpr_of(op->mem.base), index = gpr_of(op->mem.index);
    if (!pick(g, 2))
        target &= ~63ull;
    if (!pick(g, 16))
        target = AREA + pick(g, AREA_BYTES + 64);
    if (op->mem.base == ZYDIS_REGISTER_RIP || op->mem.base == ZYDIS_REGISTER_EIP) {
        int32_t disp = (int32_t)(target - CODE - test->zi.length);
        memcpy(test->code + test->zi.raw.disp.offset, &disp, 4);
        return;
    }
    if (base == 16)
        return;
    if (index < 16 && index != base)
        state->gpr[index] = pick(g, 64);
    uint64_t scaled = index < 16 && index != base ? state->gpr[index] * op->mem.scale : 0;
    state->gpr[base] = target - (uint64_t)op->mem.disp.value - scaled;
    if (index == base)
        state->gpr[base] /= 1u + op->mem.scale;
}

void generator_state(struct generator *g, struct test_case *test, struct state *state)
{
    for (unsigned n = 0; n < 16; n++) {
        unsigned kind = pick(g, 8);
        state->gpr[n] = kind < 3   ? AREA + 0x2000 + pick(g, 0xc000)
                        : kind < 5 ? generator_random(g) >> pick(g, 64)
                        : kind < 6 ? (uint64_t)0 - pick(g, 256)
                        : kind < 7 ? 1ull << pick(g, 64)
                                   : generator_random(g);
    }
    state->gpr[GPR_RSP] = AREA + 0x8000 + pick(g, 0x1000) * (pick(g, 4) ? 8 : 1);
    state->rip = CODE;
    state->rflags = (generator_random(g) & RFLAGS_OSZAPC) | RFLAGS_FIXED | RFLAGS_IF | (pick(g, 4) ? 0 : RFLAGS_DF);
    state->vector = -1;
    put_xsave(g, test, state);
    if (!test->decoded)
        return;
    if (test->zi.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE) || test->zi.meta.category == ZYDIS_CATEGORY_STRINGOP)
        state->gpr[GPR_RCX] = pick(g, 12) | (pick(g, 4) || !(test->zi.attributes & ZYDIS_ATTRIB_HAS_ADDRESSSIZE) ? 0 : generator_random(g) << 32);
    for (unsigned n = 0; n < test->zi.operand_count; n++)
        if (test->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && pick(g, 32))
            aim(g, test, state, &test->op[n]);
}

/* ---- comparison ---- */

void state_normalize(const struct generator *g, struct state *state)
{
    uint64_t bv;
    uint8_t *image = state->xsave;
    memcpy(&bv, image + XSAVE_BV, 8);
    if (!(bv & XCR0_X87)) {
        uint16_t fcw = 0x37f;
        memset(image, 0, 24);
        memset(image + 32, 0, 128);
        memcpy(image, &fcw, 2);
    }
    if (!(bv & XCR0_SSE))
        memset(image + 160, 0, 256);
    for (unsigned n = 2; n < 8; n++)
        if (!(bv >> n & 1))
            memset(image + g->component_offset[n], 0, g->component_bytes[n]);
    for (unsigned n = 0; n < 8; n++)
        memset(image + 32 + 16 * n + 10, 0, 6);
    if (host_is_amd() && !(image[2] & 0x80)) /* no exception: its XSAVE does not tell where the last instruction was */
        memset(image + 6, 0, 18);
    memset(image + 5, 0, 1);
    memset(image + 28, 0, 4); /* MXCSR_MASK */
    memset(image + 416, 0, 160);
    /* What lies between components is nobody's. */
    uint8_t clean[CPU_XSAVE_BYTES] = {0};
    memcpy(clean, image, 576);
    for (unsigned n = 2; n < 8; n++)
        memcpy(clean + g->component_offset[n], image + g->component_offset[n], g->component_bytes[n]);
    memcpy(image, clean, sizeof clean);
}
