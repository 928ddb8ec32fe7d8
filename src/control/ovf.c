/*
 * Descriptors of appliances (ovf.h). The text is read by GLib's markup parser, which knows neither entities of one's own nor other files. Prefixes of names are passed over.
 *
 * Invariant: what the parser meets goes into lists of fixed sizes; what it means is found when all of it is there.
 * Threading: none.
 */
#include "control/ovf.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util/glib_library.h"


#define DEPTH_MAX 64u

/* Types of resources (CIM_ResourceAllocationSettingData). */
enum { RESOURCE_PROCESSOR = 3, RESOURCE_MEMORY = 4, RESOURCE_ETHERNET = 10, RESOURCE_CD = 15, RESOURCE_DVD = 16, RESOURCE_DISK = 17 };

struct file {
    char id[OVF_TEXT_BYTES], name[OVF_TEXT_BYTES];
};

struct disk {
    char id[OVF_TEXT_BYTES], file_id[OVF_TEXT_BYTES];
    uint64_t capacity_bytes;
};

/* One of the hardware; of the texts in it those that matter. */
struct item {
    char type[OVF_TEXT_BYTES], quantity[OVF_TEXT_BYTES], units[OVF_TEXT_BYTES], resource[OVF_TEXT_BYTES];
};

struct reading {
    struct error *err;
    bool failed;
    unsigned depth, systems;
    struct file file[OVF_LIST_MAX];
    struct disk disk[OVF_LIST_MAX];
    struct item item[OVF_LIST_MAX];
    unsigned file_count, disk_count, item_count;
    struct item *open; /* the one that texts belong to; NULL: none */
    char *text;        /* where the next text goes; NULL: nowhere */
    char name[OVF_TEXT_BYTES];
};

static void fail(struct reading *r, int code, const char *what, const char *which)
{
    if (!r->failed)
        error_set(r->err, code, "%s%s%s", what, which[0] ? ": " : "", which);
    r->failed = true;
}

static const char *local_name(const char *name)
{
    const char *colon = strrchr(name, ':');
    return colon ? colon + 1 : name;
}

/* The attribute's text, "" without one. */
static void copy_attribute(struct reading *r, const char **names, const char **values, const char *wanted, char text[OVF_TEXT_BYTES])
{
    text[0] = '\0';
    for (unsigned i = 0; names[i]; i++) {
        if (strcmp(local_name(names[i]), wanted) != 0)
            continue;
        if (strlen(values[i]) >= OVF_TEXT_BYTES)
            fail(r, -E2BIG, "a text in it is too long", wanted);
        snprintf(text, OVF_TEXT_BYTES, "%s", values[i]);
    }
}

/* ---- numbers ---- */

static bool parse_number(const char *text, uint64_t *number)
{
    char *end;
    while (g_ascii_isspace(*text))
        text++;
    errno = 0;
    *number = g_ascii_isdigit(*text) ? strtoull(text, &end, 10) : 0;
    if (!g_ascii_isdigit(*text) || errno)
        return false;
    while (g_ascii_isspace(*end))
        end++;
    return !*end;
}

/* "byte * 2^20" (DSP0004, programmatic units), or as older ones have it. Without any: `usual`. */
static bool parse_units(const char *text, unsigned usual, unsigned *shift)
{
    static const struct {
        const char *name;
        unsigned shift;
    } old[] = {{"byte", 0}, {"bytes", 0}, {"kilobytes", 10}, {"kb", 10}, {"megabytes", 20}, {"mb", 20}, {"gigabytes", 30}, {"gb", 30}};
    char plain[OVF_TEXT_BYTES];
    size_t n = 0;
    uint64_t power;
    for (; *text; text++)
        if (!g_ascii_isspace(*text))
            plain[n++] = g_ascii_tolower(*text);
    plain[n] = '\0';
    *shift = usual;
    if (!n)
        return true;
    for (size_t i = 0; i < sizeof old / sizeof *old; i++) {
        *shift = old[i].shift;
        if (strcmp(plain, old[i].name) == 0)
            return true;
    }
    if (strncmp(plain, "byte*2^", 7) != 0 || !parse_number(plain + 7, &power) || power > 50)
        return false;
    *shift = (unsigned)power;
    return true;
}

