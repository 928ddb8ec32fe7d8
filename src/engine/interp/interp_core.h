/*
 * What the core's own files (interp.c, block.c, tlb.c) share beyond interp_priv.h.
 *
 * Threading: `lock` guards the list of vCPUs; `split_lock` serialises locked accesses that cross into a page elsewhere in host memory.
 */
#ifndef DOPPEL_ENGINE_INTERP_CORE_H
#define DOPPEL_ENGINE_INTERP_CORE_H

#include <pthread.h>

#include "engine/interp/interp_priv.h"

#define INTERP_VCPUS_MAX 256

struct engine {
    struct physmap *memory;
    pthread_mutex_t lock;
    pthread_mutex_t split_lock;
    struct icpu *vcpus[INTERP_VCPUS_MAX];
};

/* ---- what an engine built around the interpreter takes of it (interp.c) ---- */

struct icpu_sizes {
    size_t blocks_bytes; /* arena of decoded blocks */
    size_t stubs_bytes;  /* arena of native stubs, and that of their records */
};

void interp_engine_init(struct engine *e, struct physmap *memory); /* *e is zero */
void interp_engine_fini(struct engine *e);

/* Makes a vCPU in *c, which is zero but for tlb_listener and memory_shift. */
int icpu_create(struct icpu *c, struct engine *e, const struct engine_ops *ops, const struct vcpu_config *config,
                const struct icpu_sizes *sizes) __attribute__((warn_unused_result));
void icpu_destroy(struct icpu *c); /* *c itself stays; also after a failed icpu_create */

enum attend_result { ATTEND_NOTHING, ATTEND_DELIVERED, ATTEND_EXIT };

/*
 * A run loop has setjmp(c->escape) and around it: first interp_enter; after a longjmp interp_recover; in between, while the activity is CPU_RUNNING, interp_attend when attention is
 * raised and then interp_run_next, or interp_run_one when c->slow; interp_stopped (true: leave with *exit) when the activity is another; interp_leave at the end. Each of these may longjmp, except
 * interp_enter and interp_leave.
 */
void interp_enter(struct icpu *c);
void interp_leave(struct icpu *c);
void interp_recover(struct icpu *c, int why); /* what the interrupted instruction had begun is undone or finished, and its fault delivered */
enum attend_result interp_attend(struct icpu *c);
bool interp_stopped(struct icpu *c, enum engine_exit *exit);
void interp_run_one(struct icpu *c);  /* one instruction and the traps that follow it */
void interp_run_next(struct icpu *c); /* one block */
void interp_run_insn(struct icpu *c, const struct insn *i); /* one instruction that the caller knows, without traps: not when c->slow */

/* CS and SS as SYSCALL, or SYSRET to 64-bit code, loads them. (op_syscall.c) */
void syscall_segments_load(struct icpu *c, bool to_user);

enum engine_exit interp_step(struct vcpu *v);
void interp_state_changed(struct vcpu *v);
void interp_invalidate(struct engine *e, gpa_t gpa, uint64_t length_bytes);

/* ---- between the core's files ---- */

/* A store of `length` bytes went to host memory: the running block may have been hit. */
void block_note_store(struct icpu *c, uintptr_t host, unsigned length);

/* The block's bytes have changed: it is not found again. Its memory stays until the next flush. */
void block_drop(struct icpu *c, struct block *b);

/* Code bytes within one page for which mem_fetch_host gave NULL. */
void mem_fetch_mmio(struct icpu *c, gva_t gva, uint8_t *to, unsigned length);

/* decode.c: a decoder of what guests are offered. amd: with 66 near branches in 64-bit code have 16-bit displacements and cut RIP to 16 bits, where Intel's ignore the prefix. */
void decoder_init(ZydisDecoder *decoder, unsigned code_bits, bool amd);
struct decode;
/* What Zydis leaves to do of that, after decoding; and REPE or REPNE before LOOPE or LOOPNE say which of the two it is. True: it is not what it is by Intel. */
bool decode_amd_branch(struct decode *d);
/* What is a hint by Intel and not by AMD: PREFETCH with a register is invalid, PAUSE with REX.B exchanges. */
bool decode_is_hint_of_intel(const struct decode *d);

/* Code lies anywhere; the processor loads it in one piece all the same. */
__attribute__((no_sanitize("alignment"))) static inline uint64_t block_load64(const uint8_t *p)
{
    return *(const volatile uint64_t *)p;
}

/* True while the block's bytes in memory are those that were decoded (of a crossing instruction: those in the first page). */
static inline bool block_is_intact(const struct block *b)
{
    const uint8_t *p = (const uint8_t *)b->host;
    for (int n = 0; n < b->tail_offset; n += 8)
        if (block_load64(p + n) != block_load64(b->bytes + n))
            return false;
    return (block_load64(p + b->tail_offset) & b->tail_mask) == b->tail_value;
}

#endif
