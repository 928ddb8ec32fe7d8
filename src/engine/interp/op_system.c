/*
 * Selection of all system instructions, and those too small for a file of their own: CPUID, RDTSC and family, cache control, CLAC STAC, hypercalls.
 *
 * Rows of the table name a mnemonic and its handler; those whose handler depends on the operands have a function below. Handlers that change the mode or the control
 * flow end the block. Instructions of features that CPUID hides raise #UD here, so that nothing runs them natively.
 * Sources: SDM vol. 2. Threading: as interp_priv.h.
 */
#include "engine/interp/system_priv.h"

#include "state/inputs.h"

#define KVM_ENOSYS 1000
#define KVM_EPERM 1
#define MSR_APIC_BASE 0x1b
#define APIC_BASE_ENABLED (1ull << 11)
#define CPUID_EDX_APIC (1u << 9)

/* ---- small handlers ---- */

static void op_hidden(struct icpu *c, const struct insn *i)
{
    raise_fault(c, VECTOR_UD);
}

/* Serialising instructions also wait for the stores before them (SDM vol. 3, 9.3). */
static inline void drain_stores(void)
{
    __asm__ volatile("mfence" : : : "memory");
}

static void op_serialize(struct icpu *c, const struct insn *i)
{
    drain_stores();
}

/* INVD, WBINVD: there is no cache to empty. */
static void op_privileged_fence(struct icpu *c, const struct insn *i)
{
    require_cpl0(c);
    drain_stores();
}

/* The APIC's bit in CPUID follows the enable bit in IA32_APIC_BASE (SDM vol. 3, 10.4.3). */
static uint32_t cpuid_apic_hidden(struct icpu *c, uint32_t leaf)
{
    uint64_t base;
    if ((leaf != 1 && leaf != 0x80000001) || c->v.host_ops->msr_read(c->v.host, MSR_APIC_BASE, &base) || (base & APIC_BASE_ENABLED))
        return 0;
    return CPUID_EDX_APIC;
}

static void op_cpuid(struct icpu *c, const struct insn *i)
{
    uint64_t *gpr = c->v.cpu.gpr;
    simd_save(c);
    drain_stores();
    vcpu_count(&c->v, COUNTER_cpuid);
    uint32_t leaf = (uint32_t)gpr[GPR_RAX];
    struct cpuid_regs r = cpuid_query(c->v.cpuid, &c->v.cpu, c->v.index, leaf, (uint32_t)gpr[GPR_RCX]);
    gpr[GPR_RAX] = r.eax;
    gpr[GPR_RBX] = r.ebx;
    gpr[GPR_RCX] = r.ecx;
    gpr[GPR_RDX] = r.edx & ~cpuid_apic_hidden(c, leaf);
}

static void tsc_check(struct icpu *c)
{
    if ((c->v.cpu.cr4 & CR4_TSD) && c->cpl > 0)
        raise_gp0(c);
}

static void read_tsc(struct icpu *c)
{
    simd_save(c);
    uint64_t tsc = inputs_tsc() + c->v.cpu.tsc_offset;
    c->v.cpu.gpr[GPR_RAX] = (uint32_t)tsc;
    c->v.cpu.gpr[GPR_RDX] = tsc >> 32;
}

static void op_rdtsc(struct icpu *c, const struct insn *i)
{
    tsc_check(c);
    read_tsc(c);
}

static void op_rdtscp(struct icpu *c, const struct insn *i)
{
    tsc_check(c);
    read_tsc(c);
    c->v.cpu.gpr[GPR_RCX] = (uint32_t)c->v.cpu.msr_tsc_aux;
}

static void op_rdpid(struct icpu *c, const struct insn *i)
{
    reg_write(c, i->dst, c->code_bits == 64 ? 8 : 4, c->v.cpu.msr_tsc_aux);
}

/* There are no performance counters. */
static void op_rdpmc(struct icpu *c, const struct insn *i)
{
    raise_gp0(c);
}

