/*
 * Direct execution of user code: see direct.c.
 *
 * All functions accept a vCPU without it (b->direct NULL) unless they say otherwise. Where vector registers may be used, they save the guest's (simd_save).
 * Threading: the vCPU's thread, but for direct_kick and direct_release.
 */
#ifndef DOPPEL_ENGINE_BT_DIRECT_H
#define DOPPEL_ENGINE_BT_DIRECT_H

#include <stdio.h>

#include "engine/bt/bt_priv.h"

#define DIRECT_ALL_ASIDS ~0u

enum direct_result {
    DIRECT_DONE, /* the run loop goes on */
    DIRECT_LOST, /* the guest cannot go on */
};

enum direct_counter { DIRECT_STARTED, DIRECT_STOPS, DIRECT_FILLS, DIRECT_COUNTERS };

int direct_create(struct bt_vcpu *b, enum engine_direct use) __attribute__((warn_unused_result)); /* 0 or -ENOMEM */
void direct_destroy(struct bt_vcpu *b);
/* Around each run of the vCPU. */
void direct_thread_enter(struct bt_vcpu *b);
void direct_thread_leave(struct bt_vcpu *b);
/* The processes are not to be used again: what their shadows let them do may be wrong. While the vCPU does not run. */
void direct_forget(struct bt_vcpu *b);

/* Is user mode of the current address space executed directly? Then the ways into it lead to the run loop. */
bool direct_active(const struct bt_vcpu *b);
/* A block of its code is missing: is it better to go there than to translate it? Then direct_active is true until a stop comes too soon. */
bool direct_preferred(struct bt_vcpu *b);
void direct_translated(struct bt_vcpu *b, uint64_t ns);
/* direct_active: may it be now, at this instruction? */
bool direct_wanted(const struct bt_vcpu *b);
/* direct_wanted: until something else has to be done, and does that. May raise (longjmp). */
enum direct_result direct_run(struct bt_vcpu *b);

/* What the run loop sees: user code was interrupted; is being returned to; CR3 was loaded. */
void direct_tick(struct bt_vcpu *b);
void direct_user_entered(struct bt_vcpu *b);
void direct_switch(struct bt_vcpu *b, bool keep); /* keep: what is known of that address space stays true */
/* What the guest invalidates: all of an address space (PCID), or DIRECT_ALL_ASIDS; a page in all of them. */
void direct_flush(struct bt_vcpu *b, unsigned asid);
void direct_flush_page(struct bt_vcpu *b, gva_t gva);

/* e->lock held: may the page be translated? False: not now, a process that is being stopped can write to it. */
bool direct_release(struct bt_engine *e, uint64_t ram_offset);
void direct_kick(struct bt_vcpu *b);
/* Adds shadows made, stops, stops to map pages. */
void direct_count(const struct bt_vcpu *b, uint64_t sums[3]);
void direct_report(const struct bt_vcpu *b, FILE *out);

#endif
