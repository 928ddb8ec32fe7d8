/*
 * ELF kernels (System V ABI, chapters 4 and 5): segments go to their physical addresses. With a Xen note XEN_ELFNOTE_PHYS32_ENTRY they start by
 * PVH (Xen docs/misc/pvh.pandoc): 32-bit protected mode, EBX = hvm_start_info. Without, an ELF64 is taken for a Linux vmlinux.
 *
 * Invariants: program headers are copied once and checked before use. Threading: none.
 */
#include <elf.h>
#include <errno.h>
#include <inttypes.h>

#undef PF_W /* the segment flag; arch/cpu.h has a page-fault bit of this name */

#include "chipset/boot_priv.h"
#include "chipset/e820.h"

#define SEGMENTS_MAX 128
#define COMMAND_LINE_MAX 2047        /* of every x86 Linux */
#define INITRD_LIMIT 0x80000000ull   /* what Linux reports as initrd_addr_max, plus one */
#define XEN_ELFNOTE_PHYS32_ENTRY 18

#define PVH_MAGIC 0x336EC578u
#define PVH_VERSION 1

struct pvh_start_info {
    uint32_t magic, version, flags, module_count;
    uint64_t modules, command_line, rsdp, memory_map;
    uint32_t memory_map_count, reserved;
};

struct pvh_module {
    uint64_t base, size_bytes, command_line, reserved;
};

struct pvh_memory {
    uint64_t base, length_bytes;
    uint32_t type, reserved;
};

struct pvh_page {
    struct pvh_start_info info;
    struct pvh_module module;
    struct pvh_memory memory[E820_MAX];
};

/* What is needed of an ELF file, the same for both classes. */
struct elf {
    uint16_t type;
    uint64_t entry;
    unsigned count;
    Elf64_Phdr segments[SEGMENTS_MAX];
};

static bool identify(const struct image *image, uint8_t class, uint16_t machine)
{
    return image_has(image, 0, sizeof(Elf32_Ehdr)) && memcmp(image->bytes, ELFMAG, SELFMAG) == 0 &&
           image->bytes[EI_CLASS] == class && image->bytes[EI_DATA] == ELFDATA2LSB &&
           image_u16(image, offsetof(Elf32_Ehdr, e_machine)) == machine;
}

bool boot_is_elf64(const struct image *image)
{
    return identify(image, ELFCLASS64, EM_X86_64);
}

static bool read_headers64(const struct image *image, struct elf *elf)
{
    Elf64_Ehdr header;

    if (!image_has(image, 0, sizeof(header)))
        return false;
    memcpy(&header, image->bytes, sizeof(header));
    if (header.e_phentsize != sizeof(Elf64_Phdr) || header.e_phnum > SEGMENTS_MAX ||
        !image_has(image, header.e_phoff, header.e_phnum * sizeof(Elf64_Phdr)))
        return false;
    elf->type = header.e_type;
    elf->entry = header.e_entry;
    elf->count = header.e_phnum;
    memcpy(elf->segments, image->bytes + header.e_phoff, header.e_phnum * sizeof(Elf64_Phdr));
    return true;
}

static bool read_headers32(const struct image *image, struct elf *elf)
{
    Elf32_Ehdr header;

    memcpy(&header, image->bytes, sizeof(header));
    if (header.e_phentsize != sizeof(Elf32_Phdr) || header.e_phnum > SEGMENTS_MAX ||
        !image_has(image, header.e_phoff, header.e_phnum * sizeof(Elf32_Phdr)))
        return false;
    elf->type = header.e_type;
    elf->entry = header.e_entry;
    elf->count = header.e_phnum;
    for (unsigned i = 0; i < header.e_phnum; i++) {
        Elf32_Phdr segment;

        memcpy(&segment, image->bytes + header.e_phoff + i * sizeof(segment), sizeof(segment));
        elf->segments[i] = (Elf64_Phdr){
            .p_type = segment.p_type,
            .p_offset = segment.p_offset,
            .p_paddr = segment.p_paddr,
            .p_filesz = segment.p_filesz,
            .p_memsz = segment.p_memsz,
            .p_align = segment.p_align,
        };
    }
    return true;
}

