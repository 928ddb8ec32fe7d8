/* Random instructions of every opcode map and encoding, for tests of the translator. Not all are valid. */
#ifndef DOPPEL_TESTS_BT_RANDOM_H
#define DOPPEL_TESTS_BT_RANDOM_H

#include <stdbool.h>
#include <stdint.h>

uint64_t bt_random64(void);
unsigned bt_below(unsigned limit);
/* Writes so many bytes, which begin like an instruction. Returns how many are surely its own. narrow: without REX prefixes, which are instructions in 32-bit code. */
#define BT_INSN_ROOM 20
unsigned bt_insn_put(uint8_t *p, bool narrow);

#endif
