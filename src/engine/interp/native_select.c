/*
 * Which instructions may run natively, and what their handlers need to know.
 *
 * This is a safety boundary: an instruction gets a stub only when its ISA set is on the list below, each of its operands is of a kind that stubs
 * account for, and it has at most one memory operand, which the stub addresses through a register. Everything privileged, everything that transfers
 * control, uses the stack, segments or host control state is refused by not being listed. What the list allows and the host lacks faults in the
 * stub and becomes #UD.
 * Threading: the vCPU's thread.
 */
#include <string.h>

#include "engine/interp/native_priv.h"
#include "engine/interp/system_priv.h"

#define ALLOWED 0x80u
#define HINT 0x40u  /* no effect that a guest can see */
#define TOUCH 0x20u /* cache line maintenance: faults like a read of one byte */

#define GENERAL ALLOWED
#define SSE (ALLOWED | SIMD_SSE)
#define MMX (ALLOWED | SIMD_X87)
#define AVX (ALLOWED | SIMD_AVX)
#define AVX512 (ALLOWED | SIMD_AVX | SIMD_AVX512)

#define ISA(name) [ZYDIS_ISA_SET_##name]
#define ISA512(name) ISA(name##_128) = AVX512, ISA(name##_256) = AVX512, ISA(name##_512) = AVX512

static const uint8_t isa_class[ZYDIS_ISA_SET_MAX_VALUE + 1] = {
    ISA(ADOX_ADCX) = GENERAL, ISA(BMI1) = GENERAL, ISA(BMI2) = GENERAL, ISA(LZCNT) = GENERAL,
    ISA(MOVBE) = GENERAL, ISA(MOVDIR) = GENERAL, ISA(POPCNT) = GENERAL, ISA(RDRAND) = GENERAL,
    ISA(RDSEED) = GENERAL, ISA(SERIALIZE) = GENERAL, ISA(TBM) = GENERAL,
    ISA(PENTIUMMMX) = MMX, ISA(SSE2MMX) = MMX, ISA(SSSE3MMX) = MMX,
    ISA(SSE) = SSE, ISA(SSE2) = SSE, ISA(SSE3) = SSE, ISA(SSSE3) = SSE, ISA(SSE4) = SSE, ISA(SSE42) = SSE,
    ISA(SSE4A) = SSE, ISA(SSEMXCSR) = SSE, ISA(AES) = SSE, ISA(PCLMULQDQ) = SSE, ISA(SHA) = SSE, ISA(GFNI) = SSE,
    ISA(AVX) = AVX, ISA(AVX2) = AVX, ISA(AVX2GATHER) = AVX, ISA(AVXAES) = AVX, ISA(AVX_GFNI) = AVX,
    ISA(AVX_VNNI) = AVX, ISA(F16C) = AVX, ISA(FMA) = AVX, ISA(FMA4) = AVX, ISA(XOP) = AVX, ISA(VAES) = AVX,
    ISA(VPCLMULQDQ) = AVX,
    ISA512(AVX512F), ISA(AVX512F_128N) = AVX512, ISA(AVX512F_KOP) = AVX512, ISA(AVX512F_SCALAR) = AVX512,
    ISA512(AVX512BW), ISA(AVX512BW_128N) = AVX512, ISA(AVX512BW_KOP) = AVX512,
    ISA512(AVX512DQ), ISA(AVX512DQ_128N) = AVX512, ISA(AVX512DQ_KOP) = AVX512, ISA(AVX512DQ_SCALAR) = AVX512,
    ISA512(AVX512CD), ISA512(AVX512_BF16), ISA512(AVX512_BITALG), ISA512(AVX512_GFNI), ISA512(AVX512_IFMA),
    ISA512(AVX512_VAES), ISA512(AVX512_VBMI), ISA512(AVX512_VBMI2), ISA512(AVX512_VNNI),
    ISA512(AVX512_VP2INTERSECT), ISA512(AVX512_VPCLMULQDQ), ISA512(AVX512_VPOPCNTDQ),
    ISA512(AVX512_FP16), ISA(AVX512_FP16_128N) = AVX512, ISA(AVX512_FP16_SCALAR) = AVX512,
    ISA(SSE_PREFETCH) = HINT, ISA(PREFETCH_NOP) = HINT, ISA(PREFETCHWT1) = HINT, ISA(CLDEMOTE) = HINT,
    ISA(CLFSH) = TOUCH, ISA(CLFLUSHOPT) = TOUCH, ISA(CLWB) = TOUCH,
};