static void set_ac(struct icpu *c, bool set)
{
    if (c->cpl > 0)
        raise_fault(c, VECTOR_UD);
    uint64_t flags = flags_get(c);
    flags_set(c, set ? flags | RFLAGS_AC : flags & ~RFLAGS_AC);
}

static void op_clac(struct icpu *c, const struct insn *i)
{
    set_ac(c, false);
}

static void op_stac(struct icpu *c, const struct insn *i)
{
    set_ac(c, true);
}

/* KVM's calling convention, none of whose calls are offered. */
static void op_hypercall(struct icpu *c, const struct insn *i)
{
    int64_t result = c->cpl > 0 ? -KVM_EPERM : -KVM_ENOSYS;
    reg_write(c, REG_OFFSET(GPR_RAX), c->code_bits == 64 ? 8 : 4, (uint64_t)result);
}

/* ---- the table ---- */

struct row {
    uint16_t mnemonic;
    insn_fn *fn;
};

#define M(name) ZYDIS_MNEMONIC_##name

/* All of these end their block. */
static const struct row rows_ending[] = {
    {M(CLAC), op_clac},         {M(STAC), op_stac},         {M(CLTS), op_clts},
    {M(LMSW), op_lmsw},         {M(RDMSR), op_rdmsr},       {M(WRMSR), op_wrmsr},
    {M(XSETBV), op_xsetbv},     {M(INVLPG), op_invlpg},     {M(INVPCID), op_invpcid},
    {M(SYSCALL), op_syscall},   {M(SYSRET), op_sysret},     {M(SYSENTER), op_sysenter},
    {M(SYSEXIT), op_sysexit},   {M(LLDT), op_lldt},         {M(LTR), op_ltr},
    {M(LGDT), op_lgdt},         {M(LIDT), op_lidt},         {M(IN), op_in},
    {M(OUT), op_out},           {M(IRET), op_iret},         {M(IRETD), op_iret},
    {M(IRETQ), op_iret},        {M(CPUID), op_cpuid},       {M(SERIALIZE), op_serialize},
    {M(INVD), op_privileged_fence}, {M(WBINVD), op_privileged_fence},
    {M(VMCALL), op_hypercall},  {M(VMMCALL), op_hypercall},
};

static const struct row rows[] = {
    {M(RDTSC), op_rdtsc},       {M(RDTSCP), op_rdtscp},     {M(RDPID), op_rdpid},
    {M(RDPMC), op_rdpmc},       {M(XGETBV), op_xgetbv},     {M(SWAPGS), op_swapgs},
    {M(RDFSBASE), op_rdfsbase}, {M(RDGSBASE), op_rdgsbase}, {M(WRFSBASE), op_wrfsbase},
    {M(WRGSBASE), op_wrgsbase}, {M(LAR), op_lar},           {M(LSL), op_lsl},
    {M(VERR), op_verr},         {M(VERW), op_verw},         {M(ARPL), op_arpl},
    {M(SLDT), op_sldt},         {M(STR), op_str},           {M(SMSW), op_smsw},
    {M(SGDT), op_sgdt},         {M(SIDT), op_sidt},
};

/* Hidden by CPUID. */
static const uint16_t hidden[] = {
    M(MONITOR), M(MWAIT),  M(MONITORX), M(MWAITX), M(RDPKRU),  M(WRPKRU),  M(GETSEC),  M(RSM),
    M(VMLAUNCH), M(VMRESUME), M(VMXOFF), M(VMXON), M(VMCLEAR), M(VMPTRLD), M(VMPTRST), M(VMREAD),
    M(VMWRITE), M(VMFUNC), M(INVEPT),   M(INVVPID), M(VMRUN),  M(VMLOAD),  M(VMSAVE),  M(STGI),
    M(CLGI),   M(SKINIT),  M(INVLPGA),  M(ENCLS),  M(ENCLU),   M(ENCLV),   M(PCONFIG), M(UMONITOR),
    M(UMWAIT), M(TPAUSE),  M(ENQCMD),   M(ENQCMDS), M(CLZERO), M(PTWRITE), M(XBEGIN),  M(XEND),
    M(XABORT), M(XTEST),   M(XSUSLDTRK), M(XRESLDTRK), M(MOVDIR64B),
};

