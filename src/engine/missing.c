/*
 * Counting by name what a guest asked for and did not get. Apart from engine.c, so that an engine can be tested without the table of all.
 * Threading: the vCPU's thread.
 */
#include "engine/engine.h"

#include <string.h>

void vcpu_count_missing(struct vcpu *vcpu, const char *name)
{
    for (struct vcpu_missing *missing = vcpu->missing; missing < vcpu->missing + VCPU_MISSING_MAX; missing++) {
        if (!missing->name[0])
            snprintf(missing->name, sizeof(missing->name), "%s", name);
        if (!strncmp(missing->name, name, sizeof(missing->name) - 1)) {
            missing->count++;
            return;
        }
    }
}
