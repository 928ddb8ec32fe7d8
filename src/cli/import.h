/* doppel import, inside: bundles (bundle_import.c), appliances in the Open Virtualization Format and images of disks (ovf_import.c). Exit statuses, after a message. */
#ifndef DOPPEL_CLI_IMPORT_H
#define DOPPEL_CLI_IMPORT_H

#include <stdbool.h>

#include "cli/archive_files.h"
#include "cli/arguments.h"
#include "cli/machine_directory.h"

#define IMPORT_BUNDLE_FIRST ".bundle/bundle.json" /* with which bundles begin */

struct import {
    const char *path;
    const char *name, *directory; /* NULL: not given */
    struct archive_progress *progress;
};

bool import_is_ovf(const char *path);
/* The OVF file is the entry that was just reached; its files follow. */
int import_ova(const struct import *import, struct archive *in, struct archive_entry *entry);
int import_ovf(const struct import *import);
/* One image of a disk, in a format that tells itself (ovf_image_format). False: it is none. */
bool import_is_image(const char *path);
int import_image(const struct import *import);

#endif