/* ---- instructions whose handler depends on the operands ---- */

static bool segment_operand(const ZydisDecodedOperand *op, uint8_t *segment)
{
    if (op->type != ZYDIS_OPERAND_TYPE_REGISTER)
        return false;
    switch (op->reg.value) {
    case ZYDIS_REGISTER_ES:
        *segment = SEG_ES;
        return true;
    case ZYDIS_REGISTER_CS:
        *segment = SEG_CS;
        return true;
    case ZYDIS_REGISTER_SS:
        *segment = SEG_SS;
        return true;
    case ZYDIS_REGISTER_DS:
        *segment = SEG_DS;
        return true;
    case ZYDIS_REGISTER_FS:
        *segment = SEG_FS;
        return true;
    case ZYDIS_REGISTER_GS:
        *segment = SEG_GS;
        return true;
    default:
        return false;
    }
}

static bool numbered_operand(const ZydisDecodedOperand *op, ZydisRegisterClass class, uint8_t *number)
{
    if (op->type != ZYDIS_OPERAND_TYPE_REGISTER || ZydisRegisterGetClass(op->reg.value) != class)
        return false;
    *number = (uint8_t)ZydisRegisterGetId(op->reg.value);
    return true;
}

static insn_fn *select_move(const struct decode *d, struct insn *i)
{
    if (segment_operand(&d->op[0], &i->extra)) {
        i->flags |= INSN_ENDS_BLOCK;
        return i->extra == SEG_CS ? op_hidden : op_mov_to_segment;
    }
    if (segment_operand(&d->op[1], &i->extra))
        return op_mov_from_segment;

    insn_fn *fn = NULL;
    if (numbered_operand(&d->op[0], ZYDIS_REGCLASS_CONTROL, &i->extra))
        fn = op_mov_to_cr;
    else if (numbered_operand(&d->op[1], ZYDIS_REGCLASS_CONTROL, &i->extra))
        fn = op_mov_from_cr;
    else if (numbered_operand(&d->op[0], ZYDIS_REGCLASS_DEBUG, &i->extra))
        return i->flags |= INSN_ENDS_BLOCK, i->extra < 8 ? op_mov_to_dr : op_hidden;
    else if (numbered_operand(&d->op[1], ZYDIS_REGCLASS_DEBUG, &i->extra))
        return i->extra < 8 ? op_mov_from_dr : op_hidden;
    if (!fn)
        return NULL;
    if (fn == op_mov_to_cr)
        i->flags |= INSN_ENDS_BLOCK;
    unsigned n = i->extra;
    bool exists = n == 0 || n == 2 || n == 3 || n == 4 || (n == 8 && d->code_bits == 64);
    return exists ? fn : op_hidden;
}

/* The stack slot's size: segment registers themselves are 16 bits wide. */
static unsigned stack_operand_bytes(const struct decode *d)
{
    if (d->code_bits == 64)
        return d->zi.operand_width == 16 ? 2 : 8;
    return d->zi.operand_width / 8u;
}

static insn_fn *select_stack(const struct decode *d, struct insn *i)
{
    if (!segment_operand(&d->op[0], &i->extra))
        return NULL;
    i->op_size = (uint8_t)stack_operand_bytes(d);
    if (d->zi.mnemonic == ZYDIS_MNEMONIC_PUSH)
        return op_push_segment;
    i->flags |= INSN_ENDS_BLOCK;
    return op_pop_segment;
}

static insn_fn *select_far_transfer(const struct decode *d, struct insn *i)
{
    if (d->zi.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR)
        return NULL;
    i->op_size = (uint8_t)(d->zi.operand_width / 8);
    i->flags |= INSN_ENDS_BLOCK;
    bool direct = d->op[0].type == ZYDIS_OPERAND_TYPE_POINTER;
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_JMP:
        return direct ? op_far_jump_direct : op_far_jump_memory;
    case ZYDIS_MNEMONIC_CALL:
        return direct ? op_far_call_direct : op_far_call_memory;
    default:
        return op_far_return;
    }
}

