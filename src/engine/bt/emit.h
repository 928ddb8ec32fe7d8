/*
 * Emission of the host instructions that translations are made of.
 *
 * Each function appends one instruction at e->at. Registers are encoding numbers 0..15. "gs" operands are displacements from GS base (BT_CTX). None of these
 * instructions touches flags. SDM vol. 2A, chapter 2 for the encodings.
 */
#ifndef DOPPEL_ENGINE_BT_EMIT_H
#define DOPPEL_ENGINE_BT_EMIT_H

#include <string.h>

#include "engine/bt/bt_priv.h"

struct emitter {
    uint8_t *at;
};

#define EMIT_NONE 0xffu /* no register */

static inline void emit8(struct emitter *e, unsigned byte)
{
    *e->at++ = (uint8_t)byte;
}
static inline void emit32(struct emitter *e, uint32_t value)
{
    memcpy(e->at, &value, 4);
    e->at += 4;
}
/* Sets a displacement that was left open: the distance from its own end. */
static inline void emit_distance(uint8_t *displacement, const uint8_t *target)
{
    int32_t distance = (int32_t)(target - (displacement + 4));
    memcpy(displacement, &distance, 4);
}
static inline void emit64(struct emitter *e, uint64_t value)
{
    memcpy(e->at, &value, 8);
    e->at += 8;
}

/* ModRM, SIB and displacement of [base + index * 2^scale + disp]; base and index may be EMIT_NONE. short_disp: an 8-bit displacement may be used. */
static inline void emit_address(struct emitter *e, unsigned reg, unsigned base, unsigned index, unsigned scale, int32_t disp, bool short_disp)
{
    unsigned field = (reg & 7) << 3;
    if (base == EMIT_NONE) {
        emit8(e, field | 4);
        emit8(e, scale << 6 | (index == EMIT_NONE ? 4u : index & 7) << 3 | 5);
        emit32(e, (uint32_t)disp);
        return;
    }
    unsigned mod = !disp && (base & 7) != 5 ? 0x00 : short_disp && disp >= -128 && disp <= 127 ? 0x40 : 0x80;
    if (index == EMIT_NONE && (base & 7) != 4) {
        emit8(e, mod | field | (base & 7));
    } else {
        emit8(e, mod | field | 4);
        emit8(e, scale << 6 | (index == EMIT_NONE ? 4u : index & 7) << 3 | (base & 7));
    }
    if (mod == 0x40)
        emit8(e, (uint8_t)disp);
    else if (mod == 0x80)
        emit32(e, (uint32_t)disp);
}

static inline unsigned emit_rex_of(bool wide, unsigned reg, unsigned base, unsigned index)
{
    return (wide ? 8u : 0u) | (reg != EMIT_NONE && reg > 7 ? 4u : 0u) | (index != EMIT_NONE && index > 7 ? 2u : 0u) | (base != EMIT_NONE && base > 7 ? 1u : 0u);
}

static inline void emit_rex(struct emitter *e, unsigned bits)
{
    if (bits)
        emit8(e, 0x40 | bits);
}

/* opcode reg, [base + index * 2^scale + disp] */
static inline void emit_op_mem(struct emitter *e, bool wide, unsigned opcode, unsigned reg, unsigned base, unsigned index, unsigned scale, int32_t disp)
{
    emit_rex(e, emit_rex_of(wide, reg, base, index));
    emit8(e, opcode);
    emit_address(e, reg, base, index, scale, disp, true);
}

static inline void emit_op_reg(struct emitter *e, bool wide, unsigned opcode, unsigned reg, unsigned rm)
{
    emit_rex(e, emit_rex_of(wide, reg, rm, EMIT_NONE));
    emit8(e, opcode);
    emit8(e, 0xc0 | (reg & 7) << 3 | (rm & 7));
}

static inline void emit_lea(struct emitter *e, unsigned to, unsigned base, unsigned index, unsigned scale, int32_t disp)
{
    emit_op_mem(e, true, 0x8d, to, base, index, scale, disp);
}

static inline void emit_mov(struct emitter *e, unsigned to, unsigned from)
{
    emit_op_reg(e, true, 0x89, from, to);
}

static inline void emit_op_gs(struct emitter *e, bool wide, unsigned opcode, unsigned reg, int32_t gs)
{
    emit8(e, 0x65);
    emit_op_mem(e, wide, opcode, reg, EMIT_NONE, EMIT_NONE, 0, gs);
}

static inline void emit_load_gs(struct emitter *e, unsigned to, int32_t gs)
{
    emit_op_gs(e, true, 0x8b, to, gs);
}

static inline void emit_store_gs(struct emitter *e, unsigned from, int32_t gs)
{
    emit_op_gs(e, true, 0x89, from, gs);
}

static inline void emit_mov_imm32(struct emitter *e, unsigned to, uint32_t value) /* zero-extended */
{
    emit_rex(e, to > 7 ? 1 : 0);
    emit8(e, 0xb8 | (to & 7));
    emit32(e, value);
}

static inline void emit_mov_imm64(struct emitter *e, unsigned to, uint64_t value)
{
    emit8(e, 0x48 | to >> 3);
    emit8(e, 0xb8 | (to & 7));
    emit32(e, (uint32_t)value);
    emit32(e, (uint32_t)(value >> 32));
}

static inline void emit_mov_simm32(struct emitter *e, unsigned to, int32_t value) /* sign-extended */
{
    emit8(e, 0x48 | (to > 7 ? 1 : 0));
    emit8(e, 0xc7);
    emit8(e, 0xc0 | (to & 7));
    emit32(e, (uint32_t)value);
}

