/*
 * The Open Virtualization Format (DMTF DSP0243): what an appliance's descriptor says of processors, memory, disks and network cards. It is foreign text: its size, names and numbers are
 * bounded, names of files are plain names, and what cannot be honoured (several machines, images in pieces, images on top of others) is refused.
 * Threading: none.
 */
#ifndef DOPPEL_CONTROL_OVF_H
#define DOPPEL_CONTROL_OVF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/error.h"

#define OVF_BYTES_MAX (1u << 20)
#define OVF_TEXT_BYTES 160
#define OVF_LIST_MAX 64
#define OVF_DISKS_MAX 16
#define OVF_NETS_MAX 8

struct ovf_disk {
    char file[OVF_TEXT_BYTES]; /* of the image; "": an empty disk */
    uint64_t capacity_bytes;   /* 0: as the image is */
};

struct ovf {
    char name[OVF_TEXT_BYTES]; /* as it is called there; may be "" */
    uint64_t memory_bytes;     /* 0: not said */
    unsigned cpus;             /* 0: not said */
    struct ovf_disk disk[OVF_DISKS_MAX];
    unsigned disk_count, net_count;
    bool others; /* drives for removable media, which are passed over */
};

int ovf_parse(struct ovf *ovf, const char *text, size_t bytes, struct error *err) __attribute__((warn_unused_result));

/*
 * Which of qemu-img's formats an image is in, by its content: "vmdk", "vdi", "vhdx", "vpc", "qcow2"; "raw" when it looks like none of them. NULL: it is refused, because reading it would
 * lead to other files that it names.
 */
const char *ovf_image_format(int fd, const char *path, struct error *err);

#endif
