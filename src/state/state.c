/*
 * Sections of saved state: the writer grows a buffer, the reader walks one. state.h describes the format.
 *
 * Invariants: `open[0..depth)` are the sections begun and not ended, outermost first; a reader never reads beyond the innermost one's
 * body, and a body's CRC was checked before its first byte is handed out. After a failure `failed` holds the code for good: nothing is written or read any more.
 * Begin and end calls stay paired also then, so depth is counted on.
 * Threading: none.
 */
#include "state/state.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SECTION_MAGIC 0x54535044u  /* "DPST" */
#define OPTIONAL_MAGIC 0x4f535044u /* "DPSO": who does not know it skips it */
#define SECTION_DEPTH_MAX 16u
#define PARTS_MAX 256u
#define NAME_BYTES_MAX 63u

/* What state_begin is called with anywhere in the program. */
extern const struct state_part __start_state_parts[] __attribute__((weak, visibility("hidden"))), __stop_state_parts[] __attribute__((weak, visibility("hidden")));

struct section {
    const char *name;
    bool optional;
    size_t body; /* offset of the body's first byte */
    size_t end;  /* reader: offset behind the body */
};

struct state_io {
    bool loading;
    int failed; /* 0 or -errno */
    uint8_t *buffer;        /* writer */
    const uint8_t *data;    /* reader: borrowed; writer: == buffer */
    size_t size, capacity;  /* bytes in data; writer: bytes of buffer allocated */
    size_t position;        /* reader */
    struct section open[SECTION_DEPTH_MAX];
    unsigned depth, need_count, need_capacity;
    struct state_need *need;           /* writer */
    struct state_part part[PARTS_MAX]; /* writer: what sections there are, each kind once */
    unsigned parts;
    uint32_t crc_table[256];
    char error[256];
};

static struct state_io *io_create(bool loading)
{
    struct state_io *io = calloc(1, sizeof(*io));

    if (!io)
        return NULL;
    io->loading = loading;
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;

        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
        io->crc_table[i] = crc;
    }
    return io;
}

static uint32_t crc32_of(const struct state_io *io, size_t start, size_t end)
{
    uint32_t crc = ~0u;

    for (size_t i = start; i < end; i++)
        crc = crc >> 8 ^ io->crc_table[(crc ^ io->data[i]) & 0xFF];
    return ~crc;
}

struct state_io *state_writer_create(void)
{
    return io_create(false);
}

struct state_io *state_reader_create(const void *data, size_t size_bytes)
{
    struct state_io *io = io_create(true);

    if (io) {
        io->data = data;
        io->size = size_bytes;
    }
    return io;
}

void state_io_destroy(struct state_io *io)
{
    if (!io)
        return;
    free(io->buffer);
    free(io->need);
    free(io);
}

const void *state_writer_data(const struct state_io *io, size_t *size_bytes)
{
    assert(!io->loading);
    *size_bytes = io->failed ? 0 : io->size;
    return io->failed ? NULL : io->buffer;
}

void state_needs(struct state_io *io, uint64_t gpa, uint64_t bytes)
{
    if (io->loading || io->failed)
        return;
    if (io->need_count == io->need_capacity) {
        unsigned capacity = io->need_capacity ? 2 * io->need_capacity : 64;
        struct state_need *more = realloc(io->need, capacity * sizeof *more);
        if (!more)
            return; /* it is only slower without */
        io->need = more;
        io->need_capacity = capacity;
    }
    io->need[io->need_count++] = (struct state_need){gpa, bytes};
}

const struct state_need *state_needed(const struct state_io *io, unsigned *count)
{
    *count = io->need_count;
    return io->need;
}

bool state_loading(const struct state_io *io)
{
    return io->loading;
}

bool state_failed(const struct state_io *io)
{
    return io->failed != 0;
}

const char *state_error(const struct state_io *io)
{
    return io->error;
}

