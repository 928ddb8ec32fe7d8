/*
 * More than one processor: starts the others, lends them functions, sends IPIs. Number 0 is the one that the program starts on; the others wait halted in
 * ring 0, 64-bit mode, open to interrupts, on stacks of their own, without a TSS: no ring 3 and no interrupt stack table there.
 */
#ifndef DOPPEL_PROCESSORS_H
#define DOPPEL_PROCESSORS_H

#include "conform.h"

#define PROCESSORS_MAX 4u

/* At most `wanted` altogether; how many there are now. */
unsigned processors_start(unsigned wanted);
/* fn(number) on processors 0 to count - 1 at once; returns when all are done. False: some did not finish within `ms`. */
bool processors_run(void (*fn)(unsigned number), unsigned count, unsigned ms);
/* fn(number) on another processor; wait_other tells when it is done. */
void processor_begin(unsigned number, void (*fn)(unsigned number));
bool processor_wait(unsigned number, unsigned ms);
void processor_send(unsigned number, uint32_t command); /* low half of the ICR */
unsigned processor_number(void);
/* All `count` processors meet here. Any number of times, one meeting place. */
void processors_meet(unsigned count);

#endif
