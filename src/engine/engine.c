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

static const char best[] = "the best there is";

/* One more engine that cannot be had. */
static void add_reason(char *reason, const struct error *why)
{
    size_t used = reason && strcmp(reason, best) ? strlen(reason) : 0;
    if (reason && why->code)
        snprintf(reason + used, ENGINE_REASON_MAX - used, "%s%s", used ? "; " : "", why->text);
}

/* The first from engine_table[n] on that this host can run. `reason` gets why not those before, too. */
static const struct engine_ops *engine_first(unsigned n, char *reason, struct error *err)
{
    for (; engine_table[n]; n++) {
        const struct engine_ops *ops = engine_table[n];
        struct error probe = {0};
        if ((!ops->worthwhile || !ops->worthwhile(&probe)) && (ops->tells || !ops->probe(&probe))) {
            if (reason && !*reason)
                snprintf(reason, ENGINE_REASON_MAX, "%s", best);
            return ops;
        }
        add_reason(reason, &probe);
    }
    error_set(err, -ENODEV, "no engine can run on this host");
    return NULL;
}

const struct engine_ops *engine_next(const struct engine_ops *failed, const struct error *why, char reason[ENGINE_REASON_MAX])
{
    unsigned n = 0;
    while (engine_table[n] && engine_table[n] != failed)
        n++;
    struct error none;
    add_reason(reason, why);
    return engine_table[n] ? engine_first(n + 1, reason, &none) : NULL;
}

const struct engine_ops *engine_find(const char *name, char reason[ENGINE_REASON_MAX], struct error *err)
{
    if (reason)
        reason[0] = 0;
    if (!strcmp(name, "auto"))
        return engine_first(0, reason, err);
    for (unsigned n = 0; engine_table[n]; n++) {
        const struct engine_ops *ops = engine_table[n];
        if (strcmp(name, ops->name))
            continue;
        if (!ops->tells && ops->probe(err))
            return NULL;
        if (reason)
            snprintf(reason, ENGINE_REASON_MAX, "asked for");
        return ops;
    }
    error_set(err, -EINVAL, "no engine is called \"%s\"; there are \"auto\", \"kvm\", \"bt\" and \"interp\"", name);
    return NULL;
}