/* Members of SSE sets that touch no vector register and are not subject to CR0 and CR4 (SDM vol. 3, 14.1). */
static bool is_general(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_CRC32:
    case ZYDIS_MNEMONIC_LFENCE:
    case ZYDIS_MNEMONIC_MFENCE:
    case ZYDIS_MNEMONIC_SFENCE:
    case ZYDIS_MNEMONIC_MOVNTI:
        return true;
    default:
        return false;
    }
}

static bool is_x87(const ZydisDecodedInstruction *zi)
{
    return zi->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && zi->opcode_map == ZYDIS_OPCODE_MAP_DEFAULT &&
           zi->opcode >= 0xd8 && zi->opcode <= 0xdf;
}

/* Control instructions, which leave the last instruction and data pointers alone (SDM vol. 1, 8.1.8). */
static bool keeps_x87_pointers(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_FNINIT:
    case ZYDIS_MNEMONIC_FNCLEX:
    case ZYDIS_MNEMONIC_FLDCW:
    case ZYDIS_MNEMONIC_FNSTCW:
    case ZYDIS_MNEMONIC_FNSTSW:
    case ZYDIS_MNEMONIC_FENI8087_NOP:
    case ZYDIS_MNEMONIC_FDISI8087_NOP:
    case ZYDIS_MNEMONIC_FSETPM287_NOP:
        return true;
    default:
        return false;
    }
}

/* Refused although their ISA set is listed: op_xsave.c has those that need care, the rest nobody may run. */
static bool is_refused(const ZydisDecodedInstruction *zi)
{
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_FNSAVE:
    case ZYDIS_MNEMONIC_FNSTENV:
    case ZYDIS_MNEMONIC_FRSTOR:
    case ZYDIS_MNEMONIC_FLDENV:
    case ZYDIS_MNEMONIC_FWAIT:
    case ZYDIS_MNEMONIC_MOVDIR64B:
        return true;
    default:
        return zi->attributes & ZYDIS_ATTRIB_HAS_LOCK || zi->meta.branch_type != ZYDIS_BRANCH_TYPE_NONE ||
               zi->encoding == ZYDIS_INSTRUCTION_ENCODING_3DNOW || zi->encoding == ZYDIS_INSTRUCTION_ENCODING_MVEX;
    }
}

static bool register_allowed(ZydisRegister reg)
{
    switch (ZydisRegisterGetClass(reg)) {
    case ZYDIS_REGCLASS_GPR8:
    case ZYDIS_REGCLASS_GPR16:
    case ZYDIS_REGCLASS_GPR32:
    case ZYDIS_REGCLASS_GPR64:
    case ZYDIS_REGCLASS_X87:
    case ZYDIS_REGCLASS_MMX:
    case ZYDIS_REGCLASS_XMM:
    case ZYDIS_REGCLASS_YMM:
    case ZYDIS_REGCLASS_ZMM:
    case ZYDIS_REGCLASS_MASK:
    case ZYDIS_REGCLASS_FLAGS:
        return true;
    default:
        return reg == ZYDIS_REGISTER_MXCSR || reg == ZYDIS_REGISTER_X87CONTROL || reg == ZYDIS_REGISTER_X87STATUS ||
               reg == ZYDIS_REGISTER_X87TAG;
    }
}

static bool has_register(const struct decode *d, ZydisRegisterClass class)
{
    for (unsigned n = 0; n < d->zi.operand_count; n++)
        if (d->op[n].type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(d->op[n].reg.value) == class)
            return true;
    return false;
}

/* Checks every operand; *memory is the memory operand's index or -1. */
static bool operands_allowed(const struct decode *d, int *memory)
{
    *memory = -1;
    for (unsigned n = 0; n < d->zi.operand_count; n++) {
        const ZydisDecodedOperand *op = &d->op[n];
        switch (op->type) {
        case ZYDIS_OPERAND_TYPE_REGISTER:
            if (!register_allowed(op->reg.value))
                return false;
            break;
        case ZYDIS_OPERAND_TYPE_IMMEDIATE:
            break;
        case ZYDIS_OPERAND_TYPE_MEMORY: {
            bool hidden = op->encoding == ZYDIS_OPERAND_ENCODING_NONE;
            bool mask_move = d->zi.mnemonic == ZYDIS_MNEMONIC_MASKMOVQ || d->zi.mnemonic == ZYDIS_MNEMONIC_MASKMOVDQU ||
                             d->zi.mnemonic == ZYDIS_MNEMONIC_VMASKMOVDQU;
            if (*memory >= 0 || op->size == 0 || op->size % 8 || op->size > 512 || hidden != mask_move ||
                (!hidden && op->encoding != ZYDIS_OPERAND_ENCODING_MODRM_RM) ||
                (op->mem.type != ZYDIS_MEMOP_TYPE_MEM && op->mem.type != ZYDIS_MEMOP_TYPE_VSIB))
                return false;
            *memory = (int)n;
            break;
        }
        default:
            return false;
        }
    }
    return true;
}

