/*
 * PhysMap: guest-physical memory, the one truth about where a gpa's bytes are.
 *
 * Guest RAM is one memfd; behind it may be files of the host that the guest has as persistent memory. Ranges of gpa space are RAM (read-write), ROM (guest writes are
 * dropped) or nothing (MMIO or a hole: accesses go to the bus). Callers ask with an intent and a length and never compute host pointers themselves. Pages that nobody has
 * touched, or that were given back (physmap_discard), take no memory and read as zero.
 * A page of RAM is private (its bytes are in the memfd), shared (in a file that many machines map: read and executed where it is, copied at the first write intent) or remote (its bytes
 * are to be fetched before anything). Only a call that takes an intent makes a page ready for it, so an address or offset is good for what it was asked for and no more.
 * Everything has an offset, too, in one linear order: RAM, then files. Whoever maps memory for an engine maps it in that order (physmap_map).
 * Threading: ranges are set up before vCPUs run, but for blocks of pluggable memory (physmap_plug). Look-ups and marks are lock-free from any thread.
 */
#ifndef DOPPEL_MEMORY_MEMORY_H
#define DOPPEL_MEMORY_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "util/error.h"

typedef uint64_t gpa_t;
typedef uint64_t gva_t;

#define PAGE_SIZE_BYTES 4096ull
#define PAGE_MASK_BITS (PAGE_SIZE_BYTES - 1)

struct physmap;
struct page_source; /* page_source.h */

enum physmap_intent { PHYSMAP_READ, PHYSMAP_WRITE, PHYSMAP_EXECUTE };

/* Low RAM ends here at most; the rest of the RAM starts at 4 GiB. Between is the PCI hole. */
#define PHYSMAP_LOW_LIMIT 0xC0000000ull
#define PHYSMAP_HIGH_BASE 0x100000000ull

/* Pluggable memory and files lie from here on, each at a multiple of 1 GiB, in this order. */
#define PHYSMAP_EXTRA_BASE 0x5000000000ull
#define PHYSMAP_FILES_MAX 8u
#define PHYSMAP_FILE_ALIGNMENT (2ull << 20)

struct physmap_file {
    int fd; /* borrowed; open for writing unless readonly */
    uint64_t bytes; /* above 0. The guest sees a multiple of PHYSMAP_FILE_ALIGNMENT: the rest is memory that belongs to no file */
    bool readonly; /* ROM to the guest, and private: no way leads to the file */
};

struct physmap_config {
    uint64_t ram_bytes;               /* multiple of 4096 */
    uint64_t plug_bytes, block_bytes; /* RAM that comes and goes by blocks, a power of two from 2 MiB; all unplugged. 0: none */
    const struct physmap_file *file;
    unsigned file_count;
};

/* Maps [0, min(ram, low limit)) and the rest from 4 GiB. */
int physmap_create_with(struct physmap **map, const struct physmap_config *config, struct error *err) __attribute__((warn_unused_result));
int physmap_create(struct physmap **map, uint64_t ram_bytes, struct error *err) __attribute__((warn_unused_result)); /* RAM only */
void physmap_destroy(struct physmap *map);

uint64_t physmap_ram_bytes(const struct physmap *map);   /* size of the RAM's file: all that can ever be plugged included */
uint64_t physmap_space_bytes(const struct physmap *map); /* all offsets are below: RAM and files */
gpa_t physmap_plug_base(const struct physmap *map);
gpa_t physmap_file_base(const struct physmap *map, unsigned index, uint64_t *length_bytes); /* as the guest sees it */
gpa_t physmap_end(const struct physmap *map); /* no memory is at this address or above */
uint64_t physmap_low_bytes(const struct physmap *map);  /* RAM below 4 GiB */
uint64_t physmap_high_bytes(const struct physmap *map); /* RAM from 4 GiB on */

/*
 * Host address of [gpa, gpa + length). The whole range must lie in one range of RAM (or ROM, for read and execute).
 * Returns NULL when it does not: the caller then goes to the bus, or treats it as a guest's bad address. NULL also when its bytes cannot be had (physmap_on_failure). May take as long
 * as a page source does; keeps vector registers, and may be called where the guest's are live.
 */
void *physmap_get(struct physmap *map, gpa_t gpa, uint64_t length_bytes, enum physmap_intent intent);

/*
 * Maps everything once more, physmap_space_bytes at the page-aligned address `at`, over whatever is mapped there. Offsets in such
 * a mapping are those of physmap_offset. The caller unmaps, and says so before. 0 or -errno. At most 7.
 */
