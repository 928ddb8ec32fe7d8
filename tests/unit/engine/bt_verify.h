/*
 * Proof, block by block, that a translation touches nothing but what docs/security.md allows: the host's code is decoded again and executed on symbols.
 *
 * Every value is a sum of symbols times constants, modulo 2^64. A symbol is what is not known (a guest register, what an instruction computed) or what a lookup gave: V of the page of a
 * sum, a dispatch entry of a sum. An access is right when its address is X + V(Y) and a check on the way here has said that X, all of its bytes, and Y are in one page.
 */
#ifndef DOPPEL_TESTS_BT_VERIFY_H
#define DOPPEL_TESTS_BT_VERIFY_H

#include "engine/bt/bt_priv.h"

/* Text of what is wrong with the block's code (until the next call), or NULL. The block need not be linked; if it is, where it leads is checked, too. */
const char *bt_verify(struct bt_engine *e, const struct bt_block *block);
#endif
