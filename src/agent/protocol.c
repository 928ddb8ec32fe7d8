/* Frames between `doppel exec` and the agent, see protocol.h. Whatever is wrong with one is -EPROTO; nothing is believed. Threading: none. */
#include "agent/protocol.h"

#include <errno.h>
#include <string.h>

#define EXEC_HEADER_BYTES 10u

uint8_t *agent_reader_room(struct agent_reader *reader, size_t *room_bytes)
{
    if (reader->start) {
        memmove(reader->data, reader->data + reader->start, reader->end - reader->start);
        reader->end -= reader->start;
        reader->start = 0;
    }
    *room_bytes = sizeof reader->data - reader->end;
    return reader->data + reader->end;
}

int agent_reader_next(struct agent_reader *reader, struct agent_frame *frame)
{
    const uint8_t *at = reader->data + reader->start;
    size_t there = reader->end - reader->start;
    if (there < AGENT_HEADER_BYTES)
        return 0;
    uint32_t size = agent_get_u32(at);
    if (size > AGENT_BODY_MAX || at[5] || at[6] || at[7])
        return -EPROTO;
    if (there - AGENT_HEADER_BYTES < size)
        return 0;
    *frame = (struct agent_frame){.type = at[4], .size_bytes = size, .body = at + AGENT_HEADER_BYTES};
    reader->start += AGENT_HEADER_BYTES + size;
    return 1;
}

void agent_header(uint8_t header[AGENT_HEADER_BYTES], enum agent_type type, uint32_t size_bytes)
{
    memset(header, 0, AGENT_HEADER_BYTES);
    agent_put_u32(header, size_bytes);
    header[4] = (uint8_t)type;
}

/* ---- EXEC ---- */

static uint16_t get_u16(const uint8_t *at)
{
    return (uint16_t)(at[0] | at[1] << 8);
}

/* The text at *at, which moves behind it. NULL: it does not end. */
static const char *take_text(const uint8_t **at, const uint8_t *end)
{
    const uint8_t *zero = memchr(*at, 0, (size_t)(end - *at));
    const char *text = (const char *)*at;
    if (!zero)
        return NULL;
    *at = zero + 1;
    return text;
}

static bool take_texts(const uint8_t **at, const uint8_t *end, const char **text, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        if (!(text[i] = take_text(at, end)))
            return false;
    text[count] = NULL;
    return true;
}

int agent_exec_parse(struct agent_exec *exec, const uint8_t *body, uint32_t size_bytes)
{
    const uint8_t *at = body + EXEC_HEADER_BYTES, *end = body + size_bytes;
    if (size_bytes < EXEC_HEADER_BYTES || body[0] != AGENT_VERSION || body[1] & ~AGENT_EXEC_TERMINAL)
        return -EPROTO;
    exec->flags = body[1];
    exec->rows = get_u16(body + 2);
    exec->columns = get_u16(body + 4);
    exec->argument_count = get_u16(body + 6);
    exec->variable_count = get_u16(body + 8);
    if (exec->argument_count == 0 || exec->argument_count > AGENT_ARGUMENTS_MAX || exec->variable_count > AGENT_ARGUMENTS_MAX)
        return -EPROTO;
    exec->user = take_text(&at, end);
    exec->directory = exec->user ? take_text(&at, end) : NULL;
    if (!exec->directory || !take_texts(&at, end, exec->argument, exec->argument_count) || !take_texts(&at, end, exec->variable, exec->variable_count) || at != end)
        return -EPROTO;
    for (unsigned i = 0; i < exec->variable_count; i++)
        if (!strchr(exec->variable[i], '=') || exec->variable[i][0] == '=')
            return -EPROTO;
    return exec->argument[0][0] ? 0 : -EPROTO;
}

static bool put_text(uint8_t *body, size_t *size, const char *text)
{
    size_t length = strlen(text) + 1;
    if (length > AGENT_BODY_MAX - *size)
        return false;
    memcpy(body + *size, text, length);
    *size += length;
    return true;
}

int agent_exec_format(const struct agent_exec *exec, uint8_t body[AGENT_BODY_MAX])
{
    const uint16_t numbers[] = {exec->rows, exec->columns, (uint16_t)exec->argument_count, (uint16_t)exec->variable_count};
    size_t size = EXEC_HEADER_BYTES;
    if (exec->argument_count > AGENT_ARGUMENTS_MAX || exec->variable_count > AGENT_ARGUMENTS_MAX)
        return -E2BIG;
    body[0] = AGENT_VERSION;
    body[1] = exec->flags;
    for (unsigned i = 0; i < 4; i++) {
        body[2 + 2 * i] = numbers[i] & 0xFF;
        body[3 + 2 * i] = numbers[i] >> 8;
    }
    bool fits = put_text(body, &size, exec->user) && put_text(body, &size, exec->directory);
    for (unsigned i = 0; fits && i < exec->argument_count; i++)
        fits = put_text(body, &size, exec->argument[i]);
    for (unsigned i = 0; fits && i < exec->variable_count; i++)
        fits = put_text(body, &size, exec->variable[i]);
    return fits ? (int)size : -E2BIG;
}

/* ---- becoming another guest ---- */

#define IDENTITY_FIXED_BYTES (1 + AGENT_SEED_BYTES + 16 + 1)

static bool name_is_good(const char *name)
{
    static const char good[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._";
    return name[0] && strspn(name, good) == strlen(name);
}

int agent_identity_parse(struct agent_identity *identity, const uint8_t *body, uint32_t size_bytes)
{
    const uint8_t *at = body + 1;
    if (size_bytes < IDENTITY_FIXED_BYTES || body[0] != AGENT_VERSION)
        return -EPROTO;
    memcpy(identity->seed, at, sizeof identity->seed);
    at += sizeof identity->seed;
    memcpy(identity->machine_id, at, sizeof identity->machine_id);
    at += sizeof identity->machine_id;
    identity->card_count = *at++;
    if (identity->card_count > AGENT_CARDS_MAX || size_bytes < IDENTITY_FIXED_BYTES + identity->card_count * 7)
        return -EPROTO;
    for (unsigned i = 0; i < identity->card_count; i++, at += 7) {
        identity->card[i].slot = *at;
        memcpy(identity->card[i].mac, at + 1, 6);
        if (*at > 31 || at[1] & 1)
            return -EPROTO;
    }
    size_t left = size_bytes - (size_t)(at - body);
    if (left < 2 || left > sizeof identity->name || at[left - 1])
        return -EPROTO;
    memcpy(identity->name, at, left);
    return strlen(identity->name) == left - 1 && name_is_good(identity->name) ? 0 : -EPROTO;
}

size_t agent_identity_format(const struct agent_identity *identity, uint8_t body[AGENT_IDENTITY_BYTES_MAX])
{
    uint8_t *at = body;
    *at++ = AGENT_VERSION;
    memcpy(at, identity->seed, sizeof identity->seed);
    at += sizeof identity->seed;
    memcpy(at, identity->machine_id, sizeof identity->machine_id);
    at += sizeof identity->machine_id;
    *at++ = (uint8_t)identity->card_count;
    for (unsigned i = 0; i < identity->card_count; i++) {
        *at++ = identity->card[i].slot;
        memcpy(at, identity->card[i].mac, 6);
        at += 6;
    }
    strcpy((char *)at, identity->name);
    return (size_t)(at - body) + strlen(identity->name) + 1;
}
