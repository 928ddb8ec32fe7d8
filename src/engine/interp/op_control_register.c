/*
 * Control and debug registers, XCR0, and the instructions that drop TLB entries.
 *
 * A value is checked completely, page-directory-pointer entries read included, before a register changes. interp_mode_changed notices paging bits that
 * changed and drops the TLB for them. insn.extra holds the number of the control or debug register.
 * Sources: SDM vol. 3, 2.5, 4.1, 4.10.4, 9.8.5, 17.2; vol. 2 under each name. Threading: as interp_priv.h.
 */
#include "engine/interp/native_priv.h"
#include "engine/interp/system_priv.h"

#define CR0_WRITABLE                                                                               \
    (CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG)
#define CR3_KEEP (1ull << 63)
#define PDPTE_P 1ull
#define PDPTE_RESERVED 0x1E6ull
#define DR6_BD (1ull << 13)
#define DR6_FIXED 0xFFFF0FF0ull
#define DR6_WRITABLE 0xE00Full
#define DR7_FIXED 0x400ull
#define DR7_WRITABLE 0xFFFF23FFull
#define DR7_GD (1ull << 13)

/* CR0 bits that reload PAE's pointers, and the CR4 bits that do. */
#define CR0_RELOADS_PDPTE (CR0_PG | CR0_CD | CR0_NW)
#define CR4_RELOADS_PDPTE (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP)

bool guest_has_feature(struct icpu *c, uint32_t leaf, enum cpuid_register which, unsigned bit)
{
    simd_save(c);
    struct cpuid_regs r = cpuid_query(c->v.cpuid, &c->v.cpu, c->v.index, leaf, 0);
    const uint32_t values[] = {r.eax, r.ebx, r.ecx, r.edx};
    return values[which] >> bit & 1;
}

/* ---- CR3 and the PDPTEs ---- */

static bool uses_pdpte(uint64_t cr0, uint64_t cr4, uint64_t efer)
{
    return (cr0 & CR0_PG) && (cr4 & CR4_PAE) && !(efer & EFER_LME);
}

void pdpte_read(struct icpu *c, uint64_t cr3, uint64_t pdpte[4])
{
    uint64_t reserved = PDPTE_RESERVED | ~((1ull << c->max_phys_bits) - 1);
    for (unsigned n = 0; n < 4; n++)
        pdpte[n] = 0; /* what a table outside memory counts as */
    (void)!physmap_read(c->v.memory, cr3 & 0xFFFFFFE0, pdpte, 4 * sizeof(pdpte[0]));
    for (unsigned n = 0; n < 4; n++)
        if ((pdpte[n] & PDPTE_P) && (pdpte[n] & reserved))
            raise_gp0(c);
}

static void pdpte_commit(struct icpu *c, const uint64_t pdpte[4])
{
    for (unsigned n = 0; n < 4; n++)
        c->v.cpu.pdpte[n] = pdpte[n];
    tlb_flush_all(c);
}

void control_write_cr3(struct icpu *c, uint64_t value)
{
    struct cpu_state *s = &c->v.cpu;
    bool keep = false;
    if (is_long(c)) {
        if (s->cr4 & CR4_PCIDE) {
            keep = value & CR3_KEEP;
            value &= ~CR3_KEEP;
        }
        if (value >> c->max_phys_bits)
            raise_gp0(c);
    } else {
        value = (uint32_t)value;
    }
    if (uses_pdpte(s->cr0, s->cr4, s->efer)) {
        uint64_t pdpte[4];
        pdpte_read(c, value, pdpte);
        pdpte_commit(c, pdpte);
    }
    s->cr3 = value;
    tlb_load_cr3(c, value, keep);
    TRACE(c, "cr3 %#llx\n", (unsigned long long)value);
}

/* ---- CR0 and CR4 ---- */

/* What switching paging on or off demands (SDM vol. 3, 4.1.1 and 9.8.5). */
static bool paging_switch_allowed(const struct icpu *c, uint64_t value)
{
    const struct cpu_state *s = &c->v.cpu;
    bool was = s->cr0 & CR0_PG, will = value & CR0_PG;
    if (will && !was && (s->efer & EFER_LME))
        return (s->cr4 & CR4_PAE) && !(s->seg[SEG_CS].attributes & SEG_ATTR_L) &&
               SEG_ATTR_TYPE(s->tr.attributes) != SYSTEM_TSS16_BUSY;
    if (was && !will)
        return c->code_bits != 64 && !(s->cr4 & CR4_PCIDE);
    return true;
}