static void fail_with(struct state_io *io, int code, const char *reason)
{
    size_t used = 0;

    if (io->failed)
        return;
    io->failed = code;
    for (unsigned i = 0; i < io->depth && i < SECTION_DEPTH_MAX && used < sizeof(io->error); i++)
        used += (size_t)snprintf(io->error + used, sizeof(io->error) - used, "%s%s", i ? "/" : "", io->open[i].name);
    if (used < sizeof(io->error))
        snprintf(io->error + used, sizeof(io->error) - used, "%s%s", used ? ": " : "", reason);
}

void state_fail(struct state_io *io, const char *reason)
{
    fail_with(io, -EINVAL, reason);
}

static void put(struct state_io *io, const void *data, size_t size_bytes)
{
    if (io->failed)
        return;
    if (size_bytes > io->capacity - io->size) {
        size_t capacity = io->capacity ? io->capacity : 4096;
        uint8_t *grown;

        while (capacity - io->size < size_bytes) {
            if (capacity > SIZE_MAX / 2) {
                fail_with(io, -ENOMEM, "too large to save");
                return;
            }
            capacity *= 2;
        }
        grown = realloc(io->buffer, capacity);
        if (!grown) {
            fail_with(io, -ENOMEM, "no memory to save");
            return;
        }
        io->buffer = grown;
        io->data = grown;
        io->capacity = capacity;
    }
    if (size_bytes)
        memcpy(io->buffer + io->size, data, size_bytes);
    io->size += size_bytes;
}

/* Zeroes instead when the section has too few bytes left. */
static void get(struct state_io *io, void *data, size_t size_bytes)
{
    size_t end = io->depth ? io->open[io->depth - 1].end : io->size;

    if (!io->failed && size_bytes > end - io->position)
        state_fail(io, "ends too early");
    if (size_bytes == 0)
        return;
    if (io->failed) {
        memset(data, 0, size_bytes);
        return;
    }
    memcpy(data, io->data + io->position, size_bytes);
    io->position += size_bytes;
}

static void number(struct state_io *io, uint64_t *value, unsigned size_bytes)
{
    uint8_t bytes[8];

    if (!io->loading) {
        for (unsigned i = 0; i < size_bytes; i++)
            bytes[i] = (uint8_t)(*value >> 8 * i);
        put(io, bytes, size_bytes);
        return;
    }
    get(io, bytes, size_bytes);
    *value = 0;
    for (unsigned i = 0; i < size_bytes; i++)
        *value |= (uint64_t)bytes[i] << 8 * i;
}

static void put_number(struct state_io *io, uint64_t value, unsigned size_bytes)
{
    number(io, &value, size_bytes);
}

static uint64_t get_number(struct state_io *io, unsigned size_bytes)
{
    uint64_t value = 0;

    number(io, &value, size_bytes);
    return value;
}

static void note_part(struct state_io *io, const char *name, unsigned version)
{
    for (unsigned i = 0; i < io->depth && i < SECTION_DEPTH_MAX; i++)
        if (io->open[i].optional)
            return;
    for (unsigned i = 0; i < io->parts; i++)
        if (strcmp(io->part[i].name, name) == 0 && io->part[i].version == version)
            return;
    if (io->parts < PARTS_MAX)
        io->part[io->parts++] = (struct state_part){name, version};
}

static void begin_save(struct state_io *io, struct section *section, unsigned version, uint32_t magic)
{
    size_t name_bytes = strlen(section->name);

    assert(name_bytes > 0 && name_bytes <= NAME_BYTES_MAX);
    put_number(io, magic, 4);
    put_number(io, name_bytes, 1);
    put(io, section->name, name_bytes);
    put_number(io, version, 4);
    put_number(io, 0, 8); /* the body's length, filled in by end_save */
    section->body = io->size;
    section->optional = magic == OPTIONAL_MAGIC;
    if (!section->optional)
        note_part(io, section->name, version);
}

