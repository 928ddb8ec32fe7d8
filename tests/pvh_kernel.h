/* An ELF kernel for tests: one segment of the caller's code at 1 MiB, and the note with the PVH entry, which enters it in 32-bit protected mode. */
#ifndef DOPPEL_TESTS_PVH_KERNEL_H
#define DOPPEL_TESTS_PVH_KERNEL_H

#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef PF_W /* the page-fault bit of arch/cpu.h, not ELF's */

#define PVH_KERNEL_ENTRY 0x100000u
#define PVH_KERNEL_CODE_BYTES 128u

static inline void pvh_kernel_write(const char *path, const void *code, size_t code_bytes)
{
    struct {
        Elf64_Ehdr header;
        Elf64_Phdr segment[2];
        Elf64_Nhdr note;
        char name[4];
        uint64_t entry;
        uint8_t code[PVH_KERNEL_CODE_BYTES];
    } file = {
        .header = {.e_ident = {ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS64, ELFDATA2LSB, EV_CURRENT},
                   .e_type = ET_EXEC,
                   .e_machine = EM_X86_64,
                   .e_version = EV_CURRENT,
                   .e_entry = PVH_KERNEL_ENTRY,
                   .e_ehsize = sizeof(Elf64_Ehdr),
                   .e_phoff = sizeof(Elf64_Ehdr),
                   .e_phentsize = sizeof(Elf64_Phdr),
                   .e_phnum = 2},
        .note = {.n_namesz = 4, .n_descsz = 8, .n_type = 18},
        .name = "Xen",
        .entry = PVH_KERNEL_ENTRY,
    };
    file.segment[0] = (Elf64_Phdr){.p_type = PT_LOAD, .p_flags = PF_R, .p_offset = (uint64_t)((char *)file.code - (char *)&file),
                                   .p_paddr = PVH_KERNEL_ENTRY, .p_vaddr = PVH_KERNEL_ENTRY, .p_filesz = sizeof file.code, .p_memsz = sizeof file.code};
    file.segment[1] = (Elf64_Phdr){.p_type = PT_NOTE, .p_offset = (uint64_t)((char *)&file.note - (char *)&file), .p_filesz = 24, .p_memsz = 24};
    if (code_bytes > sizeof file.code)
        abort();
    memcpy(file.code, code, code_bytes);
    FILE *out = fopen(path, "we");
    if (!out || fwrite(&file, sizeof file, 1, out) != 1 || fclose(out))
        abort();
}

#endif