static void write_cr0(struct icpu *c, uint64_t value)
{
    struct cpu_state *s = &c->v.cpu;
    if (value >> 32)
        raise_gp0(c);
    value = (value & CR0_WRITABLE) | CR0_ET;
    if ((value & (CR0_PG | CR0_PE)) == CR0_PG || (value & (CR0_NW | CR0_CD)) == CR0_NW ||
        !paging_switch_allowed(c, value))
        raise_gp0(c);

    uint64_t changed = s->cr0 ^ value;
    if ((changed & CR0_RELOADS_PDPTE) && uses_pdpte(value, s->cr4, s->efer)) {
        uint64_t pdpte[4];
        pdpte_read(c, s->cr3, pdpte);
        pdpte_commit(c, pdpte);
    }
    s->cr0 = value;
    if ((value & CR0_PG) && (s->efer & EFER_LME))
        s->efer |= EFER_LMA;
    else
        s->efer &= ~EFER_LMA;
    interp_mode_changed(c);
    TRACE(c, "cr0 %#llx efer %#llx\n", (unsigned long long)value, (unsigned long long)s->efer);
}

static void write_cr4(struct icpu *c, uint64_t value)
{
    struct cpu_state *s = &c->v.cpu;
    uint64_t changed = s->cr4 ^ value;
    simd_save(c);
    if (value & ~cpuid_cr4_allowed(c->v.cpuid))
        raise_gp0(c);
    if (is_long(c) && !(value & CR4_PAE))
        raise_gp0(c);
    if ((changed & value & CR4_PCIDE) && (!is_long(c) || (s->cr3 & 0xFFF)))
        raise_gp0(c);
    if ((changed & CR4_RELOADS_PDPTE) && uses_pdpte(s->cr0, value, s->efer)) {
        uint64_t pdpte[4];
        pdpte_read(c, s->cr3, pdpte);
        pdpte_commit(c, pdpte);
    }
    s->cr4 = value;
    interp_mode_changed(c);
    TRACE(c, "cr4 %#llx\n", (unsigned long long)value);
}

static void write_cr8(struct icpu *c, uint64_t value)
{
    if (value & ~0xFull)
        raise_gp0(c);
    simd_save(c);
    c->v.host_ops->cr8_write(c->v.host, (uint8_t)value);
    vcpu_raise_attention(&c->v); /* something may be deliverable now */
}

void op_mov_from_cr(struct icpu *c, const struct insn *i)
{
    const struct cpu_state *s = &c->v.cpu;
    uint64_t value;
    require_cpl0(c);
    switch (i->extra) {
    case 0:
        value = s->cr0;
        break;
    case 2:
        value = s->cr2;
        break;
    case 3:
        value = s->cr3;
        break;
    case 4:
        value = s->cr4;
        break;
    default:
        simd_save(c);
        value = c->v.host_ops->cr8_read(c->v.host) & 0xF;
    }
    reg_write(c, i->dst, c->code_bits == 64 ? 8 : 4, value);
}

void op_mov_to_cr(struct icpu *c, const struct insn *i)
{
    require_cpl0(c);
    uint64_t value = reg_read(c, i->src, c->code_bits == 64 ? 8 : 4);
    switch (i->extra) {
    case 0:
        write_cr0(c, value);
        break;
    case 2:
        c->v.cpu.cr2 = value;
        break;
    case 3:
        control_write_cr3(c, value);
        break;
    case 4:
        write_cr4(c, value);
        break;
    default:
        write_cr8(c, value);
    }
}

/* ---- CR0 by its old names ---- */

void op_smsw(struct icpu *c, const struct insn *i)
{
    if ((c->v.cpu.cr4 & CR4_UMIP) && c->cpl > 0)
        raise_gp0(c);
    if (i->flags & INSN_MEM_DST)
        mem_write16(c, ea_linear(c, i, 2, true), (uint16_t)c->v.cpu.cr0);
    else
        reg_write(c, i->dst, i->op_size, c->v.cpu.cr0);
}

void op_lmsw(struct icpu *c, const struct insn *i)
{
    require_cpl0(c);
    uint64_t value = i->flags & INSN_MEM_DST ? mem_read(c, ea_linear(c, i, 2, false), 2) : reg_read(c, i->dst, 2);
    uint64_t cr0 = c->v.cpu.cr0;
    /* PE can be set but not cleared. */
    write_cr0(c, (cr0 & ~(CR0_MP | CR0_EM | CR0_TS)) | (value & (CR0_PE | CR0_MP | CR0_EM | CR0_TS)));
}

