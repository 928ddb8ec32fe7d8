/*
 * Starting a kernel: reads the files, tries the formats, and does what all protocols share: initial RAM disk, command line, page tables, GDT,
 * the processor's first state.
 *
 * Invariants: nothing is written outside RAM below 4 GiB; what a file says about sizes is checked where it is read.
 * Threading: none.
 */
#include "chipset/boot.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "chipset/boot_priv.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_LOOP, pread64); /* again at each reset */
SANDBOX_ALLOW_IF(IN_LOOP, newfstatat, ARG_HAS(3, AT_EMPTY_PATH));

#define KERNEL_BYTES_MAX (2ull << 30)
#define MIB ((uint64_t)1 << 20)

/* Descriptors (SDM vol. 3, 3.4.5): flat, 4 GiB. */
#define DESCRIPTOR_CODE64 0x00AF9B000000FFFFull
#define DESCRIPTOR_CODE32 0x00CF9B000000FFFFull
#define DESCRIPTOR_DATA 0x00CF93000000FFFFull
#define DESCRIPTOR_TSS 0x00008B0000000067ull

/* Linux wants its code at selector 0x10 and its data at 0x18; PVH leaves the choice. */
#define SELECTOR_CODE 0x10
#define SELECTOR_DATA 0x18
#define SELECTOR_TSS 0x20

int boot_too_small(struct boot_context *boot, const char *what, uint64_t end)
{
    return error_set(boot->err, -ENOMEM, "%s '%s' does not fit into the machine's memory: give it at least %" PRIu64 " MiB", what,
                     boot->config->kernel_path, (end + MIB - 1) / MIB);
}

static void close_file(int fd, const int *kept)
{
    if (!kept)
        close(fd);
}

/* Opens a regular file, or takes the one kept, and tells its size. Returns the descriptor. */
static int open_file(const char *path, const char *what, int *kept, uint64_t *size_bytes, struct error *err)
{
    int fd = kept && *kept >= 0 ? *kept : open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;

    if (fd < 0) {
        int code = -errno;

        return error_set(err, code, "cannot open %s '%s': %s", what, path, strerror(-code));
    }
    if (kept)
        *kept = fd;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        close_file(fd, kept);
        return error_set(err, -EINVAL, "%s '%s' is not a regular file", what, path);
    }
    *size_bytes = (uint64_t)st.st_size;
    return fd;
}

static int read_all(int fd, const char *path, uint8_t *to, uint64_t size_bytes, struct error *err)
{
    uint64_t done = 0;

    while (done < size_bytes) {
        ssize_t got = pread(fd, to + done, size_bytes - done, (off_t)done);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            int code = -errno;

            return error_set(err, code, "cannot read '%s': %s", path, strerror(-code));
        }
        if (got == 0)
            return error_set(err, -EIO, "'%s' became shorter while it was read: try again", path);
        done += (uint64_t)got;
    }
    return 0;
}

static int read_kernel(const struct boot_config *config, struct image *image, struct error *err)
{
    const char *path = config->kernel_path;
    uint8_t *bytes = NULL;
    uint64_t size = 0;
    int fd = open_file(path, "kernel", config->kernel_fd, &size, err), rc = fd;

    if (fd < 0)
        return rc;
    if (size == 0 || size > KERNEL_BYTES_MAX)
        rc = error_set(err, -EINVAL, "kernel '%s' has %" PRIu64 " bytes: not a kernel", path, size);
    else if (!(bytes = malloc(size)))
        rc = error_set(err, -ENOMEM, "no memory to read kernel '%s'", path);
    else
        rc = read_all(fd, path, bytes, size, err);
    close_file(fd, config->kernel_fd);
    if (rc < 0) {
        free(bytes);
        return rc;
    }
    *image = (struct image){bytes, size};
    return 0;
}

