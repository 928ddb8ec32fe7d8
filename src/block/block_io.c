/*
 * Chooses how host I/O is done: io_uring where the kernel and its policies allow it, otherwise threads.
 */
#include "block/block_priv.h"

#include <errno.h>
#include <string.h>

#include "util/log.h"

int block_io_create(struct block_io **io, const char *name, struct loop *loop, struct error *err)
{
    static const struct block_io_ops *const kinds[] = {&block_io_uring_ops, &block_io_threads_ops};
    bool automatic = !name || !strcmp(name, "auto");
    int ret = -EINVAL;

    for (unsigned i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        if (!automatic && strcmp(name, kinds[i]->name))
            continue;
        ret = kinds[i]->create(io, loop);
        if (ret == 0) {
            (*io)->users = 1;
            return 0;
        }
        if (!automatic)
            return error_set(err, ret, "disk I/O by \"%s\" does not work here: %s; use \"auto\"", name, strerror(-ret));
        log_debug("disk I/O by %s does not work here: %s", kinds[i]->name, strerror(-ret));
    }
    if (automatic)
        return error_set(err, ret, "cannot set up disk I/O: %s", strerror(-ret));
    return error_set(err, -EINVAL, "unknown kind of disk I/O \"%s\"; use \"auto\", \"uring\" or \"threads\"", name);
}

void block_io_put(struct block_io *io)
{
    if (io && --io->users == 0)
        io->ops->destroy(io);
}