static bool parse_amount(const char *number, const char *units, unsigned usual, uint64_t *bytes)
{
    unsigned shift;
    if (!parse_number(number, bytes) || !parse_units(units, usual, &shift) || *bytes > (uint64_t)INT64_MAX >> shift)
        return false;
    *bytes <<= shift;
    return true;
}

/* ---- elements ---- */

static void take_file(struct reading *r, const char **names, const char **values)
{
    char other[OVF_TEXT_BYTES];
    if (r->file_count == OVF_LIST_MAX) {
        fail(r, -E2BIG, "it has too many files", "");
        return;
    }
    struct file *file = &r->file[r->file_count++];
    copy_attribute(r, names, values, "id", file->id);
    copy_attribute(r, names, values, "href", file->name);
    copy_attribute(r, names, values, "compression", other);
    if (other[0] && strcmp(other, "identity") != 0)
        fail(r, -ENOTSUP, "a file is compressed, which is not supported; uncompress it first", file->name);
    copy_attribute(r, names, values, "chunkSize", other);
    if (other[0])
        fail(r, -ENOTSUP, "a file is in pieces, which is not supported", file->name);
}

static void take_disk(struct reading *r, const char **names, const char **values)
{
    char other[OVF_TEXT_BYTES], units[OVF_TEXT_BYTES];
    if (r->disk_count == OVF_LIST_MAX) {
        fail(r, -E2BIG, "it has too many disks", "");
        return;
    }
    struct disk *disk = &r->disk[r->disk_count++];
    copy_attribute(r, names, values, "diskId", disk->id);
    copy_attribute(r, names, values, "fileRef", disk->file_id);
    copy_attribute(r, names, values, "parentRef", other);
    if (other[0])
        fail(r, -ENOTSUP, "a disk lies upon another one, which is not supported", disk->id);
    copy_attribute(r, names, values, "capacity", other);
    copy_attribute(r, names, values, "capacityAllocationUnits", units);
    if (other[0] && !parse_amount(other, units, 0, &disk->capacity_bytes))
        fail(r, -EINVAL, "a disk has a capacity that is no number", other);
}

/* Those for one of several configurations, or that say limits, are not the machine as it is. */
static void begin_item(struct reading *r, const char **names, const char **values)
{
    char only[OVF_TEXT_BYTES], bound[OVF_TEXT_BYTES];
    copy_attribute(r, names, values, "configuration", only);
    copy_attribute(r, names, values, "bound", bound);
    if (only[0] || (bound[0] && strcmp(bound, "normal") != 0))
        return;
    if (r->item_count == OVF_LIST_MAX)
        fail(r, -E2BIG, "it has too much hardware", "");
    else
        r->open = &r->item[r->item_count++];
}

static bool is_item(const char *name)
{
    return strcmp(name, "Item") == 0 || strcmp(name, "StorageItem") == 0 || strcmp(name, "EthernetPortItem") == 0;
}

static void begin(GMarkupParseContext *context, const char *element, const char **names, const char **values, void *ctx, GError **error)
{
    struct reading *r = ctx;
    const char *name = local_name(element);
    r->text = NULL;
    if (++r->depth > DEPTH_MAX) {
        fail(r, -EINVAL, "it is nested too deeply", "");
    } else if (strcmp(name, "VirtualSystem") == 0) {
        copy_attribute(r, names, values, "id", r->name);
        if (++r->systems > 1)
            fail(r, -ENOTSUP, "it has several machines, which is not supported", "");
    } else if (strcmp(name, "File") == 0) {
        take_file(r, names, values);
    } else if (strcmp(name, "Disk") == 0) {
        take_disk(r, names, values);
    } else if (is_item(name)) {
        begin_item(r, names, values);
    } else if (r->open) {
        r->text = strcmp(name, "ResourceType") == 0       ? r->open->type
                  : strcmp(name, "VirtualQuantity") == 0  ? r->open->quantity
                  : strcmp(name, "AllocationUnits") == 0  ? r->open->units
                  : strcmp(name, "HostResource") == 0     ? r->open->resource
                                                          : NULL;
        if (r->text)
            r->text[0] = '\0';
    }
    if (r->failed)
        g_set_error(error, G_MARKUP_ERROR, G_MARKUP_ERROR_INVALID_CONTENT, "refused");
}