static inline void emit_mov_gs_imm8(struct emitter *e, int32_t gs, unsigned value)
{
    emit8(e, 0x65);
    emit8(e, 0xc6);
    emit_address(e, 0, EMIT_NONE, EMIT_NONE, 0, gs, false);
    emit8(e, value);
}

static inline void emit_rorx(struct emitter *e, unsigned to, unsigned from, unsigned count)
{
    emit8(e, 0xc4);
    emit8(e, (~to >> 3 & 1) << 7 | 0x40 | (~from >> 3 & 1) << 5 | 3);
    emit8(e, 0xfb);
    emit8(e, 0xf0);
    emit8(e, 0xc0 | (to & 7) << 3 | (from & 7));
    emit8(e, count);
}

/* MOVSX to64, from16 */
static inline void emit_movsx16(struct emitter *e, unsigned to, unsigned from)
{
    emit_rex(e, emit_rex_of(true, to, from, EMIT_NONE));
    emit8(e, 0x0f);
    emit8(e, 0xbf);
    emit8(e, 0xc0 | (to & 7) << 3 | (from & 7));
}

/* MOVZX to32, word gs:[...] */
static inline void emit_movzx16_gs(struct emitter *e, unsigned to, int32_t gs)
{
    emit8(e, 0x65);
    emit_rex(e, emit_rex_of(false, to, EMIT_NONE, EMIT_NONE));
    emit8(e, 0x0f);
    emit8(e, 0xb7);
    emit_address(e, to, EMIT_NONE, EMIT_NONE, 0, gs, false);
}

static inline void emit_store_gs_imm32(struct emitter *e, int32_t gs, uint32_t value)
{
    emit_op_gs(e, true, 0xc7, 0, gs);
    emit32(e, value);
}

static inline void emit_wrgsbase(struct emitter *e, unsigned reg)
{
    emit8(e, 0xf3);
    emit_rex(e, emit_rex_of(true, EMIT_NONE, reg, EMIT_NONE));
    emit8(e, 0x0f), emit8(e, 0xae);
    emit8(e, 0xd8 | (reg & 7));
}

/* SARX to, from, count */
static inline void emit_sarx(struct emitter *e, unsigned to, unsigned from, unsigned count)
{
    emit8(e, 0xc4);
    emit8(e, (~to >> 3 & 1) << 7 | 0x40 | (~from >> 3 & 1) << 5 | 2);
    emit8(e, 0x80 | (~count & 15) << 3 | 2);
    emit8(e, 0xf7);
    emit8(e, 0xc0 | (to & 7) << 3 | (from & 7));
}

/* PEXT to, from, gs:[mask] */
static inline void emit_pext_gs(struct emitter *e, unsigned to, unsigned from, int32_t mask)
{
    emit8(e, 0x65);
    emit8(e, 0xc4);
    emit8(e, (~to >> 3 & 1) << 7 | 0x62);
    emit8(e, 0x80 | (~from & 15) << 3 | 2);
    emit8(e, 0xf5);
    emit_address(e, to, EMIT_NONE, EMIT_NONE, 0, mask, false);
}

/* PDEP to, from, gs:[mask] */
static inline void emit_pdep_gs(struct emitter *e, unsigned to, unsigned from, int32_t mask)
{
    emit8(e, 0x65);
    emit8(e, 0xc4);
    emit8(e, (~to >> 3 & 1) << 7 | 0x62);
    emit8(e, 0x80 | (~from & 15) << 3 | 3);
    emit8(e, 0xf5);
    emit_address(e, to, EMIT_NONE, EMIT_NONE, 0, mask, false);
}

/* V of the data table: MOV to, gs:[index32 * 8], with a 32-bit address, which drops the index bits above. */
static inline void emit_load_v(struct emitter *e, unsigned to, unsigned index)
{
    emit8(e, 0x65);
    emit8(e, 0x67);
    emit_op_mem(e, true, 0x8b, to, EMIT_NONE, index, 3, 0);
}

/* MOVZX to32, byte gs:[index + disp]: the page-crossing check. */
static inline void emit_check_byte(struct emitter *e, unsigned to, unsigned index, int32_t disp)
{
    emit8(e, 0x65);
    emit_rex(e, emit_rex_of(false, to, index, EMIT_NONE));
    emit8(e, 0x0f);
    emit8(e, 0xb6);
    emit_address(e, to, index, EMIT_NONE, 0, disp, false);
}

/* E of the linear address in R11 into R10: the DT slot is at R10 + R11 * 4. */
static inline void emit_load_e(struct emitter *e)
{
    emit_pext_gs(e, 10, 11, BT_CTX(exec_mask));
    emit8(e, 0x65);
    emit_op_mem(e, true, 0x8b, 10, EMIT_NONE, 10, 3, (int32_t)BT_EXEC_TABLE_OFFSET);
}

/* Dynamic transfer to the linear address in R11, through the exec table and the page's DT. */
static inline void emit_transfer(struct emitter *e, uint32_t tc_base)
{
    emit_load_e(e);
    emit_op_mem(e, false, 0x8b, 10, 10, 11, 2, 0);
    emit_op_mem(e, true, 0x8d, 10, 10, EMIT_NONE, 0, (int32_t)tc_base);
    emit8(e, 0x41), emit8(e, 0xff), emit8(e, 0xe2); /* jmp r10 */
}

#endif
