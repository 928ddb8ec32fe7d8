/*
 * What `doppel exec` and the guest's agent say to each other (docs/agent.md): frames over one stream connection, one request a connection.
 *
 * A frame is  u32 size of the body, u8 type, three bytes of zero, body;  integers are little endian, texts end in a zero byte. Both ends treat
 * the other as hostile: a frame that is too large, of a type that does not belong there, or with a body that is too short ends the connection.
 * Used by the agent, which is a program of its own inside guests, and by src/cli. Nothing else of Doppel is included here. Threading: none.
 */
#ifndef DOPPEL_AGENT_PROTOCOL_H
#define DOPPEL_AGENT_PROTOCOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AGENT_PORT 6789u
#define AGENT_VERSION 1u

#define AGENT_HEADER_BYTES 8u
#define AGENT_BODY_MAX 65536u
/* Input that the client may send ahead of the command, which thus never keeps signals from being seen. */
#define AGENT_INPUT_WINDOW (256u << 10)
#define AGENT_ARGUMENTS_MAX 1024u

/* Requests: the first frame of a connection, by the client. */
enum agent_type {
    AGENT_EXEC = 1, /* struct agent_exec, then INPUT, SIGNAL, SIZE; answered by OUTPUT, ERRORS, TAKEN, EXITED */
    AGENT_PING,     /* any bytes; answered by DONE with the same bytes */
    AGENT_INFO,     /* answered by DATA with lines "name=value", DONE */
    AGENT_PUT,      /* u32 mode, path; then DATA ..., END; answered by DONE */
    AGENT_GET,      /* path; answered by FILE, DATA ..., DONE */
    AGENT_CLOCK,    /* u64 nanoseconds since 1970; answered by DONE */
    AGENT_SHUTDOWN, /* u8: 0 power off, 1 restart; answered by DONE */
    AGENT_IDENTITY, /* struct agent_identity; answered by DONE */

    AGENT_INPUT = 16, /* bytes for standard input; none: its end */
    AGENT_SIGNAL,     /* u8 number */
    AGENT_SIZE,       /* u16 rows, u16 columns */
    AGENT_DATA,       /* bytes of a file */
    AGENT_END,        /* the file is complete */

    AGENT_OUTPUT = 32, /* bytes of standard output */
    AGENT_ERRORS,      /* bytes of standard error */
    AGENT_TAKEN,       /* u32: bytes of input that the command has taken */
    AGENT_EXITED,      /* u8: 0 exited, 1 killed by a signal; u8 status or signal */
    AGENT_FILE,        /* u32 mode, u64 size */
    AGENT_DONE,        /* nothing, or what was asked for */
    AGENT_FAILED,      /* text: why it could not be done */
};

struct agent_frame {
    uint8_t type;
    uint32_t size_bytes;
    const uint8_t *body;
};

/* ---- reading ---- */

/* Bytes that have come and are not a whole frame yet. */
struct agent_reader {
    uint8_t data[2 * (AGENT_HEADER_BYTES + AGENT_BODY_MAX)];
    size_t start, end;
};

/* Where to put what is read next, and how much: at least one byte, once every whole frame has been taken. */
uint8_t *agent_reader_room(struct agent_reader *reader, size_t *room_bytes);
static inline void agent_reader_add(struct agent_reader *reader, size_t size_bytes)
{
    reader->end += size_bytes;
}
/* The next frame: 1, its body is valid until the next call of agent_reader_room; 0: not complete yet; -EPROTO: it is none. */
int agent_reader_next(struct agent_reader *reader, struct agent_frame *frame);

/* ---- writing ---- */

/* Writes a header for `size_bytes` of body into 8 bytes. */
void agent_header(uint8_t header[AGENT_HEADER_BYTES], enum agent_type type, uint32_t size_bytes);

static inline uint32_t agent_get_u32(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static inline uint64_t agent_get_u64(const uint8_t *at)
{
    return agent_get_u32(at) | (uint64_t)agent_get_u32(at + 4) << 32;
}

static inline void agent_put_u32(uint8_t *at, uint32_t value)
{
    for (unsigned i = 0; i < 4; i++)
        at[i] = (uint8_t)(value >> 8 * i);
}

static inline void agent_put_u64(uint8_t *at, uint64_t value)
{
    agent_put_u32(at, (uint32_t)value);
    agent_put_u32(at + 4, (uint32_t)(value >> 32));
}

/* ---- the request to run a command ---- */

#define AGENT_EXEC_TERMINAL 1u

/*
 * u8 version, u8 flags, u16 rows, u16 columns, u16 arguments, u16 variables, then texts: user (empty: the agent's own), directory (empty: the user's home),
 * arguments, variables ("NAME=value").
 */
struct agent_exec {
    uint8_t flags;
    uint16_t rows, columns;
    const char *user, *directory;
    unsigned argument_count, variable_count;
    const char *argument[AGENT_ARGUMENTS_MAX + 1], *variable[AGENT_ARGUMENTS_MAX + 1]; /* NULL-terminated */
};

/* Texts point into the body. 0 or -EPROTO (also for another version). */
int agent_exec_parse(struct agent_exec *exec, const uint8_t *body, uint32_t size_bytes);
/* Size of the body, or -E2BIG. */
int agent_exec_format(const struct agent_exec *exec, uint8_t body[AGENT_BODY_MAX]);

/* ---- the request to become another guest ---- */

#define AGENT_SEED_BYTES 32u
#define AGENT_CARDS_MAX 8u
#define AGENT_NAME_BYTES 64u /* with the NUL */

/* u8 version, seed, machine ID, u8 cards, for each u8 PCI slot and six bytes of address, text: the host's name (letters, digits, "-", "." and "_"). */
struct agent_identity {
    uint8_t seed[AGENT_SEED_BYTES], machine_id[16];
    unsigned card_count;
    struct {
        uint8_t slot, mac[6];
    } card[AGENT_CARDS_MAX];
    char name[AGENT_NAME_BYTES];
};

#define AGENT_IDENTITY_BYTES_MAX (1 + AGENT_SEED_BYTES + 16 + 1 + AGENT_CARDS_MAX * 7 + AGENT_NAME_BYTES)

/* 0 or -EPROTO. */
int agent_identity_parse(struct agent_identity *identity, const uint8_t *body, uint32_t size_bytes);
/* Size of the body. What parse would refuse must not be in it. */
size_t agent_identity_format(const struct agent_identity *identity, uint8_t body[AGENT_IDENTITY_BYTES_MAX]);

#endif
