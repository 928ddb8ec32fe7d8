/* Looking for a moment before sleeping (patience.h). */
#include "util/patience.h"

#include <sched.h>

#include "util/loop.h"

#define LIMIT_NS_FIRST 12500u
#define LOOKS 16u /* between two looks at the clock */

void patience_init(struct patience *patience)
{
    cpu_set_t set;
    bool alone = sched_getaffinity(0, sizeof set, &set) < 0 || CPU_COUNT(&set) < 2;
    *patience = (struct patience){.limit_max_ns = alone ? 0 : PATIENCE_NS_MAX};
}

bool patience_look(struct patience *patience, const atomic_bool *flag)
{
    patience->since_ns = loop_now_ns();
    if (!patience->limit_ns)
        return atomic_load_explicit(flag, memory_order_acquire);
    do {
        for (unsigned i = 0; i < LOOKS; i++) {
            if (atomic_load_explicit(flag, memory_order_acquire))
                return true;
            __builtin_ia32_pause();
        }
    } while (loop_now_ns() - patience->since_ns < patience->limit_ns);
    return false;
}

void patience_slept(struct patience *patience)
{
    uint64_t limit_ns = patience->limit_ns ? 2 * patience->limit_ns : LIMIT_NS_FIRST;
    if (loop_now_ns() - patience->since_ns > 2 * patience->limit_max_ns)
        limit_ns = 0;
    patience->limit_ns = limit_ns < patience->limit_max_ns ? limit_ns : patience->limit_max_ns;
}
