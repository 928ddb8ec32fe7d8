/*
 * What the two halves of the translator share: analyze.c decodes guest instructions into `struct tinsn`, translate.c emits them.
 *
 * Threading: pure functions of their arguments.
 */
#ifndef DOPPEL_ENGINE_BT_TRANSLATE_PRIV_H
#define DOPPEL_ENGINE_BT_TRANSLATE_PRIV_H

#include "engine/bt/bt_priv.h"

#define TI_NONE BT_NO_REGISTER

enum tinsn_kind {
    TI_COPY,   /* runs as it is: no memory operand */
    TI_MEMORY, /* its memory operand is rewritten */
    TI_SKIP,   /* no effect: NOP, PREFETCH */
    TI_LEA_RIP,
    TI_PUSH_REG,
    TI_PUSH_IMM,
    TI_PUSH_MEM,
    TI_POP_REG,
    TI_LEAVE,
    TI_PUSHF,
    TI_CLI,
    TI_STI,
    TI_JCC,     /* `target`, `condition` */
    TI_LOOP,    /* LOOPcc, JRCXZ: `target` */
    TI_JMP,     /* `target` */
    TI_JMP_REG, /* `reg` */
    TI_JMP_MEM,
    TI_CALL,
    TI_CALL_REG,
    TI_CALL_MEM,
    TI_RET, /* `imm`: bytes released */
    TI_EXIT, /* left to somebody else: `exit` says why */
};

#define TI_ENDS(kind) ((kind) >= TI_JMP)

enum tinsn_segment { TI_FLAT, TI_FS, TI_GS };

struct tinsn {
    uint16_t offset; /* in the page */
    uint8_t length;
    uint8_t kind;
    uint16_t reads, writes; /* general registers, bit per number, partly written ones in both; address registers are read */
    /* The memory operand. */
    bool memory, rip_relative, address32, mem_read, mem_write;
    bool high_byte; /* AH CH DH BH is an operand: no REX may be added */
    uint8_t base, index, scale, segment;
    int32_t disp;
    uint16_t mem_size;
    bool aligned; /* raises #GP itself unless naturally aligned, so never crosses a page */
    /* Encoding, to rewrite. */
    uint8_t encoding; /* ZydisInstructionEncoding */
    uint8_t opcode_at; /* of VEX, EVEX: the escape byte; legacy: the first opcode byte */
    uint8_t modrm_at, tail_at; /* tail: what follows ModRM, SIB and displacement */
    uint8_t rex;
    uint8_t reg;
    uint8_t condition;
    uint8_t exit; /* enum bt_exit */
    int32_t imm;
    uint8_t adjusts; /* register to which it just adds the constant `adjust`: TI_NONE, none */
    int8_t adjust_sign; /* 1, -1: `adjust` is so many times the immediate; 0: the displacement, or fixed */
    int32_t adjust;
    uint8_t disp_at, disp_bytes, imm_at, imm_bytes; /* where the displacement and the first immediate are; bytes 0: none */
    int32_t target; /* offset from the start of the page; outside 0..4095: another page */
    uint32_t flags_read, flags_written; /* arithmetic, as in RFLAGS; written: surely and completely defined or left undefined by it */
};

struct analyze_context {
    struct icpu *c; /* any vCPU of the machine: for what CPUID offers */
    struct bt_mode mode;
    ZydisDecoder decoder;   /* decoder_init */
    struct bt_forms *forms; /* may be NULL */
};

/* Decodes the instruction at `bytes`; `offset` is its place in the page. Never fails: what is not known, and what needs more bytes than available, is TI_EXIT (length 0 then). */
void analyze_insn(const struct analyze_context *a, const uint8_t *bytes, unsigned available, unsigned offset, struct tinsn *out);

#endif
