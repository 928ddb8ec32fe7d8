/*
 * Areas of test pages all over the 64-bit range, the same pattern of rights in each, every page with a frame and contents of its own, neighbours never adjacent in
 * memory; a shadow says what the frames must hold. And where wild pointers like to point. For the programs about wild accesses.
 */
#ifndef DOPPEL_AREAS_H
#define DOPPEL_AREAS_H

#include "probe.h"

#define AREAS 8u
#define AREA_PAGES 16u
extern const uint64_t area_bases[AREAS];

void areas_create(void);
/* The byte of the shadow that belongs to va, NULL when va is in no test page. */
uint8_t *area_shadow(uint64_t va);
/* Copies what memory holds now into the shadow: after stores that are not modelled. */
void area_learn(uint64_t va, unsigned size);
/* The neighbourhood of an access, or everything, holds what the shadow says. */
bool areas_intact_near(uint64_t va, unsigned size);
bool areas_intact(void);
/* An address for an access of `size` bytes: near the edges of test pages, aliases of them, non-canonical, host-like, anything. */
uint64_t wild_address(unsigned size);

/*
 * Code pages, each mapped for ring 3 and for ring 0, low and high. So many that each is written only now and then: monitors take pages that keep changing for something else than code
 * and run them in another way.
 */
#define CODE_BYTES (4096u * 4096u)
#define CODE_VIEWS 4u
uint8_t *code_bytes(void);
uint64_t code_va(bool user, unsigned view);
/* Room for 128 bytes in the next page, now and then across its end: its offset. */
unsigned code_next(void);

/* A timer that interrupts at random, on the traps' own stack, when IF is set. */
extern volatile unsigned timer_interrupts;
void timer_begin(void);
void timer_end(void);

#endif