static int damaged(struct boot_context *boot)
{
    return error_set(boot->err, -EINVAL, "ELF kernel '%s' is truncated or damaged: get a complete copy", boot->config->kernel_path);
}

static int load_segment(struct boot_context *boot, const struct image *image, const Elf64_Phdr *segment)
{
    uint64_t low = physmap_low_bytes(boot->memory), base = segment->p_paddr, size = segment->p_memsz;
    uint8_t *to;

    if (segment->p_filesz > size || !image_has(image, segment->p_offset, segment->p_filesz))
        return damaged(boot);
    if (base < BOOT_LOW_END || base >= PHYSMAP_LOW_LIMIT || size > PHYSMAP_LOW_LIMIT - base)
        return error_set(boot->err, -EINVAL,
                         "ELF file '%s' wants to be loaded at physical address 0x%" PRIx64
                         ", outside 1 MiB to 3 GiB: it is not a kernel for this machine",
                         boot->config->kernel_path, base);
    if (base > low || size > low - base)
        return boot_too_small(boot, "kernel", base + size);
    to = physmap_get(boot->memory, base, size, PHYSMAP_WRITE);
    if (!to)
        return -EFAULT;
    memcpy(to, image->bytes + segment->p_offset, segment->p_filesz);
    memset(to + segment->p_filesz, 0, size - segment->p_filesz);
    physmap_mark_dirty(boot->memory, base, size);
    if (base + size > boot->kernel_end)
        boot->kernel_end = base + size;
    return 0;
}

static int load_segments(struct boot_context *boot, const struct image *image, const struct elf *elf)
{
    boot->kernel_end = 0;
    for (unsigned i = 0; i < elf->count; i++) {
        const Elf64_Phdr *segment = &elf->segments[i];
        int rc = segment->p_type == PT_LOAD && segment->p_memsz ? load_segment(boot, image, segment) : 0;

        if (rc < 0)
            return rc;
    }
    return boot->kernel_end ? 0 : damaged(boot);
}

/* Whether a segment that is loaded has this physical address. */
static bool is_loaded(const struct elf *elf, uint64_t address)
{
    for (unsigned i = 0; i < elf->count; i++) {
        const Elf64_Phdr *segment = &elf->segments[i];

        if (segment->p_type == PT_LOAD && address >= segment->p_paddr && address - segment->p_paddr < segment->p_memsz)
            return true;
    }
    return false;
}

int boot_elf_load(struct boot_context *boot, const struct image *image, uint64_t *entry)
{
    struct elf elf;
    int rc;

    if (!read_headers64(image, &elf))
        return damaged(boot);
    rc = load_segments(boot, image, &elf);
    if (rc < 0)
        return rc;
    *entry = elf.entry;
    return is_loaded(&elf, elf.entry) ? 0 : damaged(boot);
}

static uint64_t padded(uint32_t size_bytes)
{
    return ((uint64_t)size_bytes + 3) & ~3ull;
}

/* The 32-bit entry point in the notes of one segment; false when there is none. */
static bool find_pvh_note(const struct image *image, const Elf64_Phdr *segment, uint64_t *entry)
{
    uint64_t at = 0;
    struct image notes;

    if (!image_has(image, segment->p_offset, segment->p_filesz))
        return false;
    notes = (struct image){image->bytes + segment->p_offset, segment->p_filesz};
    while (image_has(&notes, at, sizeof(Elf64_Nhdr))) {
        uint32_t name_bytes = image_u32(&notes, at), desc_bytes = image_u32(&notes, at + 4), type = image_u32(&notes, at + 8);
        uint64_t name = at + sizeof(Elf64_Nhdr), desc = name + padded(name_bytes);

        if (!image_has(&notes, name, padded(name_bytes)) || !image_has(&notes, desc, desc_bytes))
            return false;
        if (type == XEN_ELFNOTE_PHYS32_ENTRY && name_bytes == 4 && memcmp(notes.bytes + name, "Xen", 4) == 0 &&
            (desc_bytes == 4 || desc_bytes == 8)) {
            *entry = desc_bytes == 4 ? image_u32(&notes, desc) : image_u64(&notes, desc);
            return true;
        }
        at = desc + padded(desc_bytes);
    }
    return false;
}

