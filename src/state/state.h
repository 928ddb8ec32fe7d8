/*
 * Saving and loading of guest-visible state.
 *
 * A stateful part has one function `int x_state(struct x *x, struct state_io *io)` that names each field once; the same function saves and
 * loads, so the two cannot drift apart. It works inside a named, versioned section:
 *
 *     int pit_state(struct pit *pit, struct state_io *io)
 *     {
 *         state_begin(io, "pit", 1);
 *         state_u16(io, &pit->channel[0].count);
 *         ...
 *         if (state_loading(io) && pit->channel[0].mode > 5)
 *             state_fail(io, "channel mode out of range");   (validate everything loaded: a snapshot is hostile)
 *         return state_end(io);
 *     }
 *
 * Afterwards, when loading, it recomputes whatever is derived (timers, cached pointers). On the first error the io goes into a
 * failed state: later calls do nothing, loaded values become zero, and state_end returns -EINVAL or -ENOMEM.
 *
 * Format (docs/formats.md): each section is  u32 magic, u8 name length, name, u32 version, u64 body length, body, u32 CRC-32 of the body; integers little endian. The magic says
 * whether a reader that does not know the section may skip it.
 * Threading: none; the caller holds whatever lock the part needs, and vCPUs are paused.
 */
#ifndef DOPPEL_STATE_STATE_H
#define DOPPEL_STATE_STATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct state_io;

struct state_io *state_writer_create(void);                               /* grows in memory; NULL: no memory */
struct state_io *state_reader_create(const void *data, size_t size_bytes); /* borrows data until destroyed */
void state_io_destroy(struct state_io *io);
/* Writer only: what has been written so far; owned by io. */
const void *state_writer_data(const struct state_io *io, size_t *size_bytes);

bool state_loading(const struct state_io *io);
/* Saving: these bytes of the guest's memory are looked at when this is loaded, so that whoever sends both can send them first. Loading: nothing. */
void state_needs(struct state_io *io, uint64_t gpa, uint64_t bytes);
struct state_need {
    uint64_t gpa, bytes;
};
/* What was told so, until the next call for this io. */
const struct state_need *state_needed(const struct state_io *io, unsigned *count);
bool state_failed(const struct state_io *io);
const char *state_error(const struct state_io *io); /* one line naming section and cause, "" when none */

/*
 * Sections may nest. Loading checks name and version <= `version` and returns the version found (writer: `version`). Name and version are constants: what sections a program reads, up to which
 * version, is known without reading one (state_check_parts).
 */
#define state_begin(io, name_, version_)                                                                                                                          \
    __extension__({                                                                                                                                              \
        static const struct state_part state_part_ __attribute__((used, section("state_parts"), aligned(8))) = {name_, version_};                                \
        state_begin_unlisted(io, state_part_.name, state_part_.version);                                                                                         \
    })
struct state_part {
    const char *name;
    unsigned version;
};
/* The same for sections that are in no machine's state, whose version may depend on something. `name` stays as long as `io`. */
unsigned state_begin_unlisted(struct state_io *io, const char *name, unsigned version);
/*
 * A section between others, or last in one, that readers may lack: those that do not know it, or not its version, skip it. 0: loading, and there is none to be read here;
 * then nothing is to be ended. Also 0 after a failure. Several in a row are to be loaded in the order in which they were saved.
 */
unsigned state_begin_optional(struct state_io *io, const char *name, unsigned version);
int state_end(struct state_io *io) __attribute__((warn_unused_result)); /* checks length and CRC */
void state_fail(struct state_io *io, const char *reason);
/*
 * For programs that look at states without knowing parts: reader only; the section that begins here, whatever it is, is skipped after its checksum was looked at. False: there is
 * none, or it is damaged (state_failed). `name` has room for 64 bytes; `body` stays valid as long as the data.
 */
bool state_next(struct state_io *io, char name[64], const void **body, size_t *body_bytes);

/*
 * Who takes a state of a later program, whose newer parts it cannot read, wants to know before it begins. Writer only: an optional section "parts" is put at `place` (state_writer_data's size when no
 * section was open), with names and versions of all sections written so far that are not optional. Reader only: fails when the body of such a section, from state_next, names one that this program
 * does not read.
 */
int state_put_parts(struct state_io *io, size_t place) __attribute__((warn_unused_result));
void state_check_parts(struct state_io *io, const void *body, size_t body_bytes);

void state_bool(struct state_io *io, bool *value);
void state_u8(struct state_io *io, uint8_t *value);
void state_u16(struct state_io *io, uint16_t *value);
void state_u32(struct state_io *io, uint32_t *value);
void state_u64(struct state_io *io, uint64_t *value);
void state_i64(struct state_io *io, int64_t *value);
void state_bytes(struct state_io *io, void *data, size_t size_bytes); /* fixed size */
/* Variable size: saves *size; loads at most capacity, failing above. */
void state_buffer(struct state_io *io, void *data, uint32_t *size_bytes, uint32_t capacity_bytes);
/* Text or NULL. Loading frees *text and allocates anew, at most STATE_STRING_BYTES_MAX long without a zero byte inside; NULL after a failure. */
#define STATE_STRING_BYTES_MAX 65536u
void state_string(struct state_io *io, char **text);

#endif
