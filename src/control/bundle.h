/*
 * Bundles (docs/bundles.md): the configuration of a virtual machine, taken off one host and put on another. The same table says which options go along and which are a host's own affair.
 * A configuration is a JSON object like that of `doppel run --config`, with names of files in the bundle in place of paths. One that comes from a bundle counts as foreign: options,
 * properties and names that are not in the table are refused.
 * Threading: stateless.
 */
#ifndef DOPPEL_CONTROL_BUNDLE_H
#define DOPPEL_CONTROL_BUNDLE_H

#include <stdbool.h>

#include <jansson.h>

#include "machine/config.h"
#include "util/error.h"

#define BUNDLE_FILES_MAX 40
#define BUNDLE_NAME_BYTES 24

struct bundle_file {
    char name[BUNDLE_NAME_BYTES]; /* in the bundle: kernel, initrd, metadata, disk0, disk1.qcow2, pmem0 ... */
    char *path;                   /* on this host; NULL: in a bundle only */
    bool image, readonly;         /* a disk's or persistent memory's; the guest can only read it */
    const char *format;           /* of a disk's image: "raw", "qcow2" or "auto" */
    enum block_backing backing;
};

struct bundle {
    json_t *config;
    struct bundle_file file[BUNDLE_FILES_MAX];
    unsigned file_count;
    char left[256]; /* what was left out, for people: "share, vsock" */
};

/* From the arguments of `doppel run`, without those that are no options of the machine, as given in `directory`. Reads --config. */
int bundle_collect(struct bundle *bundle, const json_t *arguments, const char *directory, struct error *err) __attribute__((warn_unused_result));
/* From a bundle: checks `config`, which it borrows a reference to. */
int bundle_check(struct bundle *bundle, json_t *config, struct error *err) __attribute__((warn_unused_result));
void bundle_clear(struct bundle *bundle);
const struct bundle_file *bundle_find(const struct bundle *bundle, const char *name);

/* The configuration with files in `directory`; NULL: no memory. */
json_t *bundle_place(const struct bundle *bundle, const char *directory);

/* The file that goes into the bundle is a raw image, whatever it was. */
int bundle_make_raw(struct bundle *bundle, unsigned file, struct error *err) __attribute__((warn_unused_result));

/* Whether an image is a qcow2 one that needs another file. -errno: it cannot be read. */
int bundle_needs_others(int fd) __attribute__((warn_unused_result));

/*
 * Where the files of a snapshot's machine are, when it is another host's: an object with kernel, initrd, metadata (texts), disk, disk_format, pmem (arrays). Made of a placed configuration, and put
 * into the one of a snapshot. -EINVAL: it is of another shape.
 */
json_t *bundle_paths(const json_t *placed);
int bundle_set_paths(struct machine_config *config, const json_t *paths, struct error *err) __attribute__((warn_unused_result));

#endif