/* As high as its limit allows, so that it is out of the way of a kernel that grows or moves. */
static int place_initrd(struct boot_context *boot, uint64_t size)
{
    uint64_t limit = physmap_low_bytes(boot->memory);

    if (boot->initrd_limit < limit)
        limit = boot->initrd_limit;
    limit &= ~PAGE_MASK_BITS;
    if (size > limit || ((limit - size) & ~PAGE_MASK_BITS) < boot->kernel_end) {
        return error_set(boot->err, -ENOMEM,
                         "initrd '%s' (%" PRIu64 " MiB) does not fit beside the kernel: give the machine at least %" PRIu64 " MiB",
                         boot->config->initrd_path, (size + MIB - 1) / MIB,
                         (boot->kernel_end + MIB - 1) / MIB + (size + MIB - 1) / MIB + 1);
    }
    boot->initrd_base = (limit - size) & ~PAGE_MASK_BITS;
    boot->initrd_bytes = size;
    return 0;
}

int boot_load_initrd(struct boot_context *boot)
{
    const char *path = boot->config->initrd_path;
    uint64_t size = 0;
    void *to;
    int fd, rc;

    if (!path)
        return 0;
    fd = open_file(path, "initrd", boot->config->initrd_fd, &size, boot->err);
    if (fd < 0)
        return fd;
    if (size == 0)
        rc = error_set(boot->err, -EINVAL, "initrd '%s' is empty", path);
    else
        rc = place_initrd(boot, size);
    if (rc == 0) {
        to = physmap_get(boot->memory, boot->initrd_base, size, PHYSMAP_WRITE);
        rc = to ? read_all(fd, path, to, size, boot->err) : error_set(boot->err, -EFAULT, "no guest RAM for initrd '%s'", path);
        physmap_mark_dirty(boot->memory, boot->initrd_base, size);
    }
    close_file(fd, boot->config->initrd_fd);
    return rc;
}

int boot_write_command_line(struct boot_context *boot, uint64_t size_max)
{
    const char *text = boot->config->command_line ? boot->config->command_line : "";
    uint64_t length = strlen(text);

    if (size_max > BOOT_COMMAND_LINE_BYTES - 1)
        size_max = BOOT_COMMAND_LINE_BYTES - 1;
    if (length > size_max)
        return error_set(boot->err, -E2BIG, "the command line has %" PRIu64 " characters; kernel '%s' takes at most %" PRIu64, length,
                         boot->config->kernel_path, size_max);
    return physmap_write(boot->memory, BOOT_COMMAND_LINE, text, length + 1);
}

static int write_gdt(struct boot_context *boot, uint64_t code)
{
    const uint64_t gdt[] = {0, 0, code, DESCRIPTOR_DATA, DESCRIPTOR_TSS, 0};

    boot->entry->gdt = BOOT_GDT;
    boot->entry->gdt_limit = sizeof(gdt) - 1;
    return physmap_write(boot->memory, BOOT_GDT, gdt, sizeof(gdt));
}

int boot_write_pvh_gdt(struct boot_context *boot)
{
    return write_gdt(boot, DESCRIPTOR_CODE32);
}

/* Identity map of the first 4 GiB with 2 MiB pages (SDM vol. 3, 4.5). */
int boot_write_linux_tables(struct boot_context *boot)
{
    enum { ENTRIES = 512, DIRECTORIES = 4 };
    static const uint64_t present_writable = 3, large = 0x80;
    uint64_t table[ENTRIES] = {0};
    uint64_t directory = BOOT_PAGE_TABLES + 2 * PAGE_SIZE_BYTES;
    int rc;

    table[0] = (BOOT_PAGE_TABLES + PAGE_SIZE_BYTES) | present_writable;
    rc = physmap_write(boot->memory, BOOT_PAGE_TABLES, table, sizeof(table));
    for (unsigned i = 0; i < DIRECTORIES; i++)
        table[i] = (directory + i * PAGE_SIZE_BYTES) | present_writable;
    if (rc == 0)
        rc = physmap_write(boot->memory, BOOT_PAGE_TABLES + PAGE_SIZE_BYTES, table, sizeof(table));
    for (unsigned i = 0; rc == 0 && i < DIRECTORIES; i++) {
        for (unsigned j = 0; j < ENTRIES; j++)
            table[j] = ((uint64_t)(i * ENTRIES + j) << 21) | present_writable | large;
        rc = physmap_write(boot->memory, directory + i * PAGE_SIZE_BYTES, table, sizeof(table));
    }
    boot->entry->page_tables = BOOT_PAGE_TABLES;
    return rc < 0 ? rc : write_gdt(boot, DESCRIPTOR_CODE64);
}