static void end(GMarkupParseContext *context, const char *element, void *ctx, GError **error)
{
    struct reading *r = ctx;
    r->depth--;
    r->text = NULL;
    if (is_item(local_name(element)))
        r->open = NULL;
}

static void take_text(GMarkupParseContext *context, const char *text, gsize bytes, void *ctx, GError **error)
{
    struct reading *r = ctx;
    size_t length = r->text ? strlen(r->text) : 0;
    if (!r->text)
        return;
    if (bytes >= OVF_TEXT_BYTES - length) {
        fail(r, -E2BIG, "a text in it is too long", "");
        g_set_error(error, G_MARKUP_ERROR, G_MARKUP_ERROR_INVALID_CONTENT, "refused");
        return;
    }
    memcpy(r->text + length, text, bytes);
    r->text[length + bytes] = '\0';
}

/* ---- what it means ---- */

/* A name in the appliance's own directory. */
static bool is_plain_name(const char *name)
{
    return name[0] && name[0] != '.' && !strchr(name, '/') && !strstr(name, "://");
}

static int put_file(struct reading *r, struct ovf_disk *to, const char *id)
{
    for (unsigned i = 0; i < r->file_count; i++) {
        if (strcmp(r->file[i].id, id) != 0)
            continue;
        if (!is_plain_name(r->file[i].name))
            return error_set(r->err, -EINVAL, "\"%s\" is no name of a file beside it", r->file[i].name);
        strcpy(to->file, r->file[i].name);
        return 0;
    }
    return error_set(r->err, -EINVAL, "a disk's file \"%s\" is not in its list of files", id);
}

/* ovf:/disk/ID or ovf:/file/ID */
static int put_disk(struct reading *r, struct ovf *ovf, const char *resource)
{
    const char *path = local_name(resource);
    if (ovf->disk_count == OVF_DISKS_MAX)
        return error_set(r->err, -E2BIG, "it has more than %d disks", OVF_DISKS_MAX);
    struct ovf_disk *to = &ovf->disk[ovf->disk_count++];
    if (strncmp(path, "/file/", 6) == 0)
        return put_file(r, to, path + 6);
    for (unsigned i = 0; strncmp(path, "/disk/", 6) == 0 && i < r->disk_count; i++) {
        const struct disk *disk = &r->disk[i];
        if (strcmp(disk->id, path + 6) != 0)
            continue;
        to->capacity_bytes = disk->capacity_bytes;
        if (disk->file_id[0])
            return put_file(r, to, disk->file_id);
        return to->capacity_bytes && to->capacity_bytes % 512 == 0 ? 0 : error_set(r->err, -EINVAL, "a disk has neither a file nor a capacity");
    }
    return error_set(r->err, -EINVAL, "a disk \"%s\" that is not in its list of disks", resource);
}

static int put_item(struct reading *r, struct ovf *ovf, const struct item *item)
{
    uint64_t type, number = 0;
    if (!parse_number(item->type, &type))
        return error_set(r->err, -EINVAL, "hardware of type \"%s\"", item->type);
    switch (type) {
    case RESOURCE_PROCESSOR:
        if (!parse_number(item->quantity, &number) || !number || number > 1024)
            return error_set(r->err, -EINVAL, "\"%s\" processors", item->quantity);
        ovf->cpus = (unsigned)number;
        return 0;
    case RESOURCE_MEMORY:
        if (!parse_amount(item->quantity, item->units, 20, &number) || !number)
            return error_set(r->err, -EINVAL, "memory of \"%s\" times \"%s\"", item->quantity, item->units);
        ovf->memory_bytes = number;
        return 0;
    case RESOURCE_ETHERNET:
        ovf->net_count += ovf->net_count < OVF_NETS_MAX;
        return 0;
    case RESOURCE_CD:
    case RESOURCE_DVD:
        ovf->others = true;
        return 0;
    case RESOURCE_DISK:
        return put_disk(r, ovf, item->resource);
    default:
        return 0;
    }
}