int physmap_map(struct physmap *map, void *at, int prot) __attribute__((warn_unused_result));
void physmap_unmap(struct physmap *map, void *at);
/*
 * Takes the right to write from pages of a writable mapping, or gives it back (page aligned). Not by mprotect(): what is mapped there may change with the states of pages. For one
 * mapping of the map. 0 or -errno, -ENOMEM when the host grants no more mappings; giving back all of it needs none.
 */
int physmap_guard(struct physmap *map, void *at, uint64_t offset, uint64_t length_bytes, bool on) __attribute__((warn_unused_result));
/* The RAM's file, for mapping it in another process: its offsets are those of physmap_offset below physmap_ram_bytes. Only private pages are in it. Stays the map's. */
int physmap_fd(const struct physmap *map);
/* Offset of [gpa, +length) in a linear mapping; false when the range is not all in one range of RAM. */
bool physmap_offset(const struct physmap *map, gpa_t gpa, uint64_t length_bytes, uint64_t *offset);
/* The same for an access: the pages are ready for the intent. ROM is not looked at. */
bool physmap_take(struct physmap *map, gpa_t gpa, uint64_t length_bytes, enum physmap_intent intent, uint64_t *offset);
/* Makes the pages of [offset, +length) ready; 0 or -EIO. */
int physmap_need(struct physmap *map, uint64_t offset, uint64_t length_bytes, enum physmap_intent intent) __attribute__((warn_unused_result));
/* Whether all of them are ready for everything; then they stay so. */
bool physmap_is_private(const struct physmap *map, uint64_t offset, uint64_t length_bytes);
/* The reverse. offset < physmap_space_bytes. */
gpa_t physmap_gpa(const struct physmap *map, uint64_t offset);

/*
 * Marks [gpa, +length) dirty. After the bytes were written, by everything that is not an engine's own store (device DMA, loaders): whoever watches one of the pages is called
 * from here.
 */
void physmap_mark_dirty(struct physmap *map, gpa_t gpa, uint64_t length_bytes);
/* Dirty marks only. For engines, which notice their own stores to pages that they watch. */
void physmap_mark_written(struct physmap *map, gpa_t gpa, uint64_t length_bytes);
/*
 * Engines may let the guest write to a page without a fault, and mark it, before it does: for nothing but speed, as long as marks tell nobody anything. From physmap_need_marks on, which is called
 * while no vCPU runs, they do that only with pages that are private and marked anyway.
 */
void physmap_need_marks(struct physmap *map);
bool physmap_marks_are_needed(const struct physmap *map);
bool physmap_expects_writes(const struct physmap *map, uint64_t offset);
/* Bit n: the page at offset + n * PAGE_SIZE_BYTES is marked; 64 of them. */
uint64_t physmap_marks(const struct physmap *map, uint64_t offset);
/* True when the page at gpa was marked since the last call for it; forgets the mark. Any thread. */
bool physmap_take_dirty(struct physmap *map, gpa_t gpa);
/*
 * The same for all RAM: bit n of `pages` (by 64, physmap_ram_bytes / PAGE_SIZE_BYTES of them, rounded up) is set for the page at offset n * PAGE_SIZE_BYTES; other bits stay as
 * they are. And back again.
 */
void physmap_take_dirty_pages(struct physmap *map, uint64_t *pages);
void physmap_mark_pages(struct physmap *map, const uint64_t *pages);

/*
 * Watching, for engines that keep something made from guest memory (translations). `changed` is called on the writer's thread, for ranges with at least one watched
 * page; it must not mark memory itself. NULL removes `opaque`; when that returns, no call is under way any more. At most PHYSMAP_WATCHERS_MAX.
 * A watcher that watches a page and then reads it either reads what a writer wrote or is called afterwards.
 */
#define PHYSMAP_WATCHERS_MAX 4
void physmap_watch_set(struct physmap *map, void (*changed)(void *opaque, gpa_t gpa, uint64_t length_bytes), void *opaque);
/* Watches the page at gpa or no longer does, for all watchers together. Any thread. */
void physmap_watch_page(struct physmap *map, gpa_t gpa, bool on);

/* Copies, for boot loaders, descriptors and tables. -EFAULT when any byte is outside RAM (nothing is copied then). */
int physmap_read(struct physmap *map, gpa_t gpa, void *data, uint64_t length_bytes) __attribute__((warn_unused_result));
int physmap_write(struct physmap *map, gpa_t gpa, const void *data, uint64_t length_bytes) __attribute__((warn_unused_result));

/* Makes [gpa, +length) inside RAM behave as ROM towards the guest (page aligned). */
int physmap_set_rom(struct physmap *map, gpa_t gpa, uint64_t length_bytes) __attribute__((warn_unused_result));
/*
 * What is where, for engines that hand the map to somebody else: fills up to `capacity` ranges, ascending and disjoint, and returns how many there are. Each
 * plugged block is one of its own, so that the others stay when it comes or goes.
 */
