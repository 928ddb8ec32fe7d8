/* Boot loaders: crafted kernels of every kind, good and damaged, what ends up in memory, what the messages say. */
#include <elf.h>
#include <errno.h>
#include <libdeflate.h>
#include <lz4.h>
#include <lzma.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zstd.h>

#undef PF_W

#include <cmocka.h>

#include "chipset/boot.h"

#define RAM (64ull << 20)
#define LOAD 0x1000000ull
#define SETUP_BYTES 1024u
#define CODE_BYTES 2048u

struct fixture {
    struct physmap *memory;
    struct boot_entry entry;
    struct error err;
};

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    assert_int_equal(physmap_create(&f->memory, RAM, NULL), 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    physmap_destroy(f->memory);
    free(f);
    return 0;
}

struct file {
    uint8_t bytes[65536];
    size_t size;
};

/* Runs boot_load over bytes, by way of a file that has no name. */
static int load_file(struct fixture *f, const struct file *kernel, struct boot_config config)
{
    char path[32];
    int fd = memfd_create("kernel", 0), rc;

    assert_true(fd >= 0 && write(fd, kernel->bytes, kernel->size) == (ssize_t)kernel->size);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    config.kernel_path = path;
    f->err = (struct error){0};
    rc = boot_load(f->memory, &config, &f->entry, &f->err);
    assert_int_equal(rc, f->err.code);
    assert_null(strchr(f->err.text, '\n'));
    close(fd);
    return rc;
}

/* The same where only the kernel can be at fault: the message must name it. */
static int load(struct fixture *f, const struct file *kernel, struct boot_config config)
{
    int rc = load_file(f, kernel, config);

    assert_true(rc == 0 || strstr(f->err.text, "/proc/self/fd/"));
    return rc;
}

static void fails(struct fixture *f, const struct file *kernel, const char *word)
{
    assert_true(load(f, kernel, (struct boot_config){0}) < 0);
    if (!strstr(f->err.text, word))
        fail_msg("'%s' does not say '%s'", f->err.text, word);
}

static uint64_t get(struct fixture *f, uint64_t address, unsigned size)
{
    uint64_t value = 0;

    assert_int_equal(physmap_read(f->memory, address, &value, size), 0);
    return value;
}

static void put(struct file *file, size_t offset, uint64_t value, unsigned size)
{
    memcpy(file->bytes + offset, &value, size);
    if (file->size < offset + size)
        file->size = offset + size;
}

/* An ELF64 executable: one loaded segment of code with some bss, and with `note` a PVH entry. */
static struct file make_elf(bool note)
{
    struct file file = {.size = 0x1000 + CODE_BYTES};
    Elf64_Ehdr header = {
        .e_ident = {0x7F, 'E', 'L', 'F', ELFCLASS64, ELFDATA2LSB, EV_CURRENT},
        .e_type = ET_EXEC,
        .e_machine = EM_X86_64,
        .e_entry = LOAD + 0x100,
        .e_phoff = sizeof(header),
        .e_phentsize = sizeof(Elf64_Phdr),
        .e_phnum = note ? 2 : 1,
    };
    Elf64_Phdr segments[2] = {
        {.p_type = PT_LOAD, .p_offset = 0x1000, .p_paddr = LOAD, .p_filesz = CODE_BYTES, .p_memsz = CODE_BYTES + 0x3000},
        {.p_type = PT_NOTE, .p_offset = 0x800, .p_filesz = 0x40, .p_memsz = 0x40},
    };

    memcpy(file.bytes, &header, sizeof(header));
    memcpy(file.bytes + sizeof(header), segments, sizeof(segments));
    put(&file, 0x800, 6, 4); /* another note first */
    put(&file, 0x804, 1, 4);
    memcpy(file.bytes + 0x80C, "Other", 6);
    put(&file, 0x818, 4, 4);
    put(&file, 0x81C, 8, 4);
    put(&file, 0x820, 18, 4);
    memcpy(file.bytes + 0x824, "Xen", 4);
    put(&file, 0x828, LOAD + 0x200, 8);
    memset(file.bytes + 0x1000, 0x90, CODE_BYTES);
    return file;
}