struct header {
    char name[NAME_BYTES_MAX + 1];
    bool optional;
    unsigned version;
    size_t body, end; /* offsets of the body's first byte, and behind it */
};

static size_t limit_of(const struct state_io *io)
{
    return io->depth ? io->open[io->depth - 1].end : io->size;
}

static bool name_is_plain(const char *name, size_t name_bytes)
{
    for (size_t i = 0; i < name_bytes; i++)
        if (name[i] < 0x20 || name[i] > 0x7e)
            return false;
    return name_bytes > 0;
}

/* The section that begins here. Its bytes belong to the enclosing one, which bounds them. The position is its body then. `wanted` is for messages. */
static bool read_header(struct state_io *io, struct header *header, const char *wanted)
{
    char reason[256];
    uint64_t magic = get_number(io, 4), name_bytes = get_number(io, 1);

    *header = (struct header){.optional = magic == OPTIONAL_MAGIC};
    if (!io->failed && ((magic != SECTION_MAGIC && magic != OPTIONAL_MAGIC) || name_bytes > NAME_BYTES_MAX)) {
        snprintf(reason, sizeof(reason), "section \"%s\" expected here", wanted);
        state_fail(io, reason);
    }
    get(io, header->name, io->failed ? 0 : name_bytes);
    if (!io->failed && !name_is_plain(header->name, name_bytes)) {
        snprintf(reason, sizeof(reason), "section \"%s\" expected here", wanted);
        state_fail(io, reason);
    }
    header->version = (unsigned)get_number(io, 4);
    uint64_t body_bytes = get_number(io, 8);
    size_t left = limit_of(io) - io->position;
    if (!io->failed && (left < 4 || body_bytes > left - 4)) {
        snprintf(reason, sizeof(reason), "section \"%s\" is cut short", header->name);
        state_fail(io, reason);
    }
    header->body = io->position;
    header->end = io->position + (io->failed ? 0 : body_bytes);
    return !io->failed;
}

static bool check_body(struct state_io *io, const struct header *header)
{
    char reason[160];

    io->position = header->end;
    uint32_t crc = (uint32_t)get_number(io, 4);
    if (!io->failed && crc != crc32_of(io, header->body, header->end)) {
        snprintf(reason, sizeof(reason), "section \"%s\" is damaged (checksum)", header->name);
        state_fail(io, reason);
    }
    io->position = header->body;
    return !io->failed;
}

/* Goes past optional sections that are not `wanted` (NULL: past all). False after a failure. */
static bool skip_optional(struct state_io *io, const char *wanted)
{
    struct header header;

    while (!io->failed && limit_of(io) - io->position >= 4) {
        size_t here = io->position;
        if (get_number(io, 4) != OPTIONAL_MAGIC) {
            io->position = here;
            break;
        }
        io->position = here;
        if (!read_header(io, &header, wanted ? wanted : "") || !check_body(io, &header))
            return false;
        if (wanted && strcmp(header.name, wanted) == 0) {
            io->position = here;
            break;
        }
        io->position = header.end + 4;
    }
    return !io->failed;
}

static unsigned begin_load(struct state_io *io, struct section *section, unsigned version)
{
    struct header header;
    char reason[256];

    if (!skip_optional(io, section->name) || !read_header(io, &header, section->name))
        return version;
    if (strcmp(header.name, section->name) != 0) {
        snprintf(reason, sizeof(reason), "section \"%s\" expected here, found \"%s\"", section->name, header.name);
        state_fail(io, reason);
    } else if (header.version == 0 || header.version > version) {
        snprintf(reason, sizeof(reason), "section \"%s\" has version %u; this program reads up to %u", section->name, header.version, version);
        state_fail(io, reason);
    } else {
        check_body(io, &header);
    }
    section->body = header.body;
    section->end = header.end;
    return io->failed ? version : header.version;
}

