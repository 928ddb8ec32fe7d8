/*
 * Linux by its 64-bit boot protocol (Linux Documentation/arch/x86/boot.rst and zero-page.rst; field names are theirs).
 *
 * A bzImage is real-mode setup sectors, whose header describes the rest, then a program that unpacks the kernel. Where the packed kernel's
 * format is known it is unpacked here and that program is left out.
 * Invariants: reads of the header go through image_u16.. and cannot leave the file. Threading: none.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "chipset/boot_priv.h"
#include "chipset/e820.h"

#define SECTOR_BYTES 512ull
#define SETUP_SECTS_DEFAULT 4

/* Offsets in the file and in boot_params alike. */
enum boot_params_offset {
    ACPI_RSDP_ADDR = 0x070,
    E820_ENTRIES = 0x1E8,
    SETUP_SECTS = 0x1F1,
    SYSSIZE = 0x1F4,
    VID_MODE = 0x1FA,
    BOOT_FLAG = 0x1FE,
    HEADER_LENGTH = 0x201, /* the jump's displacement: the header ends at 0x202 + this byte */
    HEADER = 0x202,
    VERSION = 0x206,
    TYPE_OF_LOADER = 0x210,
    LOADFLAGS = 0x211,
    CODE32_START = 0x214,
    RAMDISK_IMAGE = 0x218,
    RAMDISK_SIZE = 0x21C,
    CMD_LINE_PTR = 0x228,
    INITRD_ADDR_MAX = 0x22C,
    RELOCATABLE_KERNEL = 0x234,
    XLOADFLAGS = 0x236,
    CMDLINE_SIZE = 0x238,
    PAYLOAD_OFFSET = 0x248,
    PAYLOAD_LENGTH = 0x24C,
    SETUP_DATA = 0x250,
    PREF_ADDRESS = 0x258,
    INIT_SIZE = 0x260,
    SETUP_HEADER_END = 0x290,
    E820_TABLE = 0x2D0,
};

#define BOOT_FLAG_VALUE 0xAA55
#define HEADER_MAGIC 0x53726448u /* "HdrS" */
#define VERSION_MIN 0x20C        /* 2.12 brought the 64-bit entry */
#define LOADED_HIGH 0x01
#define XLF_KERNEL_64 0x0001
#define ENTRY_64_OFFSET 0x200
#define LOADER_UNDEFINED 0xFF
#define VID_MODE_NORMAL 0xFFFF

static void put(uint8_t *page, unsigned offset, uint64_t value, unsigned size_bytes)
{
    memcpy(page + offset, &value, size_bytes);
}

static void put_memory_map(const struct physmap *memory, uint8_t *page)
{
    struct e820_entry entries[E820_MAX];
    unsigned count = e820_build(memory, entries);

    page[E820_ENTRIES] = (uint8_t)count;
    for (unsigned i = 0; i < count; i++) {
        put(page, E820_TABLE + i * 20, entries[i].base, 8);
        put(page, E820_TABLE + i * 20 + 8, entries[i].length_bytes, 8);
        put(page, E820_TABLE + i * 20 + 16, entries[i].type, 4);
    }
}

/* The setup header: the file's own, or for a kernel without one just enough to be believed. */
static void put_header(const struct image *header, uint8_t *page)
{
    if (header) {
        uint64_t end = HEADER + (uint64_t)header->bytes[HEADER_LENGTH];

        if (end > SETUP_HEADER_END)
            end = SETUP_HEADER_END;
        if (end > header->size_bytes)
            end = header->size_bytes;
        memcpy(page + SETUP_SECTS, header->bytes + SETUP_SECTS, end - SETUP_SECTS);
    } else {
        put(page, BOOT_FLAG, BOOT_FLAG_VALUE, 2);
        put(page, HEADER, HEADER_MAGIC, 4);
        put(page, VERSION, VERSION_MIN, 2);
        put(page, LOADFLAGS, LOADED_HIGH, 1);
    }
    put(page, TYPE_OF_LOADER, LOADER_UNDEFINED, 1);
    put(page, VID_MODE, VID_MODE_NORMAL, 2);
    put(page, SETUP_DATA, 0, 8);
}

int boot_linux_start(struct boot_context *boot, const struct image *header, uint64_t entry, uint64_t command_line_max)
{
    uint8_t page[PAGE_SIZE_BYTES] = {0};
    int rc = boot_load_initrd(boot);

    if (rc == 0)
        rc = boot_write_command_line(boot, command_line_max);
    if (rc == 0)
        rc = boot_write_linux_tables(boot);
    if (rc < 0)
        return rc;
    put_header(header, page);
    put_memory_map(boot->memory, page);
    put(page, ACPI_RSDP_ADDR, boot->config->rsdp, 8);
    put(page, CMD_LINE_PTR, BOOT_COMMAND_LINE, 4);
    put(page, RAMDISK_IMAGE, boot->initrd_base, 4);
    put(page, RAMDISK_SIZE, boot->initrd_bytes, 4);
    boot->entry->protocol = BOOT_LINUX64;
    boot->entry->entry = entry;
    boot->entry->parameters = BOOT_PARAMS;
    return physmap_write(boot->memory, BOOT_PARAMS, page, sizeof(page));
}

