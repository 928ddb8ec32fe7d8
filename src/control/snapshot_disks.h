/*
 * The disks of snapshots. A snapshot of a machine freezes the files of its disks, and what the guest writes from then on goes to overlays in the machine's part of the directory of
 * snapshots (snapshot_store.h):
 *
 *     VM/.disks/NUMBER.qcow2   overlays. Each was on top of a disk once; those that are frozen belong to snapshots, or lie below others
 *     VM/.disks/map.json       which one is on top of each disk now: a machine that is started with the disk's own file gets that one instead
 *
 * snapshot.json names the frozen files, in the order of the machine's disks that can be written: "disk_files": [{"origin": the file that the user named, "file", "format",
 * "size_bytes"}]. The map is on the disk before an overlay is in use, and an overlay that nobody has written to shows what is below it; so at each moment the map names what the
 * guest has written. Overlays that neither a snapshot nor a map needs are removed with the next snapshot that is made or removed.
 */
#ifndef DOPPEL_CONTROL_SNAPSHOT_DISKS_H
#define DOPPEL_CONTROL_SNAPSHOT_DISKS_H

#include <jansson.h>

#include "block/image.h"
#include "control/snapshot_store.h"
#include "machine/machine.h"

/* The overlays of a snapshot under way, in the machine's process. */
struct disks_under_way {
    int directory_fd; /* borrowed: the machine's part */
    struct machine_disk_info *disk;
    struct machine_overlay overlay[CONFIG_DISKS_MAX];
    char path[CONFIG_DISKS_MAX][STORE_PATH_BYTES];
    unsigned count;
    json_t *map_before;
};
/* Makes them and the map; -ENOTSUP: the path is too long for a backing file's name. snapshot_disks_end frees, and when they did not come into use, takes back. */
int snapshot_disks_begin(struct disks_under_way *disks, struct machine *machine, int directory_fd, const char *directory, struct error *err) __attribute__((warn_unused_result));
json_t *snapshot_disks_describe(const struct disks_under_way *disks); /* "disk_files" */
void snapshot_disks_end(struct disks_under_way *disks, bool in_use);

/* The disks in `config` become what the map in `directory` says. Files are not looked at. */
int snapshot_disks_apply(const char *directory, struct machine_config *config, struct error *err) __attribute__((warn_unused_result));
/* One of "disk_files", with all that is below it. */
int snapshot_disks_open(const struct stored_snapshot *snapshot, const json_t *entry, struct block_image **image, struct error *err) __attribute__((warn_unused_result));
/* What can be found out before a running `vm` gives its place up: whether the files of a snapshot can be had, with what is below them, and the map of `vm`. */
int snapshot_disks_check(const struct stored_snapshot *snapshot, const char *vm, struct error *err) __attribute__((warn_unused_result));
/* New overlays on the files of a snapshot for the machine `vm`, which does not run, and its map. */
int snapshot_disks_restore(const struct stored_snapshot *snapshot, const char *vm, struct error *err) __attribute__((warn_unused_result));
/* What is on top of each disk, by the file that the user named; empty without a map. `directory` is a machine's. -EBADMSG: the map is damaged. The caller's to free; NULL after a failure. */
int snapshot_disks_map(const char *directory, json_t **map, struct error *err) __attribute__((warn_unused_result));
/* With the exclusive lock, for an image that comes from elsewhere: a path that nothing has yet. A descriptor of its directory, or -errno. */
int snapshot_disks_place(const char *vm, char directory[STORE_PATH_BYTES], char path[STORE_PATH_BYTES], struct error *err) __attribute__((warn_unused_result));
/* With the exclusive lock: removes what nobody needs. `merge`: and makes what only one other needs a part of that; without, when there are many. */
void snapshot_disks_sweep(const char *vm, bool merge);
/* How many clusters of 64 KiB differ, of how many. Parts that both have from the same place of the same file are not read. */
int snapshot_disks_compare(const struct stored_snapshot *a, const struct stored_snapshot *b, uint64_t *different, uint64_t *all, struct error *err)
    __attribute__((warn_unused_result));

#endif