unsigned state_begin_unlisted(struct state_io *io, const char *name, unsigned version)
{
    struct section section = {.name = name};

    assert(version > 0 && io->depth < SECTION_DEPTH_MAX);
    if (!io->failed) {
        if (io->loading)
            version = begin_load(io, &section, version);
        else
            begin_save(io, &section, version, SECTION_MAGIC);
    }
    io->open[io->depth++] = section;
    return version;
}

unsigned state_begin_optional(struct state_io *io, const char *name, unsigned version)
{
    struct section section = {.name = name};
    struct header header;

    assert(version > 0 && io->depth < SECTION_DEPTH_MAX);
    if (io->failed)
        return 0;
    if (!io->loading) {
        begin_save(io, &section, version, OPTIONAL_MAGIC);
        io->open[io->depth++] = section;
        return version;
    }
    size_t here = io->position;
    if (!skip_optional(io, name))
        return 0;
    bool there = limit_of(io) - io->position >= 4 && get_number(io, 4) == OPTIONAL_MAGIC;
    if (there) {
        io->position -= 4;
        there = read_header(io, &header, name) && header.version > 0 && header.version <= version;
    }
    if (!there) {
        io->position = here; /* others may be wanted by name after this one; who wants none skips them all */
        return 0;
    }
    section.body = header.body;
    section.end = header.end;
    io->open[io->depth++] = section;
    return header.version;
}

bool state_next(struct state_io *io, char name[64], const void **body, size_t *body_bytes)
{
    struct header header;

    if (io->failed || limit_of(io) == io->position || !read_header(io, &header, "") || !check_body(io, &header))
        return false;
    strcpy(name, header.name);
    *body = io->data + header.body;
    *body_bytes = header.end - header.body;
    io->position = header.end + 4;
    return true;
}

static void end_save(struct state_io *io, const struct section *section)
{
    uint64_t body_bytes = io->size - section->body;

    for (unsigned i = 0; i < 8; i++)
        io->buffer[section->body - 8 + i] = (uint8_t)(body_bytes >> 8 * i);
    put_number(io, crc32_of(io, section->body, io->size), 4);
}

int state_end(struct state_io *io)
{
    struct section *section;

    assert(io->depth > 0);
    section = &io->open[io->depth - 1];
    if (!io->failed && io->loading && skip_optional(io, NULL) && io->position != section->end)
        state_fail(io, "has bytes left over");
    if (!io->failed && !io->loading)
        end_save(io, section);
    if (!io->failed && io->loading)
        io->position = section->end + 4;
    io->depth--;
    return io->failed;
}

void state_bool(struct state_io *io, bool *value)
{
    uint64_t number_value = io->loading ? 0 : *value;

    number(io, &number_value, 1);
    if (number_value > 1)
        state_fail(io, "a flag is neither 0 nor 1");
    if (io->loading)
        *value = number_value == 1;
}

void state_u8(struct state_io *io, uint8_t *value)
{
    uint64_t number_value = io->loading ? 0 : *value;

    number(io, &number_value, 1);
    *value = (uint8_t)number_value;
}

void state_u16(struct state_io *io, uint16_t *value)
{
    uint64_t number_value = io->loading ? 0 : *value;

    number(io, &number_value, 2);
    *value = (uint16_t)number_value;
}

void state_u32(struct state_io *io, uint32_t *value)
{
    uint64_t number_value = io->loading ? 0 : *value;

    number(io, &number_value, 4);
    *value = (uint32_t)number_value;
}

void state_u64(struct state_io *io, uint64_t *value)
{
    number(io, value, 8);
}

void state_i64(struct state_io *io, int64_t *value)
{
    uint64_t number_value = io->loading ? 0 : (uint64_t)*value;

    number(io, &number_value, 8);
    *value = (int64_t)number_value;
}

void state_bytes(struct state_io *io, void *data, size_t size_bytes)
{
    if (io->loading)
        get(io, data, size_bytes);
    else
        put(io, data, size_bytes);
}