static struct file make_bzimage(const uint8_t *payload, size_t payload_size)
{
    struct file file = {.size = SETUP_BYTES + 0x400 + payload_size};

    put(&file, 0x1F1, 1, 1);
    put(&file, 0x1F4, (file.size - SETUP_BYTES + 15) / 16, 4);
    put(&file, 0x1FE, 0xAA55, 2);
    put(&file, 0x201, 0x66, 1);
    memcpy(file.bytes + 0x202, "HdrS", 4);
    put(&file, 0x206, 0x20F, 2);
    put(&file, 0x211, 1, 1);
    put(&file, 0x22C, 0x7FFFFFFF, 4);
    put(&file, 0x234, 1, 1);
    put(&file, 0x236, 1, 2);
    put(&file, 0x238, 100, 4);
    put(&file, 0x248, 0x400, 4);
    put(&file, 0x24C, payload_size, 4);
    put(&file, 0x258, LOAD, 8);
    put(&file, 0x260, 0x100000, 4);
    memset(file.bytes + SETUP_BYTES, 0xCC, 0x400);
    if (payload)
        memcpy(file.bytes + SETUP_BYTES + 0x400, payload, payload_size);
    return file;
}

static void test_packed_in_guest(void **state)
{
    struct fixture *f = *state;
    struct file file = make_bzimage((const uint8_t *)"unknown format", 14);

    assert_int_equal(load(f, &file, (struct boot_config){.command_line = "quiet", .rsdp = 0xE0000}), 0);
    assert_int_equal(f->entry.protocol, BOOT_LINUX64);
    assert_true(f->entry.entry == LOAD + 0x200);
    assert_int_equal(get(f, LOAD + 0x200, 1), 0xCC);
    assert_int_equal(get(f, f->entry.parameters + 0x210, 1), 0xFF);
    assert_int_equal(get(f, f->entry.parameters + 0x202, 4), 0x53726448);
    assert_int_equal(get(f, f->entry.parameters + 0x70, 8), 0xE0000);
    assert_int_equal(get(f, f->entry.parameters + 0x1EF, 1), 0);
    assert_true(get(f, f->entry.parameters + 0x1E8, 1) >= 5);
    assert_memory_equal(physmap_get(f->memory, get(f, f->entry.parameters + 0x228, 4), 6, PHYSMAP_READ), "quiet", 6);
    /* PML4 -> PDPT -> PD -> 2 MiB page */
    assert_int_equal(get(f, (get(f, (get(f, f->entry.page_tables, 8) & ~0xFFFull) + 8, 8) & ~0xFFFull) + 8, 8), 0x40200083);
}

static size_t pack_gzip(const struct file *from, uint8_t *to, size_t room)
{
    struct libdeflate_compressor *compressor = libdeflate_alloc_compressor(9);
    size_t used = libdeflate_gzip_compress(compressor, from->bytes, from->size, to, room);

    libdeflate_free_compressor(compressor);
    assert_true(used > 0);
    return used;
}

static size_t append_size(uint8_t *to, size_t packed, size_t size)
{
    uint32_t value = (uint32_t)size;

    memcpy(to + packed, &value, 4);
    return packed + 4;
}

static size_t pack_xz(const struct file *from, uint8_t *to, size_t room)
{
    lzma_options_lzma options;
    lzma_filter filters[] = {{LZMA_FILTER_X86, NULL}, {LZMA_FILTER_LZMA2, &options}, {LZMA_VLI_UNKNOWN, NULL}};
    size_t used = 0;

    lzma_lzma_preset(&options, 1);
    assert_int_equal(lzma_stream_buffer_encode(filters, LZMA_CHECK_CRC32, NULL, from->bytes, from->size, to, &used, room), LZMA_OK);
    return append_size(to, used, from->size);
}

static size_t pack_zstd(const struct file *from, uint8_t *to, size_t room)
{
    size_t used = ZSTD_compress(to, room, from->bytes, from->size, 1);

    assert_false(ZSTD_isError(used));
    return append_size(to, used, from->size);
}

