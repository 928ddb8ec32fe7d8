/*
 * See vmgenid.h. Invariant: once tables were built, guest memory at ACPI_GENERATION_ID has the same bytes, unless the guest wrote over them, which harms itself only.
 * States from before there was this device load without it: then their tables do not know it, and a renewal writes where nobody looks.
 * Threading: with the device lock held.
 */
#include "chipset/vmgenid.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "chipset/acpi.h"
#include "chipset/chipset.h"
#include "state/inputs.h"

struct vmgenid {
    struct vmgenid_config config;
};

int vmgenid_create(struct vmgenid **out, const struct vmgenid_config *config)
{
    struct vmgenid *vmgenid = calloc(1, sizeof(*vmgenid));

    if (!vmgenid)
        return -ENOMEM;
    vmgenid->config = *config;
    *out = vmgenid;
    return 0;
}

void vmgenid_destroy(struct vmgenid *vmgenid)
{
    free(vmgenid);
}

int vmgenid_state(struct vmgenid *vmgenid, struct state_io *io)
{
    struct vmgenid_guid guid = vmgenid->config.guid;

    if (!state_begin_optional(io, "vmgenid", 1))
        return state_failed(io) ? -EINVAL : 0;
    state_bytes(io, guid.bytes, sizeof(guid.bytes));
    if (!state_failed(io))
        vmgenid->config.guid = guid;
    return state_end(io);
}

const struct vmgenid_guid *vmgenid_get(const struct vmgenid *vmgenid)
{
    return &vmgenid->config.guid;
}

int vmgenid_renew(struct vmgenid *vmgenid, const struct vmgenid_guid *guid)
{
    int rc = physmap_write(vmgenid->config.memory, ACPI_GENERATION_ID, guid->bytes, sizeof(guid->bytes));

    if (rc < 0)
        return rc;
    vmgenid->config.guid = *guid;
    pm_gpe_raise(vmgenid->config.pm, CHIPSET_GPE_GENERATION);
    return 0;
}

/* ---- as text ---- */

/* Where each byte is, in pairs of digits of the text without its dashes. */
static const uint8_t order[16] = {3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15};

static bool is_dash(size_t at)
{
    return at == 8 || at == 13 || at == 18 || at == 23;
}

static unsigned digit(char character)
{
    return (unsigned)(isdigit((unsigned char)character) ? character - '0' : tolower((unsigned char)character) - 'a' + 10);
}

int vmgenid_parse(const char *text, struct vmgenid_guid *guid)
{
    struct vmgenid_guid result;
    unsigned n = 0;

    if (strlen(text) != VMGENID_TEXT_BYTES - 1)
        return -EINVAL;
    for (size_t i = 0; i < VMGENID_TEXT_BYTES - 1; i++)
        if (is_dash(i) ? text[i] != '-' : !isxdigit((unsigned char)text[i]))
            return -EINVAL;
    for (size_t i = 0; i < VMGENID_TEXT_BYTES - 1; i += is_dash(i) ? 1 : 2)
        if (!is_dash(i))
            result.bytes[order[n++]] = (uint8_t)(digit(text[i]) << 4 | digit(text[i + 1]));
    *guid = result;
    return 0;
}

void vmgenid_format(const struct vmgenid_guid *guid, char text[VMGENID_TEXT_BYTES])
{
    char *at = text;

    for (unsigned n = 0; n < sizeof(order); n++) {
        if (is_dash((size_t)(at - text)))
            *at++ = '-';
        at += sprintf(at, "%02x", guid->bytes[order[n]]);
    }
}

int vmgenid_draw(struct vmgenid_guid *guid)
{
    int rc = inputs_random(guid->bytes, sizeof(guid->bytes));

    guid->bytes[7] = (guid->bytes[7] & 0x0F) | 0x40;
    guid->bytes[8] = (guid->bytes[8] & 0x3F) | 0x80;
    return rc;
}