/* decode.c describes ordinary memory operands; this one does it for implicit ones and those with a vector index. */
static void describe_memory(const struct decode *d, const ZydisDecodedOperand *op, struct insn *i)
{
    unsigned base = op->mem.base == ZYDIS_REGISTER_NONE                                       ? GPR_ZERO
                    : ZydisRegisterGetClass(op->mem.base) == ZYDIS_REGCLASS_IP ? GPR_RIP
                                                                               : (unsigned)ZydisRegisterGetId(op->mem.base);
    i->base = REG_OFFSET(base);
    i->index = REG_OFFSET(GPR_ZERO);
    i->displacement = op->mem.disp.has_displacement ? (int32_t)op->mem.disp.value : 0;
    i->segment = (uint8_t)ZydisRegisterGetId(op->mem.segment);
    i->address_mask = d->zi.address_width == 16 ? 0xffff : d->zi.address_width == 32 ? 0xffffffff : ~0ull;
    switch (op->mem.scale) {
    case 2:
        i->scale = 1;
        break;
    case 4:
        i->scale = 2;
        break;
    case 8:
        i->scale = 3;
        break;
    default:
        i->scale = 0;
    }
}

/* ---- masks ---- */

static bool has_opmask(const ZydisDecodedInstruction *zi)
{
    return zi->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX && zi->avx.mask.mode > ZYDIS_MASK_MODE_DISABLED &&
           zi->avx.mask.reg != ZYDIS_REGISTER_K0;
}

static bool suppresses_faults(ZydisExceptionClass class)
{
    switch (class) {
    case ZYDIS_EXCEPTION_CLASS_E1:
    case ZYDIS_EXCEPTION_CLASS_E2:
    case ZYDIS_EXCEPTION_CLASS_E3:
    case ZYDIS_EXCEPTION_CLASS_E4:
    case ZYDIS_EXCEPTION_CLASS_E5:
    case ZYDIS_EXCEPTION_CLASS_E6:
    case ZYDIS_EXCEPTION_CLASS_E10:
    case ZYDIS_EXCEPTION_CLASS_E11:
        return true;
    default:
        return false;
    }
}

/* Listed among the fault-suppressing classes, but each element of the result depends on others of the source. */
static bool reads_all_elements(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_VPCONFLICTD:
    case ZYDIS_MNEMONIC_VPCONFLICTQ:
    case ZYDIS_MNEMONIC_VDBPSADBW:
    case ZYDIS_MNEMONIC_VCVTNE2PS2BF16:
    case ZYDIS_MNEMONIC_VGF2P8AFFINEQB:
    case ZYDIS_MNEMONIC_VGF2P8AFFINEINVQB:
        return true;
    default:
        return false;
    }
}

static const uint8_t broadcast_elements[ZYDIS_BROADCAST_MODE_MAX_VALUE + 1] = {
    [ZYDIS_BROADCAST_MODE_1_TO_2] = 2,   [ZYDIS_BROADCAST_MODE_1_TO_4] = 4,  [ZYDIS_BROADCAST_MODE_1_TO_8] = 8,
    [ZYDIS_BROADCAST_MODE_1_TO_16] = 16, [ZYDIS_BROADCAST_MODE_1_TO_32] = 32, [ZYDIS_BROADCAST_MODE_1_TO_64] = 64,
    [ZYDIS_BROADCAST_MODE_2_TO_4] = 4,   [ZYDIS_BROADCAST_MODE_2_TO_8] = 8,  [ZYDIS_BROADCAST_MODE_2_TO_16] = 16,
    [ZYDIS_BROADCAST_MODE_4_TO_8] = 8,   [ZYDIS_BROADCAST_MODE_4_TO_16] = 16, [ZYDIS_BROADCAST_MODE_8_TO_16] = 16,
};

