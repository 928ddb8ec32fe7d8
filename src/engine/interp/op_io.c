/*
 * IN and OUT, and the permission check that string I/O shares.
 *
 * insn.extra: operand size, with IO_DX set when the port is in DX rather than in insn.imm.
 * Sources: SDM vol. 1, 19.5 (I/O permission bitmap); vol. 2, IN, OUT. Threading: as interp_priv.h.
 */
#include "engine/interp/system_priv.h"

#define TSS_IO_MAP_BASE 102u

void io_check(struct icpu *c, uint16_t port, unsigned size)
{
    const struct cpu_state *s = &c->v.cpu;
    if (!(s->cr0 & CR0_PE) || (c->cpl <= flags_iopl(c) && !(s->rflags & RFLAGS_VM)))
        return;
    const struct segment *tr = &s->tr;
    if (tr->unusable || !(tr->attributes & 8) || tr->limit < TSS_IO_MAP_BASE + 1)
        raise_gp0(c);
    uint32_t map = (uint32_t)table_read(c, table_address(c, tr->base, TSS_IO_MAP_BASE), 2);
    uint32_t offset = map + port / 8u;
    if (offset + 1 > tr->limit) /* two bytes are always read */
        raise_gp0(c);
    uint64_t bits = table_read(c, table_address(c, tr->base, offset), 2);
    if (bits >> (port & 7) & ((1u << size) - 1))
        raise_gp0(c);
}

static uint16_t port_of(const struct icpu *c, const struct insn *i)
{
    return i->extra & IO_DX ? (uint16_t)c->v.cpu.gpr[GPR_RDX] : (uint8_t)i->imm;
}

void op_in(struct icpu *c, const struct insn *i)
{
    unsigned size = i->extra & ~IO_DX;
    uint16_t port = port_of(c, i);
    io_check(c, port, size);
    simd_save(c);
    vcpu_count(&c->v, COUNTER_port_reads);
    uint32_t value = c->v.host_ops->port_read(c->v.host, port, size);
    TRACE(c, "in %#x size %u = %#x\n", port, size, value);
    reg_write(c, REG_OFFSET(GPR_RAX), size, value);
}

void op_out(struct icpu *c, const struct insn *i)
{
    unsigned size = i->extra & ~IO_DX;
    uint16_t port = port_of(c, i);
    uint32_t value = (uint32_t)reg_read(c, REG_OFFSET(GPR_RAX), size);
    io_check(c, port, size);
    simd_save(c);
    vcpu_count(&c->v, COUNTER_port_writes);
    TRACE(c, "out %#x size %u = %#x\n", port, size, value);
    c->v.host_ops->port_write(c->v.host, port, size, value);
}
