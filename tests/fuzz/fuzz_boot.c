/*
 * Kernel files: every loader, with the bytes as the kernel and again as a kernel that unpacks itself. Whatever they are, boot_load
 * returns, and after success the entry lies in RAM.
 */
#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "chipset/boot.h"

#define RAM_BYTES (32ull << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct physmap *memory;
    char path[32];
    int fd = memfd_create("kernel", MFD_CLOEXEC);

    if (fd < 0 || write(fd, data, size) != (ssize_t)size || physmap_create(&memory, RAM_BYTES, NULL) < 0)
        abort();
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    for (int unpack_in_guest = 0; unpack_in_guest < 2; unpack_in_guest++) {
        struct boot_config config = {.kernel_path = path, .initrd_path = path, .command_line = "a", .unpack_in_guest = unpack_in_guest};
        struct boot_entry entry;
        struct error err = {0};
        int rc = boot_load(memory, &config, &entry, &err);

        assert(rc <= 0 && rc == err.code);
        assert(rc < 0 || physmap_get(memory, entry.entry, 1, PHYSMAP_EXECUTE));
    }
    physmap_destroy(memory);
    close(fd);
    return 0;
}
