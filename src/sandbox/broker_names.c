/*
 * Names that were said (broker_names.h): every text of JSON, wherever it is, without looking at what is around it; the last TEXTS of them. A text never spans a control character, so that
 * whatever is between them (request lines, headers) cannot put the reader out of step for longer than a line.
 */
#include "sandbox/broker_names.h"

#include <stdlib.h>
#include <string.h>

#define TEXTS 64u
#define TEXT_BYTES 4096u
#define READERS 16u
#define DRAFTS 8u
#define DRAFT_SUFFIX 7u /* ".XXXXXX" */

/* Where a connection is in a text. */
struct reader {
    uint64_t connection, used;
    bool inside, escaped, too_long;
    unsigned digits; /* of \uXXXX that are still to come */
    uint32_t code, high; /* a character's; the first half of a pair */
    size_t length;
    char text[TEXT_BYTES];
};

struct broker_names {
    char text[TEXTS][TEXT_BYTES], draft[DRAFTS][TEXT_BYTES];
    unsigned next, next_draft;
    uint64_t clock;
    struct reader reader[READERS];
};

struct broker_names *broker_names_create(void)
{
    return calloc(1, sizeof(struct broker_names));
}

void broker_names_destroy(struct broker_names *names)
{
    free(names);
}

static struct reader *reader_of(struct broker_names *names, uint64_t connection)
{
    struct reader *oldest = &names->reader[0];
    for (unsigned i = 0; i < READERS; i++) {
        struct reader *reader = &names->reader[i];
        if (reader->used && reader->connection == connection) {
            oldest = reader;
            break;
        }
        if (reader->used < oldest->used)
            oldest = reader;
    }
    if (!oldest->used || oldest->connection != connection)
        *oldest = (struct reader){.connection = connection};
    oldest->used = ++names->clock;
    return oldest;
}

static void add_byte(struct reader *reader, char byte)
{
    if (reader->length + 1 < TEXT_BYTES && byte)
        reader->text[reader->length++] = byte;
    else
        reader->too_long = true;
}

static void add_code(struct reader *reader, uint32_t code)
{
    if (code >= 0xd800 && code < 0xdc00) {
        reader->high = code;
        return;
    }
    if (code >= 0xdc00 && code < 0xe000) {
        code = reader->high ? 0x10000 + ((reader->high - 0xd800) << 10) + (code - 0xdc00) : 0;
        reader->high = 0;
    }
    unsigned more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const uint8_t first[] = {0, 0xc0, 0xe0, 0xf0};
    add_byte(reader, (char)(first[more] | code >> 6 * more));
    while (more--)
        add_byte(reader, (char)(0x80 | (code >> 6 * more & 0x3f)));
}

static void take_escape(struct reader *reader, char c)
{
    static const char letters[] = "bfnrt", meanings[] = "\b\f\n\r\t";
    const char *letter = strchr(letters, c);
    reader->escaped = false;
    if (c == 'u') {
        reader->digits = 4;
        reader->code = 0;
    } else {
        add_byte(reader, letter && *letter ? meanings[letter - letters] : c);
    }
}

static void take_digit(struct reader *reader, char c)
{
    unsigned digit = c >= '0' && c <= '9' ? (unsigned)(c - '0') : (c | 32) >= 'a' && (c | 32) <= 'f' ? (unsigned)((c | 32) - 'a') + 10 : 16;
    reader->too_long |= digit == 16; /* no text at all */
    reader->code = reader->code << 4 | (digit & 15);
    if (--reader->digits == 0)
        add_code(reader, reader->code);
}

static void end_text(struct broker_names *names, struct reader *reader)
{
    reader->inside = false;
    if (reader->too_long || !reader->length)
        return;
    char *text = names->text[names->next++ % TEXTS];
    memcpy(text, reader->text, reader->length);
    text[reader->length] = '\0';
}

static void take_character(struct broker_names *names, struct reader *reader, char c)
{
    if ((unsigned char)c < ' ')
        reader->inside = false;
    else if (!reader->inside && c == '"')
        *reader = (struct reader){.connection = reader->connection, .used = reader->used, .inside = true};
    else if (!reader->inside)
        return;
    else if (reader->digits)
        take_digit(reader, c);
    else if (reader->escaped)
        take_escape(reader, c);
    else if (c == '\\')
        reader->escaped = true;
    else if (c == '"')
        end_text(names, reader);
    else
        add_byte(reader, c);
}

void broker_names_take(struct broker_names *names, uint64_t connection, const char *data, size_t size)
{
    struct reader *reader = reader_of(names, connection);
    if (size == 0)
        reader->used = 0;
    for (size_t i = 0; i < size; i++)
        take_character(names, reader, data[i]);
}

/* `length` bytes of `path`, as a whole part of `text`. */
static bool is_part(const char *text, const char *path, size_t length)
{
    for (const char *at = text; (at = strstr(at, path)); at++) {
        bool begins = at == text || strchr("=,:", at[-1]);
        if (begins && (!at[length] || at[length] == ','))
            return true;
    }
    return false;
}

bool broker_names_has(const struct broker_names *names, const char *path)
{
    size_t length = strlen(path);
    for (unsigned i = 0; i < TEXTS && length; i++)
        if (is_part(names->text[i], path, length))
            return true;
    return false;
}

bool broker_names_has_draft(const struct broker_names *names, const char *path)
{
    char name[TEXT_BYTES];
    size_t length = strlen(path);
    if (length <= DRAFT_SUFFIX || length >= sizeof name || path[length - DRAFT_SUFFIX] != '.' || strchr(path + length - DRAFT_SUFFIX, '/'))
        return false;
    memcpy(name, path, length - DRAFT_SUFFIX);
    name[length - DRAFT_SUFFIX] = '\0';
    return broker_names_has(names, name);
}

void broker_names_made(struct broker_names *names, const char *path)
{
    if (strlen(path) < TEXT_BYTES)
        strcpy(names->draft[names->next_draft++ % DRAFTS], path);
}

bool broker_names_is_made(const struct broker_names *names, const char *path)
{
    for (unsigned i = 0; i < DRAFTS; i++)
        if (*path && strcmp(names->draft[i], path) == 0)
            return true;
    return false;
}