static void describe_opmask(const struct decode *d, const ZydisDecodedOperand *op, struct native_code *n)
{
    const ZydisDecodedInstruction *zi = &d->zi;
    unsigned count = op->element_count ? op->element_count : 1, bits = count;

    if (zi->avx.broadcast.mode != ZYDIS_BROADCAST_MODE_INVALID) {
        bits = broadcast_elements[zi->avx.broadcast.mode];
    } else if (op != &d->op[0] && d->op[0].type == ZYDIS_OPERAND_TYPE_REGISTER && d->op[0].element_size &&
               ZydisRegisterGetClass(d->op[0].reg.value) != ZYDIS_REGCLASS_MASK) {
        /* Dot products: several elements in memory for one of the result. */
        unsigned results = d->op[0].size / d->op[0].element_size;
        if (results < count)
            bits = count = results;
    }
    if (!bits || !count || n->size % count)
        return;
    n->mask_kind = zi->meta.category == ZYDIS_CATEGORY_COMPRESS || zi->meta.category == ZYDIS_CATEGORY_EXPAND ? MASK_PACKED
                                                                                                             : MASK_OPMASK;
    n->mask_register = (uint8_t)ZydisRegisterGetId(zi->avx.mask.reg);
    n->mask_bits = (uint8_t)bits;
    n->element_size = (uint8_t)(n->size / count);
}

static void describe_mask(const struct decode *d, const ZydisDecodedOperand *op, struct native_code *n)
{
    const ZydisDecodedInstruction *zi = &d->zi;
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_VMASKMOVPS:
    case ZYDIS_MNEMONIC_VMASKMOVPD:
    case ZYDIS_MNEMONIC_VPMASKMOVD:
    case ZYDIS_MNEMONIC_VPMASKMOVQ:
        n->mask_kind = MASK_SIGNS;
        n->mask_register = (uint8_t)ZydisRegisterGetId(d->op[1].reg.value);
        n->element_size = zi->mnemonic == ZYDIS_MNEMONIC_VMASKMOVPD || zi->mnemonic == ZYDIS_MNEMONIC_VPMASKMOVQ ? 8 : 4;
        n->mask_bits = n->size / n->element_size;
        return;
    default:
        break;
    }
    if (has_opmask(zi) && suppresses_faults(zi->meta.exception_class) &&
        !reads_all_elements(zi->mnemonic))
        describe_opmask(d, op, n);
}

/* ---- gather and scatter ---- */

static bool select_vsib(struct icpu *c, const struct decode *d, const ZydisDecodedOperand *op, struct native_code *n, struct insn *i)
{
    const ZydisDecodedInstruction *zi = &d->zi;
    bool evex = zi->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX, scatter = zi->opcode >= 0xa0;
    if (zi->opcode_map != ZYDIS_OPCODE_MAP_0F38 || (zi->opcode & 0xfc) != (scatter ? 0xa0 : 0x90) || (scatter && !evex))
        return false;
    bool wide = evex ? zi->raw.evex.W : zi->raw.vex.W;
    const ZydisDecodedOperand *mask = NULL, *vector = NULL;
    for (unsigned k = 0; k < zi->operand_count_visible; k++) {
        if (d->op[k].encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
            vector = &d->op[k];
        else if (d->op[k].encoding == (evex ? ZYDIS_OPERAND_ENCODING_MASK : ZYDIS_OPERAND_ENCODING_NDSNDD))
            mask = &d->op[k];
    }
    if (!mask || !vector)
        return false;
    n->vector = (uint8_t)ZydisRegisterGetId(vector->reg.value);
    n->index = (uint8_t)ZydisRegisterGetId(op->mem.index);
    n->mask_register = (uint8_t)ZydisRegisterGetId(mask->reg.value);
    n->opmask = evex;
    n->element_size = wide ? 8 : 4;
    n->index_size = zi->opcode & 1 ? 8 : 4;
    unsigned larger = n->element_size > n->index_size ? n->element_size : n->index_size;
    n->mask_bits = (uint8_t)(zi->avx.vector_length / 8 / larger);
    n->vector_bytes = (uint8_t)(n->mask_bits * n->element_size);
    n->size = n->element_size;
    if (evex ? n->mask_register == 0 || (!scatter && n->vector == n->index)
             : n->vector == n->index || n->vector == n->mask_register || n->index == n->mask_register)
        return false;
    describe_memory(d, op, i);
    static const struct stub_code none;
    i->native = native_code_intern(c, n, &none);
    i->fn = scatter ? native_scatter : native_gather;
    return true;
}

/* ---- selection ---- */

static unsigned simd_classes(const struct decode *d)
{
    const ZydisDecodedInstruction *zi = &d->zi;
    if (is_x87(zi))
        return ALLOWED | SIMD_X87;
    if (is_general(zi->mnemonic))
        return ALLOWED;
    unsigned classes = isa_class[zi->meta.isa_set];
    if (classes & SIMD_SSE && has_register(d, ZYDIS_REGCLASS_MMX)) {
        classes |= SIMD_X87;
        if (!has_register(d, ZYDIS_REGCLASS_XMM))
            classes &= ~SIMD_SSE;
    }
    return classes;
}

/* Of the memory operand, in bytes: SDM vol. 2A, tables 2-15 to 2-30, and vol. 1, 14.9. */
static unsigned required_alignment(const struct icpu *c, const ZydisDecodedInstruction *zi, unsigned size)
{
    if (c->amd && zi->meta.isa_set == ZYDIS_ISA_SET_SHA)
        return 1;
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_MOVUPS:
    case ZYDIS_MNEMONIC_MOVUPD:
    case ZYDIS_MNEMONIC_MOVDQU:
    case ZYDIS_MNEMONIC_LDDQU:
    case ZYDIS_MNEMONIC_PCMPESTRI:
    case ZYDIS_MNEMONIC_PCMPESTRM:
    case ZYDIS_MNEMONIC_PCMPISTRI:
    case ZYDIS_MNEMONIC_PCMPISTRM:
    case ZYDIS_MNEMONIC_MASKMOVDQU:
    case ZYDIS_MNEMONIC_VMASKMOVDQU:
        return 1;
    case ZYDIS_MNEMONIC_CVTPD2PI:
    case ZYDIS_MNEMONIC_CVTTPD2PI:
        return 16;
    default:
        break;
    }
    switch (zi->meta.exception_class) {
    case ZYDIS_EXCEPTION_CLASS_SSE1:
    case ZYDIS_EXCEPTION_CLASS_SSE2:
    case ZYDIS_EXCEPTION_CLASS_SSE4:
        return size == 16 ? 16 : 1;
    case ZYDIS_EXCEPTION_CLASS_AVX1:
    case ZYDIS_EXCEPTION_CLASS_E1:
    case ZYDIS_EXCEPTION_CLASS_E1NF:
        return size;
    default:
        return 1;
    }
}