static bool find_pvh_entry(const struct image *image, const struct elf *elf, uint64_t *entry)
{
    for (unsigned i = 0; i < elf->count; i++) {
        if (elf->segments[i].p_type == PT_NOTE && find_pvh_note(image, &elf->segments[i], entry))
            return true;
    }
    return false;
}

static int write_pvh_page(struct boot_context *boot)
{
    struct e820_entry entries[E820_MAX];
    struct pvh_page page = {
        .info = {
            .magic = PVH_MAGIC,
            .version = PVH_VERSION,
            .command_line = BOOT_COMMAND_LINE,
            .rsdp = boot->config->rsdp,
            .memory_map = BOOT_PVH_INFO + offsetof(struct pvh_page, memory),
            .memory_map_count = e820_build(boot->memory, entries),
        },
    };

    if (boot->initrd_bytes) {
        page.info.module_count = 1;
        page.info.modules = BOOT_PVH_INFO + offsetof(struct pvh_page, module);
        page.module = (struct pvh_module){.base = boot->initrd_base, .size_bytes = boot->initrd_bytes};
    }
    for (unsigned i = 0; i < page.info.memory_map_count; i++)
        page.memory[i] = (struct pvh_memory){entries[i].base, entries[i].length_bytes, entries[i].type, 0};
    return physmap_write(boot->memory, BOOT_PVH_INFO, &page, sizeof(page));
}

static int start_pvh(struct boot_context *boot, const struct image *image, const struct elf *elf, uint64_t entry)
{
    int rc = load_segments(boot, image, elf);

    if (rc == 0 && !is_loaded(elf, entry))
        rc = damaged(boot);
    if (rc == 0)
        rc = boot_load_initrd(boot);
    if (rc == 0)
        rc = boot_write_command_line(boot, COMMAND_LINE_MAX);
    if (rc == 0)
        rc = boot_write_pvh_gdt(boot);
    boot->entry->protocol = BOOT_PVH;
    boot->entry->entry = entry;
    boot->entry->parameters = BOOT_PVH_INFO;
    return rc < 0 ? rc : write_pvh_page(boot);
}

static bool is_program(const struct elf *elf)
{
    for (unsigned i = 0; i < elf->count; i++) {
        if (elf->segments[i].p_type == PT_INTERP)
            return true;
    }
    return elf->type != ET_EXEC;
}

int boot_elf(struct boot_context *boot, const struct image *image)
{
    bool is64 = boot_is_elf64(image), is32 = identify(image, ELFCLASS32, EM_386);
    const char *path = boot->config->kernel_path;
    uint64_t entry;
    struct elf elf;
    int rc;

    if (!is64 && !is32)
        return -ENOEXEC;
    if (is64 ? !read_headers64(image, &elf) : !read_headers32(image, &elf))
        return damaged(boot);
    boot->initrd_limit = INITRD_LIMIT;
    if (find_pvh_entry(image, &elf, &entry))
        return start_pvh(boot, image, &elf, entry);
    if (is32)
        return error_set(boot->err, -EINVAL, "ELF file '%s' is 32-bit and has no PVH entry: a 64-bit Linux kernel or a PVH kernel is needed",
                         path);
    if (is_program(&elf))
        return error_set(boot->err, -EINVAL, "ELF file '%s' is a program or library, not a kernel: give a vmlinuz or vmlinux", path);
    rc = boot_elf_load(boot, image, &entry);
    return rc < 0 ? rc : boot_linux_start(boot, NULL, entry, COMMAND_LINE_MAX);
}