int boot_load(struct physmap *memory, const struct boot_config *config, struct boot_entry *entry, struct error *err)
{
    struct error local = {0};
    struct boot_context boot = {.memory = memory, .config = config, .entry = entry, .err = err ? err : &local};
    struct image image;
    int rc = read_kernel(config, &image, boot.err);

    if (rc < 0)
        return rc;
    boot.err->code = 0;
    *entry = (struct boot_entry){0};
    if (physmap_low_bytes(memory) < 2 * MIB) {
        rc = boot_too_small(&boot, "kernel", image.size_bytes + 2 * MIB);
    } else {
        rc = boot_linux(&boot, &image);
        if (rc == -ENOEXEC)
            rc = boot_elf(&boot, &image);
    }
    free((void *)image.bytes);
    if (rc == -ENOEXEC)
        return error_set(boot.err, rc, "'%s' is not a kernel that can be started: a Linux bzImage (vmlinuz) or an x86 ELF kernel is needed",
                         config->kernel_path);
    if (rc < 0 && !boot.err->code)
        error_set(boot.err, rc, "cannot load kernel '%s': %s", config->kernel_path, strerror(-rc));
    return rc;
}

static struct segment flat_segment(uint16_t selector, uint16_t attributes)
{
    return (struct segment){.limit = UINT32_MAX, .selector = selector, .attributes = attributes};
}

void boot_cpu_setup(struct cpu_state *cpu, const struct boot_entry *entry)
{
    const uint16_t present = SEG_ATTR_P | SEG_ATTR_S | SEG_ATTR_G | SEG_ATTR_RW | SEG_ATTR_ACCESSED;
    bool linux64 = entry->protocol == BOOT_LINUX64;

    for (unsigned i = 0; i < SEG_COUNT; i++)
        cpu->seg[i] = flat_segment(SELECTOR_DATA, present | SEG_ATTR_DB);
    cpu->seg[SEG_CS] = flat_segment(SELECTOR_CODE, present | SEG_ATTR_CODE | (linux64 ? SEG_ATTR_L : SEG_ATTR_DB));
    cpu->tr = (struct segment){.limit = 0x67, .selector = SELECTOR_TSS, .attributes = SEG_ATTR_P | 0xB};
    cpu->gdtr = (struct descriptor_table){entry->gdt, entry->gdt_limit};
    cpu->idtr = (struct descriptor_table){0, 0}; /* any exception before the kernel has its own is fatal */
    cpu->rflags = RFLAGS_FIXED;
    memset(cpu->gpr, 0, sizeof(cpu->gpr));
    cpu->gpr[GPR_RIP] = entry->entry;
    cpu->gpr[GPR_RSP] = BOOT_GDT; /* a page or more of scratch below it */
    cpu->cr0 = CR0_PE | CR0_ET;
    cpu->cr4 = 0;
    cpu->efer = 0;
    if (linux64) {
        cpu->gpr[GPR_RSI] = entry->parameters;
        cpu->cr3 = entry->page_tables;
        cpu->cr4 |= CR4_PAE;
        cpu->efer |= EFER_LME | EFER_LMA;
        cpu->cr0 |= CR0_PG;
    } else {
        cpu->gpr[GPR_RBX] = entry->parameters;
    }
    cpu->activity = CPU_RUNNING;
}