struct physmap_range {
    gpa_t gpa;
    uint64_t length_bytes;
    void *host;
    bool rom;
};
unsigned physmap_ranges(const struct physmap *map, struct physmap_range *ranges, unsigned capacity);
/* Calls `changed` after each change of the ranges, on the thread that makes it. One at a time; NULL: nobody any more. With no change under way. */
void physmap_ranges_watch(struct physmap *map, void (*changed)(void *opaque), void *opaque);
/* True when a guest write to gpa is silently dropped (ROM) rather than sent to the bus. */
bool physmap_is_rom(const struct physmap *map, gpa_t gpa);

/*
 * Gives the pages of [gpa, +length) back to the host: they read as zero from then on, take no memory, and come back at a touch. Page aligned, not empty, in one range of
 * RAM, no ROM: -EINVAL, -EFAULT. The bytes stay when it fails (other -errno). From any thread that may mark memory, while vCPUs run and devices transfer:
 * - every mapping of RAM shows the holes at once, so engines' windows, TLBs and shadows stay valid; pointers from physmap_get, too. Watchers are told as after
 *   a write of zeroes, so no translation of the old bytes outlives the call, except in a vCPU that has yet to leave the block it is in.
 * - a store at the same time lands in the old page and is lost, or in the new one and stays; a load reads old bytes, zeroes, or what was stored. New pages are
 *   zeroed by the host: nobody sees another's bytes. A transfer that the host's kernel has under way into the old pages ends in pages that nobody sees.
 */
int physmap_discard(struct physmap *map, gpa_t gpa, uint64_t length_bytes) __attribute__((warn_unused_result));
/*
 * Plugs or unplugs the blocks of [gpa, +length), of whole blocks inside pluggable memory (-EINVAL otherwise). What is not plugged is nothing, and takes no memory. Plugging: any time, one thread at
 * once. Unplugging: with no vCPU running and nothing in flight; engines forget what they know of addresses (engine_ops.state_changed) before they run again.
 */
int physmap_plug(struct physmap *map, gpa_t gpa, uint64_t length_bytes, bool plugged) __attribute__((warn_unused_result));
/* What RAM takes of the host's memory, swap included. Any thread. */
uint64_t physmap_resident_bytes(const struct physmap *map);

/*
 * Pages that are elsewhere. Set before vCPUs run, over RAM that is all zero; pages that become private later count as dirty only when they are written.
 * All of RAM from a file of its size, which nobody writes or truncates (whoever may is trusted). The descriptor stays the caller's.
 */
int physmap_share(struct physmap *map, int fd, struct error *err) __attribute__((warn_unused_result));
/* The pages whose bits are set in `remote` (as physmap_take_dirty_pages counts) come from `source`, over what a shared file has there. One source; a success takes it over. */
int physmap_set_source(struct physmap *map, const struct page_source *source, const uint64_t *remote, struct error *err) __attribute__((warn_unused_result));
/* Bytes of remote pages that come unasked, whole pages. Those that are not remote, or are being fetched, stay as they are. 0 or -errno. Any thread. */
int physmap_fill(struct physmap *map, uint64_t offset, const void *data, uint64_t length_bytes) __attribute__((warn_unused_result));
/* Fetches the first remote page from *offset on, and its neighbours: 1; 0 when there is none any more; or -errno. For a thread in the background, *offset 0 at first. */
int physmap_fetch_next(struct physmap *map, uint64_t *offset) __attribute__((warn_unused_result));
/*
 * Called once, when bytes cannot be had, by the thread that wanted them, with whatever locks it holds: the guest is to stop. From then on every access to pages that are not there
 * fails (physmap_get and others), also of threads that waited.
 */
void physmap_on_failure(struct physmap *map, void (*failed)(void *ctx, const char *text), void *ctx);
void physmap_page_counts(const struct physmap *map, uint64_t *remote, uint64_t *shared);
/* Sets the bits of pages that are not private and may be other than zero. */
void physmap_pages_elsewhere(const struct physmap *map, uint64_t *pages);

/* Sets the bits of pages that were not private when something first wanted them. */
void physmap_pages_touched(const struct physmap *map, uint64_t *pages);
/* These pages will be wanted soon: the host may read those of the shared file ahead. Does not wait for them. */
void physmap_advise(const struct physmap *map, const uint64_t *pages);

/* Zeroes all RAM and marks it dirty (machine reset keeps RAM; this is for tests and fresh starts). */
void physmap_zero(struct physmap *map);

#endif