static size_t pack_lz4(const struct file *from, uint8_t *to, size_t room)
{
    uint32_t magic = 0x184C2102, block = (uint32_t)LZ4_compress_default((const char *)from->bytes, (char *)to + 8, (int)from->size, (int)room - 8);

    memcpy(to, &magic, 4);
    memcpy(to + 4, &block, 4);
    return append_size(to, 8 + block, from->size);
}

static size_t pack_none(const struct file *from, uint8_t *to, size_t room)
{
    memcpy(to, from->bytes, from->size);
    return from->size;
}

static size_t (*const packers[])(const struct file *, uint8_t *, size_t) = {pack_gzip, pack_xz, pack_zstd, pack_lz4, pack_none};

static void test_unpacked(void **state)
{
    struct fixture *f = *state;
    struct file elf = make_elf(true), file;
    static uint8_t packed[32768];

    for (unsigned i = 0; i < sizeof(packers) / sizeof(packers[0]); i++) {
        size_t size = packers[i](&elf, packed, sizeof(packed));

        file = make_bzimage(packed, size);
        physmap_zero(f->memory);
        assert_int_equal(physmap_write(f->memory, LOAD + CODE_BYTES + 5, "dirt", 4), 0);
        assert_int_equal(load(f, &file, (struct boot_config){.rsdp = 0xE0000}), 0);
        assert_int_equal(f->entry.protocol, BOOT_LINUX64);
        assert_true(f->entry.entry == LOAD + 0x100);
        assert_int_equal(get(f, LOAD + CODE_BYTES - 1, 1), 0x90);
        assert_int_equal(get(f, LOAD + CODE_BYTES + 5, 4), 0); /* bss is cleared */
        assert_int_equal(load(f, &file, (struct boot_config){.unpack_in_guest = true}), 0);
        assert_true(f->entry.entry == LOAD + 0x200);
        if (packers[i] == pack_none)
            continue;
        file.bytes[SETUP_BYTES + 0x400 + size / 2] ^= 0xFF;
        file.bytes[SETUP_BYTES + 0x400 + size / 3] ^= 0xFF;
        if (load(f, &file, (struct boot_config){0}) < 0)
            assert_non_null(strstr(f->err.text, "damaged"));
        file = make_bzimage(packed, size);
        put(&file, SETUP_BYTES + 0x400 + size - 4, 0xFFFFFFF0, 4); /* claims 4 GiB */
        fails(f, &file, "give it at least");
        put(&file, SETUP_BYTES + 0x400 + size - 4, 100, 4); /* claims too little */
        fails(f, &file, "damaged");
    }
}

static void test_bad_bzimage(void **state)
{
    struct fixture *f = *state;
    struct file file = make_bzimage(NULL, 4096);

    file.size = SETUP_BYTES + 100;
    fails(f, &file, "truncated");
    file.size = 0x230;
    fails(f, &file, "truncated");
    file = make_bzimage(NULL, 4096);
    put(&file, 0x206, 0x20A, 2);
    fails(f, &file, "2.10");
    file = make_bzimage(NULL, 4096);
    put(&file, 0x236, 0, 2);
    fails(f, &file, "32-bit");
    file = make_bzimage(NULL, 4096);
    put(&file, 0x24C, 0xFFFFFFFF, 4);
    fails(f, &file, "truncated");
    file = make_bzimage(NULL, 4096);
    put(&file, 0x260, 0xFFFFFFFF, 4);
    fails(f, &file, "give it at least");
    file = make_bzimage(NULL, 4096);
    put(&file, 0x258, UINT64_MAX - 5, 8);
    fails(f, &file, "damaged");
    file = make_bzimage(NULL, 4096);
    put(&file, 0x258, 0x7000, 8);
    fails(f, &file, "damaged");
}

static void test_command_line_length(void **state)
{
    struct fixture *f = *state;
    struct file file = make_bzimage(NULL, 4096);
    char text[102];

    memset(text, 'x', sizeof(text));
    text[100] = '\0';
    assert_int_equal(load(f, &file, (struct boot_config){.command_line = text}), 0);
    text[100] = 'x';
    text[101] = '\0';
    assert_int_equal(load(f, &file, (struct boot_config){.command_line = text}), -E2BIG);
}

