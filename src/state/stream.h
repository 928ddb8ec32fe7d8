/*
 * The stream between two hosts on which a machine moves: frames of a type and a body over a connected socket (docs/formats.md). This file knows frames; what is in them is
 * machine/migrate_priv.h's.
 *
 *     header, 24 bytes: u32 "DPMF", u16 type, u16 zero, u32 length of the body, u32 number of the frame, u64 XXH3 of body and header
 *
 * Each side counts its frames from 0. A frame with another number, a wrong checksum, an unknown type or too long a body ends the stream: nothing that was sent afterwards is believed.
 * Threading: one thread at a time; stream_cut from any.
 */
#ifndef DOPPEL_STATE_STREAM_H
#define DOPPEL_STATE_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/error.h"

#define STREAM_HEADER_BYTES 24u
#define STREAM_BODY_BYTES_MAX (1u << 20)

struct stream;

/* Takes the descriptor over (also after a failure): a socket that is connected. `peer` is for messages, and stays the caller's. NULL: no memory. */
struct stream *stream_create(int fd, const char *peer);
void stream_destroy(struct stream *stream);
void stream_set_peer(struct stream *stream, const char *peer);

/* When whatever is under way must be over (loop_now_ns), 0: never. -ETIMEDOUT afterwards. */
void stream_set_deadline(struct stream *stream, uint64_t deadline_ns);

/*
 * Appends a frame whose body is `head` and then `data` (one may be NULL with 0 bytes), both copied; at most STREAM_BODY_BYTES_MAX together. What was appended is sent when there is much of it, and by
 * stream_flush. 0 or -errno, for good: what has failed fails again. What the other side has sent
 * before can still be had then.
 */
int stream_put(struct stream *stream, unsigned type, const void *head, size_t head_bytes, const void *data, size_t data_bytes, struct error *err)
    __attribute__((warn_unused_result));
int stream_flush(struct stream *stream, struct error *err) __attribute__((warn_unused_result));
/* The next frame, waited for; the body is valid until the next call. -EPIPE: the other side has closed the stream. */
int stream_get(struct stream *stream, unsigned *type, const uint8_t **body, size_t *size_bytes, struct error *err) __attribute__((warn_unused_result));

/* For who waits for other things as well: readable, unless a whole frame is here already, means that there is something to get. */
int stream_descriptor(const struct stream *stream);
bool stream_has_frame(const struct stream *stream);

uint64_t stream_bytes_sent(const struct stream *stream);
/* Ends it for both sides at once: whoever waits in it fails. Any thread, as long as the stream is there. */
void stream_cut(struct stream *stream);

/* Little endian numbers in bodies. */
void stream_put_number(uint8_t *at, uint64_t value, unsigned bytes);
uint64_t stream_number(const uint8_t *at, unsigned bytes);

#endif
