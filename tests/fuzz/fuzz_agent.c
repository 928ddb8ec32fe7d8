/*
 * Fuzz target: frames between `doppel exec` and the agent, in pieces of sizes that the input chooses, and the bodies of EXEC and IDENTITY. A request that is taken must
 * survive being written and taken again.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "agent/protocol.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int condition)
{
    if (!condition)
        abort();
}

static void take_exec(const struct agent_frame *frame)
{
    static struct agent_exec exec, again;
    static uint8_t body[AGENT_BODY_MAX];
    if (agent_exec_parse(&exec, frame->body, frame->size_bytes) < 0)
        return;
    must(exec.argument_count > 0 && exec.argument[exec.argument_count] == NULL && exec.variable[exec.variable_count] == NULL);
    int size = agent_exec_format(&exec, body);
    must(size == (int)frame->size_bytes && memcmp(body, frame->body, frame->size_bytes) == 0);
    must(agent_exec_parse(&again, body, (uint32_t)size) == 0 && again.argument_count == exec.argument_count);
}

static void take_identity(const struct agent_frame *frame)
{
    struct agent_identity identity;
    uint8_t body[AGENT_IDENTITY_BYTES_MAX];
    if (agent_identity_parse(&identity, frame->body, frame->size_bytes) < 0)
        return;
    must(agent_identity_format(&identity, body) == frame->size_bytes && memcmp(body, frame->body, frame->size_bytes) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct agent_reader reader;
    struct agent_frame frame;
    int result = 0;
    reader.start = reader.end = 0;
    for (size_t done = 0; done < size && result >= 0;) {
        size_t room, part = 1 + data[done] * 7u;
        uint8_t *at = agent_reader_room(&reader, &room);
        must(room > 0);
        if (part > room)
            part = room;
        if (part > size - done)
            part = size - done;
        memcpy(at, data + done, part);
        agent_reader_add(&reader, part);
        done += part;
        while ((result = agent_reader_next(&reader, &frame)) == 1) {
            must(frame.size_bytes <= AGENT_BODY_MAX && frame.body >= reader.data && frame.body + frame.size_bytes <= reader.data + reader.end);
            if (frame.type == AGENT_EXEC)
                take_exec(&frame);
            if (frame.type == AGENT_IDENTITY)
                take_identity(&frame);
        }
    }
    return 0;
}