static void describe_flags(const struct icpu *c, const struct decode *d, const ZydisDecodedOperand *op, unsigned classes, struct native_code *n)
{
    const ZydisDecodedInstruction *zi = &d->zi;
    n->blocked = classes & 0xf;
    if (is_x87(zi)) {
        if (!keeps_x87_pointers(zi->mnemonic))
            n->flags |= NATIVE_POINTERS;
        n->fop = (uint16_t)((zi->opcode & 7) << 8 | d->bytes[zi->raw.modrm.offset]);
    } else if (classes & SIMD_X87) {
        n->flags |= NATIVE_MMX;
    }
    if (zi->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY && d->code_bits != 64)
        n->flags |= NATIVE_NOT_REAL;
    if (op) {
        n->size = (uint8_t)(op->size / 8);
        if (op->actions & ZYDIS_OPERAND_ACTION_MASK_READ)
            n->flags |= NATIVE_READ;
        if (op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)
            n->flags |= NATIVE_WRITE;
        /* MASKMOVDQU and stores under a mask leave some bytes as they are. */
        if (op->encoding == ZYDIS_OPERAND_ENCODING_NONE || has_opmask(zi))
            n->flags |= NATIVE_READ;
        n->align_mask = (uint8_t)(required_alignment(c, zi, n->size) - 1);
    }
}

/*
 * Sets that many processors with all else lack: #UD comes before any fault of the memory operand, so they must not get as far as reading it.
 */