int ovf_parse(struct ovf *ovf, const char *text, size_t bytes, struct error *err)
{
    static const GMarkupParser parser = {.start_element = begin, .end_element = end, .text = take_text};
    struct reading *r = calloc(1, sizeof *r);
    GError *why = NULL;
    int ret = 0;
    *ovf = (struct ovf){0};
    if (!r || library_load(&glib_library_file, err)) {
        free(r);
        return r ? -ENOENT : error_set(err, -ENOMEM, "out of memory");
    }
    r->err = err;
    GMarkupParseContext *context = bytes <= OVF_BYTES_MAX ? g_markup_parse_context_new(&parser, 0, r, NULL) : NULL;
    if (!context)
        ret = error_set(err, -E2BIG, "its description is larger than %u bytes", OVF_BYTES_MAX);
    else if (!g_markup_parse_context_parse(context, text, (gssize)bytes, &why) || !g_markup_parse_context_end_parse(context, &why))
        ret = r->failed ? -EINVAL : error_set(err, -EINVAL, "%s", why->message);
    else if (!r->systems)
        ret = error_set(err, -EINVAL, "it describes no machine");
    for (unsigned i = 0; ret == 0 && i < r->item_count; i++)
        ret = put_item(r, ovf, &r->item[i]);
    if (ret == 0)
        strcpy(ovf->name, r->name);
    g_clear_error(&why);
    if (context)
        g_markup_parse_context_free(context);
    free(r);
    return ret;
}

/* ---- images ---- */

static const char *refuse(struct error *err, const char *path, const char *why)
{
    error_set(err, -EINVAL, "the image %s is refused: %s", path, why);
    return NULL;
}

/* A text that names files; sparse ones have it inside, where it may name the image below. Without a capacity qemu-img takes the text for what counts. */
static const char *check_vmdk(int fd, const uint8_t *header, const char *path, struct error *err)
{
    enum { DESCRIPTOR_AT = 512, DESCRIPTOR_BYTES = 64 << 10 };
    uint64_t capacity; /* in the file's order, but only zero matters */
    char text[DESCRIPTOR_BYTES + 1];
    memcpy(&capacity, header + 12, sizeof capacity);
    if (!capacity)
        return refuse(err, path, "it consists of several files");
    ssize_t n = pread(fd, text, DESCRIPTOR_BYTES, DESCRIPTOR_AT);
    if (n < 0)
        return refuse(err, path, strerror(errno));
    text[n] = '\0';
    for (ssize_t i = 0; i < n; i++) {
        if (strncasecmp(text + i, "parentFileNameHint", 18) == 0)
            return refuse(err, path, "it lies upon another one");
    }
    return "vmdk";
}

const char *ovf_image_format(int fd, const char *path, struct error *err)
{
    static const char descriptor[] = "# Disk DescriptorFile";
    uint8_t header[512] = {0}, footer[512] = {0};
    static const uint8_t vdi[4] = {0x7f, 0x10, 0xda, 0xbe}, qcow2[4] = {'Q', 'F', 'I', 0xfb};
    ssize_t n = pread(fd, header, sizeof header, 0);
    off_t size = lseek(fd, 0, SEEK_END);
    if (n < 0 || size < 0)
        return refuse(err, path, strerror(errno));
    if (size >= 512 && pread(fd, footer, sizeof footer, size - 512) < 0)
        return refuse(err, path, strerror(errno));
    if (memcmp(header, "KDMV", 4) == 0)
        return check_vmdk(fd, header, path, err);
    if (memcmp(header, "COWD", 4) == 0 || memmem(header, sizeof header, descriptor, strlen(descriptor)))
        return refuse(err, path, "it names other files; make one of it: qemu-img convert");
    if (memcmp(header, qcow2, 4) == 0)
        return "qcow2";
    if (memcmp(header + 64, vdi, 4) == 0)
        return "vdi";
    if (memcmp(header, "vhdxfile", 8) == 0)
        return "vhdx";
    if (memcmp(header, "conectix", 8) == 0 || memcmp(footer, "conectix", 8) == 0)
        return "vpc";
    return "raw";
}
