/*
 * Disks that move with a machine (docs/migration.md): what the guest can write is copied while it runs, then what it has written meanwhile, and the last of it while it is paused. The target has new raw
 * images for them. DISK (migrate_priv.h) is the message.
 */
#ifndef DOPPEL_MACHINE_MIGRATE_DISKS_H
#define DOPPEL_MACHINE_MIGRATE_DISKS_H

#include "machine/migrate_priv.h"

/* ---- the source; on the thread that migrates ---- */

struct disks_out;
/* From now on it is noted what is written to disks, and none is plugged, unplugged or exchanged (machine->disks_leaving). Fills the list of HELLO. */
int disks_out_create(struct disks_out **out, struct machine *machine, struct migrate_hello *hello, struct error *err) __attribute__((warn_unused_result));
void disks_out_destroy(struct disks_out *out); /* NULL: nothing */
/* What was written and not sent, about; in_flight: requests that may write more are counted as well. Device lock. */
uint64_t disks_out_left(const struct disks_out *out);
/* Sends all that is left now; `sent` is called after each piece, and ends the pass if it returns another value than 0. */
struct disks_pass {
    struct stream *stream;
    int zstd_level;
    int (*sent)(void *ctx, struct error *err);
    void *ctx;
};
int disks_out_send(struct disks_out *out, const struct disks_pass *pass, struct error *err) __attribute__((warn_unused_result));

/* ---- the target ---- */

struct disks_in;
/* Makes an image for each in `directory`, named like the one there and new (-EEXIST), and puts it into the configuration. */
int disks_in_make(struct disks_in **out, const struct migrate_hello *hello, const char *directory, struct machine_config *config, struct error *err) __attribute__((warn_unused_result));
/* keep: they are a machine's. Otherwise they are removed. NULL: nothing. */
void disks_in_close(struct disks_in *in, bool keep);
/* A DISK message: foreign bytes. */
int disks_in_take(struct disks_in *in, const uint8_t *body, size_t size_bytes, struct error *err) __attribute__((warn_unused_result));
/* They are on the host's disk. */
int disks_in_settle(struct disks_in *in, struct error *err) __attribute__((warn_unused_result));

#endif