void op_clts(struct icpu *c, const struct insn *i)
{
    require_cpl0(c);
    c->v.cpu.cr0 &= ~CR0_TS;
    interp_mode_changed(c);
}

/* ---- debug registers ---- */

/* Which register the operand means, after the checks common to reads and writes. */
static unsigned debug_register(struct icpu *c, const struct insn *i)
{
    struct cpu_state *s = &c->v.cpu;
    unsigned n = i->extra;
    if (n == 4 || n == 5) {
        if (s->cr4 & CR4_DE)
            raise_fault(c, VECTOR_UD);
        n += 2;
    }
    require_cpl0(c);
    if (s->dr[7] & DR7_GD)
        raise_debug_fault(c, DR6_BD);
    return n;
}

void op_mov_from_dr(struct icpu *c, const struct insn *i)
{
    unsigned n = debug_register(c, i);
    reg_write(c, i->dst, c->code_bits == 64 ? 8 : 4, c->v.cpu.dr[n]);
}

void op_mov_to_dr(struct icpu *c, const struct insn *i)
{
    unsigned n = debug_register(c, i);
    uint64_t value = reg_read(c, i->src, c->code_bits == 64 ? 8 : 4);
    if (n >= 6) {
        if (value >> 32)
            raise_gp0(c);
        value = n == 6 ? (value & DR6_WRITABLE) | DR6_FIXED : (value & DR7_WRITABLE) | DR7_FIXED;
    }
    c->v.cpu.dr[n] = value;
    interp_mode_changed(c);
}

/* ---- XCR0 ---- */

void op_xgetbv(struct icpu *c, const struct insn *i)
{
    struct cpu_state *s = &c->v.cpu;
    uint64_t value;
    if (!(s->cr4 & CR4_OSXSAVE))
        raise_fault(c, VECTOR_UD);
    switch ((uint32_t)s->gpr[GPR_RCX]) {
    case 0:
        value = s->xcr0;
        break;
    case 1: /* which components are not in their initial state */
        simd_save(c);
        value = s->xcr0 & native_state_in_use(c);
        break;
    default:
        raise_gp0(c);
    }
    s->gpr[GPR_RAX] = (uint32_t)value;
    s->gpr[GPR_RDX] = value >> 32;
}

void op_xsetbv(struct icpu *c, const struct insn *i)
{
    struct cpu_state *s = &c->v.cpu;
    if (!(s->cr4 & CR4_OSXSAVE))
        raise_fault(c, VECTOR_UD);
    require_cpl0(c);
    uint64_t value = (uint32_t)s->gpr[GPR_RAX] | s->gpr[GPR_RDX] << 32;
    simd_save(c);
    bool valid = (uint32_t)s->gpr[GPR_RCX] == 0 && (value & XCR0_X87) && !(value & ~cpuid_xcr0_allowed(c->v.cpuid));
    if ((value & XCR0_AVX) && !(value & XCR0_SSE))
        valid = false;
    if ((value & XCR0_AVX512) && ((value & XCR0_AVX512) != XCR0_AVX512 || !(value & XCR0_AVX)))
        valid = false;
    if (!valid)
        raise_gp0(c);
    s->xcr0 = value;
    interp_mode_changed(c);
}

/* ---- TLB ---- */

void op_invlpg(struct icpu *c, const struct insn *i)
{
    require_cpl0(c);
    gva_t address = c->segment_base[i->segment] + ea_offset(c, i);
    if (c->code_bits != 64)
        address = (uint32_t)address;
    if (gva_is_canonical(address))
        tlb_flush_page(c, address);
}

void op_invpcid(struct icpu *c, const struct insn *i)
{
    if (!is_protected(c) && (c->v.cpu.rflags & RFLAGS_VM))
        raise_gp0(c);
    require_cpl0(c);
    uint64_t type = reg_read(c, i->dst, c->code_bits == 64 ? 8 : 4);
    gva_t address = ea_linear(c, i, 16, false);
    uint64_t pcid = mem_read(c, address, 8), target = mem_read(c, address + 8, 8);
    bool valid = type <= 3 && !(pcid >> 12);
    if (type <= 1 && pcid && !(c->v.cpu.cr4 & CR4_PCIDE))
        valid = false;
    if (type == 0 && !gva_is_canonical(target))
        valid = false;
    if (!valid)
        raise_gp0(c);
    tlb_invpcid(c, (unsigned)type, (uint16_t)pcid, target);
}
