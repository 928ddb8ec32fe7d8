/*
 * The engines that are built in, and the choice between them.
 *
 * Threading: everything here is constant.
 */
#include "engine/engine.h"

#include <errno.h>
#include <string.h>

const struct engine_ops *const engine_table[] = {
    &kvm_engine_ops,
    &bt_engine_ops,
    &interp_engine,
    NULL,
};

const char *const engine_counter_names[COUNTER_COUNT] = {
#define COUNTER(name, help) [COUNTER_##name] = #name,
#include "engine/counters.def"
#undef COUNTER
};

const char *const engine_counter_help[COUNTER_COUNT] = {
#define COUNTER(name, help) [COUNTER_##name] = help,
#include "engine/counters.def"
#undef COUNTER
};

/* The first from engine_table[n] on that this host can run. `first`: why not one before. */
static const struct engine_ops *engine_first(unsigned n, struct error first, char reason[160], struct error *err)
{
    struct error probe;
    for (; engine_table[n]; n++) {
        const struct engine_ops *ops = engine_table[n];
        if ((ops->worthwhile && ops->worthwhile(&probe)) || ops->probe(&probe)) {
            if (!first.code)
                first = probe;
            continue;
        }
        if (reason)
            snprintf(reason, 160, "%.159s", first.code ? first.text : "the best there is");
        return ops;
    }
    error_set(err, -ENODEV, "no engine can run on this host");
    return NULL;
}

const struct engine_ops *engine_next(const struct engine_ops *failed, const struct error *why, char reason[160])
{
    unsigned n = 0;
    while (engine_table[n] && engine_table[n] != failed)
        n++;
    struct error none;
    return engine_table[n] ? engine_first(n + 1, *why, reason, &none) : NULL;
}

const struct engine_ops *engine_find(const char *name, char reason[160], struct error *err)
{
    if (!strcmp(name, "auto"))
        return engine_first(0, (struct error){0}, reason, err);
    for (unsigned n = 0; engine_table[n]; n++) {
        const struct engine_ops *ops = engine_table[n];
        if (strcmp(name, ops->name))
            continue;
        if (ops->probe(err))
            return NULL;
        if (reason)
            snprintf(reason, 160, "asked for");
        return ops;
    }
    error_set(err, -EINVAL, "no engine is called \"%s\"; there are \"auto\", \"kvm\", \"bt\" and \"interp\"", name);
    return NULL;
}
