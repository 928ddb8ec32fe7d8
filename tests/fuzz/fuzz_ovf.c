/* Fuzz target: descriptors of appliances. Checks that what comes out is within the bounds that importers rely on. */
#include <stdlib.h>
#include <string.h>

#include "control/ovf.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes)
{
    struct ovf ovf;
    struct error err = {0};
    char *text = malloc(size_bytes ? size_bytes : 1); /* with nothing behind it */
    if (!text)
        return 0;
    memcpy(text, data, size_bytes);
    int r = ovf_parse(&ovf, text, size_bytes, &err);
    free(text);
    if (r) {
        if (!err.text[0])
            abort();
        return 0;
    }
    if (ovf.disk_count > OVF_DISKS_MAX || ovf.net_count > OVF_NETS_MAX || ovf.cpus > 1024)
        abort();
    for (unsigned i = 0; i < ovf.disk_count; i++) {
        const char *name = ovf.disk[i].file;
        if (strnlen(name, OVF_TEXT_BYTES) == OVF_TEXT_BYTES || strchr(name, '/') || name[0] == '.' || (!name[0] && (!ovf.disk[i].capacity_bytes || ovf.disk[i].capacity_bytes % 512)))
            abort();
    }
    return 0;
}