static insn_fn *select_load_far_pointer(const struct decode *d, struct insn *i)
{
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_LDS:
        i->extra = SEG_DS;
        break;
    case ZYDIS_MNEMONIC_LES:
        i->extra = SEG_ES;
        break;
    case ZYDIS_MNEMONIC_LFS:
        i->extra = SEG_FS;
        break;
    case ZYDIS_MNEMONIC_LGS:
        i->extra = SEG_GS;
        break;
    default:
        i->extra = SEG_SS;
    }
    i->op_size = (uint8_t)(d->zi.operand_width / 8);
    i->flags |= INSN_ENDS_BLOCK;
    return op_load_far_pointer;
}

static insn_fn *select_operands(const struct decode *d, struct insn *i)
{
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_MOV:
        return select_move(d, i);
    case ZYDIS_MNEMONIC_PUSH:
    case ZYDIS_MNEMONIC_POP:
        return select_stack(d, i);
    case ZYDIS_MNEMONIC_JMP:
    case ZYDIS_MNEMONIC_CALL:
    case ZYDIS_MNEMONIC_RET:
        return select_far_transfer(d, i);
    case ZYDIS_MNEMONIC_LDS:
    case ZYDIS_MNEMONIC_LES:
    case ZYDIS_MNEMONIC_LFS:
    case ZYDIS_MNEMONIC_LGS:
    case ZYDIS_MNEMONIC_LSS:
        return select_load_far_pointer(d, i);
    default:
        return NULL;
    }
}

/* What handlers need beyond the generic fields. */
static void adjust_fields(const struct decode *d, struct insn *i)
{
    const ZydisDecodedOperand *data;
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_IN:
    case ZYDIS_MNEMONIC_OUT:
        data = &d->op[d->zi.mnemonic == ZYDIS_MNEMONIC_IN ? 0 : 1];
        i->extra = (uint8_t)(data->size / 8);
        if (d->op[d->zi.mnemonic == ZYDIS_MNEMONIC_IN ? 1 : 0].type == ZYDIS_OPERAND_TYPE_REGISTER)
            i->extra |= IO_DX;
        break;
    case ZYDIS_MNEMONIC_IRET:
        i->op_size = 2;
        break;
    case ZYDIS_MNEMONIC_IRETD:
        i->op_size = 4;
        break;
    case ZYDIS_MNEMONIC_IRETQ:
        i->op_size = 8;
        break;
    case ZYDIS_MNEMONIC_SYSRET:
    case ZYDIS_MNEMONIC_SYSEXIT:
        i->op_size = d->zi.attributes & ZYDIS_ATTRIB_HAS_REX && d->zi.raw.rex.W ? 8 : 4;
        break;
    case ZYDIS_MNEMONIC_LGDT:
    case ZYDIS_MNEMONIC_LIDT:
        i->extra = d->code_bits != 64 && d->zi.operand_width == 16 ? 3 : 0;
        break;
    default:
        break;
    }
}

static insn_fn *find_row(const struct row *table, size_t count, uint16_t mnemonic)
{
    for (size_t n = 0; n < count; n++)
        if (table[n].mnemonic == mnemonic)
            return table[n].fn;
    return NULL;
}

#define COUNT_OF(a) (sizeof(a) / sizeof((a)[0]))

bool op_system_select(struct icpu *c, const struct decode *d, struct insn *i)
{
    for (size_t n = 0; n < COUNT_OF(hidden); n++)
        if (hidden[n] == d->zi.mnemonic) {
            i->fn = op_hidden;
            i->flags |= INSN_ENDS_BLOCK;
            return true;
        }
    insn_fn *fn = select_operands(d, i);
    if (!fn)
        fn = find_row(rows, COUNT_OF(rows), (uint16_t)d->zi.mnemonic);
    if (!fn) {
        fn = find_row(rows_ending, COUNT_OF(rows_ending), (uint16_t)d->zi.mnemonic);
        if (fn)
            i->flags |= INSN_ENDS_BLOCK;
    }
    if (!fn)
        return false;
    adjust_fields(d, i);
    i->fn = fn;
    return true;
}