static void test_elf(void **state)
{
    struct fixture *f = *state;
    struct file file = make_elf(false);

    assert_int_equal(load(f, &file, (struct boot_config){.command_line = "a", .rsdp = 0xE0000}), 0);
    assert_int_equal(f->entry.protocol, BOOT_LINUX64);
    assert_true(f->entry.entry == LOAD + 0x100);
    assert_int_equal(get(f, f->entry.parameters + 0x202, 4), 0x53726448);
}

static void test_pvh(void **state)
{
    struct fixture *f = *state;
    struct file file = make_elf(true);
    uint64_t info;

    assert_int_equal(load(f, &file, (struct boot_config){.command_line = "a b", .rsdp = 0xE0000}), 0);
    assert_int_equal(f->entry.protocol, BOOT_PVH);
    assert_true(f->entry.entry == LOAD + 0x200);
    info = f->entry.parameters;
    assert_int_equal(get(f, info, 4), 0x336EC578);
    assert_int_equal(get(f, info + 4, 4), 1);
    assert_int_equal(get(f, info + 12, 4), 0);
    assert_memory_equal(physmap_get(f->memory, get(f, info + 24, 8), 4, PHYSMAP_READ), "a b", 4);
    assert_int_equal(get(f, info + 32, 8), 0xE0000);
    assert_int_equal(get(f, get(f, info + 40, 8) + 16, 4), 1);
    assert_true(get(f, info + 48, 4) >= 5);
    file.bytes[0x82B] = 0xFF; /* entry outside what is loaded */
    fails(f, &file, "damaged");
}

static void test_bad_elf(void **state)
{
    struct fixture *f = *state;
    const size_t phdr = sizeof(Elf64_Ehdr);
    struct file file = make_elf(false);

    put(&file, phdr + offsetof(Elf64_Phdr, p_filesz), UINT64_MAX, 8);
    fails(f, &file, "damaged");
    file = make_elf(false);
    put(&file, phdr + offsetof(Elf64_Phdr, p_offset), UINT64_MAX - 10, 8);
    fails(f, &file, "damaged");
    file = make_elf(false);
    put(&file, phdr + offsetof(Elf64_Phdr, p_memsz), UINT64_MAX - 10, 8);
    fails(f, &file, "not a kernel for this machine");
    file = make_elf(false);
    put(&file, phdr + offsetof(Elf64_Phdr, p_paddr), 0x1000, 8);
    fails(f, &file, "not a kernel for this machine");
    file = make_elf(false);
    put(&file, phdr + offsetof(Elf64_Phdr, p_memsz), 1 << 30, 8);
    fails(f, &file, "give it at least 1040 MiB");
    file = make_elf(false);
    put(&file, offsetof(Elf64_Ehdr, e_phoff), UINT64_MAX - 3, 8);
    fails(f, &file, "damaged");
    file = make_elf(false);
    put(&file, offsetof(Elf64_Ehdr, e_phnum), 0xFFFF, 2);
    fails(f, &file, "damaged");
    file = make_elf(false);
    put(&file, offsetof(Elf64_Ehdr, e_type), ET_DYN, 2);
    fails(f, &file, "program");
    file = make_elf(false);
    put(&file, offsetof(Elf64_Ehdr, e_machine), EM_AARCH64, 2);
    fails(f, &file, "not a kernel");
    file = make_elf(false);
    put(&file, offsetof(Elf64_Ehdr, e_entry), LOAD - 1, 8);
    fails(f, &file, "damaged");
    file.size = 60;
    fails(f, &file, "damaged");
    file = make_elf(true);
    put(&file, 0x800, UINT32_MAX - 1, 4); /* note with an endless name: no PVH entry is found */
    assert_int_equal(load(f, &file, (struct boot_config){0}), 0);
    assert_int_equal(f->entry.protocol, BOOT_LINUX64);
}

