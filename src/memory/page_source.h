/*
 * Where the bytes of remote pages are (memory.h): a snapshot's file that is compressed or encrypted, another host that the guest comes from.
 *
 * A source is asked once for each page, by whatever thread touches it first, for up to group_bytes around it: a vCPU in the middle of an instruction, the loop's thread with the
 * device lock held, a thread of physmap_fetch_next. So it answers by itself: it needs no lock of the machine, no loop, and no page of the guest. Several calls may be under way, for
 * different pages; whoever wants a page that is being fetched waits for it.
 * Sandbox: these threads make only the calls that are allowed them (util/sandbox_rules.h).
 */
#ifndef DOPPEL_MEMORY_PAGE_SOURCE_H
#define DOPPEL_MEMORY_PAGE_SOURCE_H

#include <stdint.h>

#include "util/error.h"

#define PAGE_SOURCE_BYTES (256u << 10)

struct page_source {
    /*
     * Puts the bytes of whole pages from `offset` on (as physmap_offset counts) at `data`, the guest's memory itself, which nobody reads before this returns 0. A failure (-errno, err says
     * what and where) is final: the map asks no more, and the guest stops (physmap_on_failure).
     */
    int (*fetch)(void *ctx, uint64_t offset, void *data, uint64_t bytes, struct error *err);
    /* Once, when nothing is remote any more or the map goes; no fetch is under way, and none comes. On the thread that got the last page. NULL: nothing to do. */
    void (*close)(void *ctx);
    void *ctx;
    uint64_t group_bytes; /* at most, a power of two from a page to PAGE_SOURCE_BYTES; 0: that */
};

#endif
