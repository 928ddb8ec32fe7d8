/*
 * qcow2: the header as it is in the file, big-endian.
 */
#ifndef DOPPEL_BLOCK_QCOW2_LAYOUT_H
#define DOPPEL_BLOCK_QCOW2_LAYOUT_H

#include <stdint.h>

struct qcow2_disk_header {
    uint8_t magic[4];
    uint32_t version;
    uint64_t backing_file_offset;
    uint32_t backing_file_size, cluster_bits;
    uint64_t size;
    uint32_t crypt_method, l1_size;
    uint64_t l1_table_offset, refcount_table_offset;
    uint32_t refcount_table_clusters, nb_snapshots;
    uint64_t snapshots_offset;
    /* Version 3. */
    uint64_t incompatible_features, compatible_features, autoclear_features;
    uint32_t refcount_order, header_length;
    uint8_t compression_type, padding[7];
} __attribute__((packed));

/* A snapshot in the image's list; extra data, id and name follow. */
struct qcow2_disk_snapshot {
    uint64_t l1_table_offset;
    uint32_t l1_size;
    uint16_t id_str_size, name_size;
    uint32_t date_sec, date_nsec;
    uint64_t vm_clock_nsec;
    uint32_t vm_state_size, extra_data_size;
} __attribute__((packed));

#endif