static void test_foreign_files(void **state)
{
    struct fixture *f = *state;
    struct file file = {.bytes = "#!/bin/sh\n", .size = 10};

    fails(f, &file, "not a kernel");
    file.size = 0;
    fails(f, &file, "not a kernel");
    assert_int_equal(boot_load(f->memory, &(struct boot_config){.kernel_path = "/nowhere/vmlinuz"}, &f->entry, &f->err), -ENOENT);
    assert_non_null(strstr(f->err.text, "/nowhere/vmlinuz"));
    assert_int_equal(boot_load(f->memory, &(struct boot_config){.kernel_path = "/dev/zero"}, &f->entry, &f->err), -EINVAL);
    assert_int_equal(boot_load(f->memory, &(struct boot_config){.kernel_path = "/dev/zero"}, &f->entry, NULL), -EINVAL);
}

static void test_initrd(void **state)
{
    struct fixture *f = *state;
    struct file kernels[] = {make_elf(false), make_elf(true)};
    struct boot_config config = {0};
    uint64_t base, size = 5 * 4096 + 7;
    int fd = memfd_create("initrd", 0);
    char path[32];

    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)size), 0);
    assert_int_equal(pwrite(fd, "tail", 4, (off_t)size - 4), 4);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    config.initrd_path = path;
    assert_int_equal(load(f, &kernels[0], config), 0);
    base = get(f, f->entry.parameters + 0x218, 4);
    assert_true(base % 4096 == 0 && base + size <= RAM);
    assert_int_equal(get(f, f->entry.parameters + 0x21C, 4), size);
    assert_memory_equal(physmap_get(f->memory, base + size - 4, 4, PHYSMAP_READ), "tail", 4);
    assert_int_equal(load(f, &kernels[1], config), 0);
    assert_int_equal(get(f, f->entry.parameters + 12, 4), 1);
    assert_true(get(f, get(f, f->entry.parameters + 16, 8), 8) == base);
    assert_true(get(f, get(f, f->entry.parameters + 16, 8) + 8, 8) == size);

    assert_int_equal(ftruncate(fd, RAM - (16 << 20)), 0);
    assert_int_equal(load_file(f, &kernels[0], config), -ENOMEM);
    assert_non_null(strstr(f->err.text, path));
    assert_non_null(strstr(f->err.text, "MiB"));
    close(fd);
}

static void test_cpu(void **state)
{
    struct boot_entry linux64 = {BOOT_LINUX64, LOAD, 0x7000, 0x9000, 0x5000, 47};
    struct boot_entry pvh = {BOOT_PVH, LOAD, 0x6000, 0, 0x5000, 47};
    static struct cpu_state cpu;

    boot_cpu_setup(&cpu, &linux64);
    assert_true(cpu_in_64bit_mode(&cpu));
    assert_true(cpu.gpr[GPR_RIP] == LOAD && cpu.gpr[GPR_RSI] == 0x7000 && cpu.cr3 == 0x9000);
    assert_true((cpu.cr0 & CR0_PG) && (cpu.cr4 & CR4_PAE) && !(cpu.rflags & RFLAGS_IF));
    assert_int_equal(cpu.seg[SEG_CS].selector, 0x10);
    boot_cpu_setup(&cpu, &pvh);
    assert_false(cpu_in_long_mode(&cpu));
    assert_true(cpu.gpr[GPR_RBX] == 0x6000 && cpu.cr4 == 0 && cpu.cr0 == (CR0_PE | CR0_ET));
    assert_int_equal(cpu.seg[SEG_CS].attributes & (SEG_ATTR_DB | SEG_ATTR_L), SEG_ATTR_DB);
}

static void test_random_damage(void **state)
{
    struct fixture *f = *state;
    struct file good[3] = {make_elf(true), make_elf(false), make_bzimage(NULL, 4096)}, bad;

    srand(17);
    for (unsigned i = 0; i < 600; i++) {
        bad = good[i % 3];
        for (int k = rand() % 8; k >= 0; k--)
            bad.bytes[rand() % 0x280] = (uint8_t)rand();
        if (rand() % 4 == 0)
            bad.size = (size_t)rand() % bad.size;
        (void)load(f, &bad, (struct boot_config){0});
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_packed_in_guest), TEST(test_unpacked), TEST(test_bad_bzimage),   TEST(test_command_line_length), TEST(test_elf),
        TEST(test_pvh),             TEST(test_bad_elf),  TEST(test_foreign_files), TEST(test_initrd),              TEST(test_cpu),
        TEST(test_random_damage),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