static uint64_t setup_bytes(const struct image *image)
{
    unsigned sectors = image->bytes[SETUP_SECTS];

    return ((sectors ? sectors : SETUP_SECTS_DEFAULT) + 1) * SECTOR_BYTES;
}

static int truncated(struct boot_context *boot)
{
    return error_set(boot->err, -EINVAL, "kernel '%s' is truncated or damaged: get a complete copy", boot->config->kernel_path);
}

static int check_header(struct boot_context *boot, const struct image *image)
{
    const char *path = boot->config->kernel_path;
    unsigned version = image_u16(image, VERSION);
    uint64_t protected_bytes = (uint64_t)image_u32(image, SYSSIZE) * 16;

    if (!image_has(image, 0, SETUP_HEADER_END))
        return truncated(boot);
    if (version < VERSION_MIN)
        return error_set(boot->err, -EINVAL, "kernel '%s' has boot protocol %u.%02u: 2.12 (Linux 3.8) or later is needed", path,
                         version >> 8, version & 0xFF);
    if (!(image_u16(image, XLOADFLAGS) & XLF_KERNEL_64))
        return error_set(boot->err, -EINVAL, "kernel '%s' is a 32-bit kernel: a 64-bit one (amd64, x86_64) is needed", path);
    if (!(image->bytes[LOADFLAGS] & LOADED_HIGH))
        return error_set(boot->err, -EINVAL, "kernel '%s' is a zImage: a bzImage is needed", path);
    /* The last paragraph may be partly there. */
    if (image->size_bytes <= setup_bytes(image) + ENTRY_64_OFFSET || image->size_bytes + 15 < setup_bytes(image) + protected_bytes)
        return truncated(boot);
    return 0;
}

/* The kernel unpacked here. -ENOTSUP (no message): its format is not known, or there is no ELF in it. */
static int start_unpacked(struct boot_context *boot, const struct image *image, uint64_t command_line_max)
{
    const char *path = boot->config->kernel_path;
    uint64_t offset = setup_bytes(image) + image_u32(image, PAYLOAD_OFFSET), length = image_u32(image, PAYLOAD_LENGTH), entry;
    uint64_t low = physmap_low_bytes(boot->memory), size = 0;
    struct image payload, kernel;
    uint8_t *bytes = NULL;
    int rc;

    if (!length)
        return -ENOTSUP;
    if (!image_has(image, offset, length))
        return truncated(boot);
    payload = (struct image){image->bytes + offset, length};
    rc = boot_unpack(&payload, low, &bytes, &size);
    if (rc == -EBADMSG)
        return error_set(boot->err, rc, "the compressed kernel inside '%s' is damaged: get a good copy", path);
    if (rc == -EFBIG)
        return boot_too_small(boot, "kernel", image_u32(&payload, length - 4) + image_u64(image, PREF_ADDRESS) % PHYSMAP_LOW_LIMIT);
    if (rc < 0)
        return rc;
    kernel = (struct image){bytes, size};
    rc = boot_is_elf64(&kernel) ? boot_elf_load(boot, &kernel, &entry) : -ENOTSUP;
    free(bytes);
    return rc < 0 ? rc : boot_linux_start(boot, image, entry, command_line_max);
}

/* The kernel unpacks itself: it gets the memory that it asks for (init_size) at the address it likes best. */
static int start_packed(struct boot_context *boot, const struct image *image, uint64_t command_line_max)
{
    uint64_t skip = setup_bytes(image), size = image->size_bytes - skip, need = image_u32(image, INIT_SIZE);
    uint64_t load = image->bytes[RELOCATABLE_KERNEL] ? image_u64(image, PREF_ADDRESS) : image_u32(image, CODE32_START);
    uint64_t low = physmap_low_bytes(boot->memory);
    int rc;

    if (need < size)
        need = size;
    if (load < BOOT_LOW_END || load >= PHYSMAP_LOW_LIMIT)
        return truncated(boot);
    if (load > low || need > low - load)
        return boot_too_small(boot, "kernel", load + need);
    boot->kernel_end = load + need;
    rc = physmap_write(boot->memory, load, image->bytes + skip, size);
    return rc < 0 ? rc : boot_linux_start(boot, image, load + ENTRY_64_OFFSET, command_line_max);
}

int boot_linux(struct boot_context *boot, const struct image *image)
{
    uint64_t command_line_max;
    int rc;

    if (image_u16(image, BOOT_FLAG) != BOOT_FLAG_VALUE || image_u32(image, HEADER) != HEADER_MAGIC)
        return -ENOEXEC;
    rc = check_header(boot, image);
    if (rc < 0)
        return rc;
    boot->initrd_limit = (uint64_t)image_u32(image, INITRD_ADDR_MAX) + 1;
    command_line_max = image_u32(image, CMDLINE_SIZE);
    rc = boot->config->unpack_in_guest ? -ENOTSUP : start_unpacked(boot, image, command_line_max);
    return rc == -ENOTSUP ? start_packed(boot, image, command_line_max) : rc;
}
