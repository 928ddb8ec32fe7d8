/* Threads of devices and back ends in what they enter in a machine. */
#include "filtered.h"

#include "util/loop.h"

bool __wrap_loop_thread_enter(struct loop *loop, unsigned kind);

bool __wrap_loop_thread_enter(struct loop *loop, unsigned kind)
{
    filtered_enter(kind);
    return true;
}
