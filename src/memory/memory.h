/*
 * PhysMap: guest-physical memory, the one truth about where a gpa's bytes are.
 *
 * Guest RAM is one memfd. Ranges of gpa space are RAM (read-write), ROM (guest writes are dropped) or nothing (MMIO or a hole: accesses go to the
 * bus). Callers ask with an intent and a length and never compute host pointers themselves. In this version every RAM page is resident;
 * the interface already lets a page be somewhere else or move (`-EAGAIN`, physmap_put), so that sharing, ballooning and
 * swapping need no new callers.
 * Threading: ranges are set up before vCPUs run. Look-ups are lock-free from any thread.
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

enum physmap_intent { PHYSMAP_READ, PHYSMAP_WRITE, PHYSMAP_EXECUTE };

/* Low RAM ends here at most; the rest of the RAM starts at 4 GiB. Between is the PCI hole. */
#define PHYSMAP_LOW_LIMIT 0xC0000000ull
#define PHYSMAP_HIGH_BASE 0x100000000ull

/* ram_bytes is a multiple of 4096. Maps [0, min(ram, low limit)) and the rest from 4 GiB. */
int physmap_create(struct physmap **map, uint64_t ram_bytes, struct error *err) __attribute__((warn_unused_result));
void physmap_destroy(struct physmap *map);

uint64_t physmap_ram_bytes(const struct physmap *map);
uint64_t physmap_low_bytes(const struct physmap *map);  /* RAM below 4 GiB */
uint64_t physmap_high_bytes(const struct physmap *map); /* RAM from 4 GiB on */

/*
 * Host address of [gpa, gpa + length). The whole range must lie in one range of RAM (or ROM, for read and execute).
 * Returns NULL when it does not: the caller then goes to the bus, or treats it as a guest's bad address.
 */
void *physmap_get(struct physmap *map, gpa_t gpa, uint64_t length_bytes, enum physmap_intent intent);

/* Marks [gpa, +length) dirty after a write that did not go through an engine (device DMA). */
void physmap_mark_dirty(struct physmap *map, gpa_t gpa, uint64_t length_bytes);
/* True when the page at gpa was marked since the last call for it; forgets the mark. Any thread. */
bool physmap_take_dirty(struct physmap *map, gpa_t gpa);

/* Copies, for boot loaders, descriptors and tables. -EFAULT when any byte is outside RAM (nothing is copied then). */
int physmap_read(struct physmap *map, gpa_t gpa, void *data, uint64_t length_bytes) __attribute__((warn_unused_result));
int physmap_write(struct physmap *map, gpa_t gpa, const void *data, uint64_t length_bytes) __attribute__((warn_unused_result));

/* Makes [gpa, +length) inside RAM behave as ROM towards the guest (page aligned). */
int physmap_set_rom(struct physmap *map, gpa_t gpa, uint64_t length_bytes) __attribute__((warn_unused_result));
/* True when a guest write to gpa is silently dropped (ROM) rather than sent to the bus. */
bool physmap_is_rom(const struct physmap *map, gpa_t gpa);

/* Zeroes all RAM (machine reset keeps RAM; this is for tests and fresh starts). */
void physmap_zero(struct physmap *map);

#endif