void state_buffer(struct state_io *io, void *data, uint32_t *size_bytes, uint32_t capacity_bytes)
{
    assert(io->loading || *size_bytes <= capacity_bytes);
    state_u32(io, size_bytes);
    if (io->loading && *size_bytes > capacity_bytes)
        state_fail(io, "a buffer is larger than it can be");
    if (io->loading && io->failed)
        *size_bytes = 0;
    state_bytes(io, data, *size_bytes);
    if (io->loading && io->failed)
        *size_bytes = 0;
}

void state_string(struct state_io *io, char **text)
{
    bool present = !io->loading && *text;
    uint32_t size_bytes = present ? (uint32_t)strlen(*text) : 0;

    if (size_bytes > STATE_STRING_BYTES_MAX)
        state_fail(io, "a text is too long to save");
    state_bool(io, &present);
    if (present)
        state_u32(io, &size_bytes);
    if (!io->loading) {
        put(io, *text, present ? size_bytes : 0);
        return;
    }
    free(*text);
    *text = NULL;
    if (size_bytes > STATE_STRING_BYTES_MAX)
        state_fail(io, "a text is too long");
    if (!present || io->failed)
        return;
    char *copy = calloc(1, (size_t)size_bytes + 1);
    if (!copy) {
        fail_with(io, -ENOMEM, "no memory to load");
        return;
    }
    get(io, copy, size_bytes);
    if (!io->failed && strlen(copy) != size_bytes)
        state_fail(io, "a text with a zero byte");
    if (io->failed) {
        free(copy);
        return;
    }
    *text = copy;
}

/* ---- what parts there are ---- */

int state_put_parts(struct state_io *io, size_t place)
{
    size_t end = io->size;
    uint32_t count = io->parts;

    assert(!io->loading && io->depth == 0 && (io->failed || place <= end));
    if (state_begin_optional(io, "parts", 1) == 0)
        return io->failed;
    state_u32(io, &count);
    for (unsigned i = 0; i < count; i++) {
        char *name = (char *)(uintptr_t)io->part[i].name;
        uint32_t version = io->part[i].version;

        state_string(io, &name);
        state_u32(io, &version);
    }
    if (state_end(io) < 0)
        return io->failed;
    size_t bytes = io->size - end;
    uint8_t *copy = malloc(bytes);
    if (!copy) {
        fail_with(io, -ENOMEM, "no memory to save");
        return io->failed;
    }
    memcpy(copy, io->buffer + end, bytes);
    memmove(io->buffer + place + bytes, io->buffer + place, end - place);
    memcpy(io->buffer + place, copy, bytes);
    free(copy);
    return 0;
}

/* The highest version that the program reads; 0: it knows none. */
static unsigned known_version(const char *name)
{
    unsigned version = 0;

    for (const struct state_part *part = __start_state_parts; part < __stop_state_parts; part++)
        if (strcmp(part->name, name) == 0 && part->version > version)
            version = part->version;
    return version;
}

void state_check_parts(struct state_io *io, const void *body, size_t body_bytes)
{
    struct state_io *list = state_reader_create(body, body_bytes);
    uint32_t count = 0, version = 0;
    char reason[256];

    if (!list) {
        fail_with(io, -ENOMEM, "no memory to load");
        return;
    }
    state_u32(list, &count);
    for (uint32_t i = 0; i < count && !list->failed && !io->failed; i++) {
        char *name = NULL;

        state_string(list, &name);
        state_u32(list, &version);
        unsigned known = name && name_is_plain(name, strlen(name)) ? known_version(name) : 0;
        if (!list->failed && version > known) {
            if (known)
                snprintf(reason, sizeof(reason), "section \"%.63s\" has version %u; this program reads up to %u", name, version, known);
            else
                snprintf(reason, sizeof(reason), "section \"%.63s\" is not known to this program", name && name_is_plain(name, strlen(name)) ? name : "");
            state_fail(io, reason);
        }
        free(name);
    }
    if (list->failed)
        state_fail(io, "section \"parts\" is damaged");
    state_io_destroy(list);
}
