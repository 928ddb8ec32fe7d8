/*
 * The kernel's command line: what the user gave, and what the configuration adds to it, because a kernel cannot find it out: its root device, and where memory-mapped
 * devices are for kernels without ACPI. Threading: none of its own.
 */
#include <stdlib.h>
#include <string.h>

#include "machine/machine_priv.h"

static bool has_word(const char *line, const char *start)
{
    size_t length = strlen(start);
    for (const char *at = line; (at = strstr(at, start)); at += length)
        if (at == line || at[-1] == ' ')
            return true;
    return false;
}

/* machine_create_devices puts the root disk first, so it is vda. A root= of the user's own wins. */
static void write_root(const struct machine_config *config, const char *given, FILE *out)
{
    for (unsigned i = 0; i < config->disk_count && !has_word(given, "root="); i++) {
        const struct disk_config *disk = &config->disk[i];
        if (!disk->root)
            continue;
        if (disk->partuuid)
            fprintf(out, " root=PARTUUID=%s", disk->partuuid);
        else
            fprintf(out, " root=/dev/vda");
        fprintf(out, " %s", disk->readonly ? "ro" : "rw");
    }
    for (unsigned i = 0; i < config->pmem_count && !has_word(given, "root="); i++)
        if (config->pmem[i].root)
            fprintf(out, " root=/dev/pmem%u %s", i, config->pmem[i].readonly ? "ro" : "rw");
}

static void write_mmio(const struct virtio_mmio_host *host, FILE *out)
{
    for (unsigned i = 0; i < host->device_count; i++)
        fprintf(out, " virtio_mmio.device=%uK@0x%llx:%u", VIRTIO_MMIO_WINDOW_BYTES >> 10, (unsigned long long)virtio_mmio_address(host, i),
                host->line[virtio_mmio_line(host, i)].pin);
}

/* What follows a "--" is for init: the additions go before it. */
char *machine_command_line(const struct machine *machine)
{
    const struct machine_config *config = machine->config;
    bool serial = !config->console || strcmp(config->console, "none") != 0;
    const char *given = config->append ? config->append : serial ? "console=ttyS0" : "";
    const char *init = strstr(given, " -- ");
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return NULL;
    fprintf(out, "%.*s", (int)(init ? init - given : (long)strlen(given)), given);
    write_root(config, given, out);
    if (config->transport == TRANSPORT_MMIO)
        write_mmio(&machine->mmio, out);
    fputs(init ? init : "", out);
    if (fclose(out)) {
        free(text);
        return NULL;
    }
    return text;
}