static bool is_offered(struct icpu *c, const struct decode *d)
{
    static const struct {
        uint16_t isa_set;
        uint8_t subleaf;
        uint32_t leaf;
        enum cpuid_register where;
        uint8_t bit;
    } sets[] = {
        {ZYDIS_ISA_SET_SSE4A, 0, 0x80000001, CPUID_ECX, 6},
        {ZYDIS_ISA_SET_XOP, 0, 0x80000001, CPUID_ECX, 11},
        {ZYDIS_ISA_SET_FMA4, 0, 0x80000001, CPUID_ECX, 16},
        {ZYDIS_ISA_SET_TBM, 0, 0x80000001, CPUID_ECX, 21},
        {ZYDIS_ISA_SET_MOVDIR, 0, 7, CPUID_ECX, 27},
        {ZYDIS_ISA_SET_AVX512_VP2INTERSECT_128, 0, 7, CPUID_EDX, 8},
        {ZYDIS_ISA_SET_AVX512_VP2INTERSECT_256, 0, 7, CPUID_EDX, 8},
        {ZYDIS_ISA_SET_AVX512_VP2INTERSECT_512, 0, 7, CPUID_EDX, 8},
        {ZYDIS_ISA_SET_AVX512_FP16_128, 0, 7, CPUID_EDX, 23},
        {ZYDIS_ISA_SET_AVX512_FP16_128N, 0, 7, CPUID_EDX, 23},
        {ZYDIS_ISA_SET_AVX512_FP16_256, 0, 7, CPUID_EDX, 23},
        {ZYDIS_ISA_SET_AVX512_FP16_512, 0, 7, CPUID_EDX, 23},
        {ZYDIS_ISA_SET_AVX512_FP16_SCALAR, 0, 7, CPUID_EDX, 23},
        {ZYDIS_ISA_SET_AVX_VNNI, 1, 7, CPUID_EAX, 4},
        {ZYDIS_ISA_SET_AVX512_BF16_128, 1, 7, CPUID_EAX, 5},
        {ZYDIS_ISA_SET_AVX512_BF16_256, 1, 7, CPUID_EAX, 5},
        {ZYDIS_ISA_SET_AVX512_BF16_512, 1, 7, CPUID_EAX, 5},
    };
    for (unsigned n = 0; n < sizeof(sets) / sizeof(sets[0]); n++) {
        if (d->zi.meta.isa_set != sets[n].isa_set)
            continue;
        struct cpuid_regs r = cpuid_query(c->v.cpuid, &c->v.cpu, c->v.index, sets[n].leaf, sets[n].subleaf);
        const uint32_t values[] = {r.eax, r.ebx, r.ecx, r.edx};
        return values[sets[n].where] >> sets[n].bit & 1;
    }
    return true;
}

unsigned native_classes(struct icpu *c, const struct decode *d, unsigned *alignment, bool *x87_pointers)
{
    int memory;
    unsigned classes = simd_classes(d);
    *alignment = 1;
    *x87_pointers = false;
    if (d->zi.mnemonic == ZYDIS_MNEMONIC_FWAIT)
        return ALLOWED | SIMD_X87;
    if (!(classes & ALLOWED) || is_refused(&d->zi) || !is_offered(c, d) || !operands_allowed(d, &memory))
        return 0;
    *x87_pointers = is_x87(&d->zi) && !keeps_x87_pointers(d->zi.mnemonic);
    if (memory >= 0) {
        const ZydisDecodedOperand *op = &d->op[memory];
        if (op->encoding == ZYDIS_OPERAND_ENCODING_NONE || op->mem.type != ZYDIS_MEMOP_TYPE_MEM)
            return 0;
        *alignment = required_alignment(c, &d->zi, op->size / 8);
    }
    return classes;
}

bool native_select(struct icpu *c, const struct decode *d, struct insn *i)
{
    int memory;
    unsigned classes = simd_classes(d);

    if (classes == HINT) {
        i->fn = native_hint;
        return true;
    }
    if (is_refused(&d->zi) || !is_offered(c, d) || !operands_allowed(d, &memory))
        return false;
    if (classes == TOUCH && memory >= 0) {
        i->fn = native_touch;
        return true;
    }
    if (!(classes & ALLOWED))
        return false;

    const ZydisDecodedOperand *op = memory < 0 ? NULL : &d->op[memory];
    struct native_code n;
    memset(&n, 0, sizeof(n));
    describe_flags(c, d, op, classes, &n);
    if (op && op->mem.type == ZYDIS_MEMOP_TYPE_VSIB) {
        if (!select_vsib(c, d, op, &n, i))
            return false;
    } else {
        struct stub_code stub;
        if (!native_stub_build(d, memory, &stub))
            return false;
        if (op && op->encoding == ZYDIS_OPERAND_ENCODING_NONE)
            describe_memory(d, op, i);
        else if (op)
            describe_mask(d, op, &n);
        i->native = native_code_intern(c, &n, &stub);
        i->fn = n.mask_kind         ? native_masked
                : is_x87(&d->zi)    ? (op ? native_x87_memory : native_x87_register)
                : op                ? native_memory
                                    : native_register;
    }
    if (!i->native) {
        i->fn = native_arena_full;
        i->flags |= INSN_ENDS_BLOCK;
    }
    return true;
}
