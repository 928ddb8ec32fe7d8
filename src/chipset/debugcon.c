/*
 * The debug console at port 0xE9 and the POST code port 0x80. Invariants: none, it keeps nothing.
 * Threading: with the device lock held.
 */
#include "chipset/debugcon.h"

#include <errno.h>
#include <stdlib.h>

#define POST_PORT 0x80

struct debugcon {
    struct debugcon_config config;
};

static uint64_t debugcon_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    return DEBUGCON_PORT; /* how a guest recognises it */
}

static void debugcon_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct debugcon *debugcon = ctx;
    uint8_t byte = (uint8_t)value;

    if (debugcon->config.sink.write)
        debugcon->config.sink.write(debugcon->config.sink.ctx, &byte, 1);
}

static const struct region_ops debugcon_ops = {"debugcon", debugcon_read, debugcon_write, 1, 1};
/* Written by kernels as a delay; claimed so that it does not count as an access to nothing. */
static const struct region_ops post_ops = {"post", NULL, NULL, 1, 1};

int debugcon_create(struct debugcon **out, const struct debugcon_config *config)
{
    struct debugcon *debugcon = calloc(1, sizeof(*debugcon));
    int rc;

    if (!debugcon)
        return -ENOMEM;
    debugcon->config = *config;
    rc = bus_add(config->bus, BUS_PORT, DEBUGCON_PORT, 1, &debugcon_ops, debugcon);
    if (rc == 0)
        rc = bus_add(config->bus, BUS_PORT, POST_PORT, 1, &post_ops, debugcon);
    if (rc < 0) {
        debugcon_destroy(debugcon);
        return rc;
    }
    *out = debugcon;
    return 0;
}

void debugcon_destroy(struct debugcon *debugcon)
{
    if (!debugcon)
        return;
    bus_remove(debugcon->config.bus, BUS_PORT, DEBUGCON_PORT, debugcon);
    bus_remove(debugcon->config.bus, BUS_PORT, POST_PORT, debugcon);
    free(debugcon);
}
