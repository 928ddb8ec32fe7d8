/*
 * Tracing that is switched on and off while the machine runs: what engines write to vcpu->trace (engine.h) goes line by line to a sink, with the time and the processor in front.
 * Each vCPU has a stream of its own, made when tracing is first wanted and kept until the machine's end. Switching is done with all vCPUs parked.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "machine/machine_priv.h"

#define LINE_BYTES 256u

struct vcpu_trace {
    struct machine *machine;
    unsigned index;
    FILE *stream;
    char line[LINE_BYTES];
    size_t count;
};

struct machine_trace {
    struct machine_trace_sink sink;
    uint64_t began_ns;
    bool on;
    struct vcpu_trace vcpu[];
};

static void end_line(struct vcpu_trace *vcpu)
{
    struct machine_trace *trace = vcpu->machine->live_trace;
    char line[LINE_BYTES + 48];
    uint64_t microseconds = (loop_now_ns() - trace->began_ns) / 1000;
    int length = snprintf(line, sizeof line, "%llu.%06u cpu%u %.*s\n", (unsigned long long)microseconds / 1000000, (unsigned)(microseconds % 1000000), vcpu->index,
                          (int)vcpu->count, vcpu->line);
    vcpu->count = 0;
    if (trace->on)
        trace->sink.line(trace->sink.ctx, line, (size_t)length);
}

static ssize_t write_stream(void *cookie, const char *data, size_t size_bytes)
{
    struct vcpu_trace *vcpu = cookie;
    for (size_t i = 0; i < size_bytes; i++) {
        if (data[i] == '\n')
            end_line(vcpu);
        else if (vcpu->count < LINE_BYTES)
            vcpu->line[vcpu->count++] = data[i];
    }
    return (ssize_t)size_bytes;
}

void machine_trace_destroy(struct machine *machine)
{
    for (unsigned i = 0; machine->live_trace && i < machine->cpu_count; i++)
        if (machine->live_trace->vcpu[i].stream)
            fclose(machine->live_trace->vcpu[i].stream);
    free(machine->live_trace);
    machine->live_trace = NULL;
}

static int make_streams(struct machine *machine)
{
    struct machine_trace *trace = calloc(1, sizeof *trace + machine->cpu_count * sizeof *trace->vcpu);
    machine->live_trace = trace;
    for (unsigned i = 0; trace && i < machine->cpu_count; i++) {
        trace->vcpu[i] = (struct vcpu_trace){.machine = machine, .index = i};
        trace->vcpu[i].stream = fopencookie(&trace->vcpu[i], "w", (cookie_io_functions_t){.write = write_stream});
        if (!trace->vcpu[i].stream || setvbuf(trace->vcpu[i].stream, NULL, _IOLBF, BUFSIZ)) {
            machine_trace_destroy(machine);
            return -ENOMEM;
        }
    }
    return trace ? 0 : -ENOMEM;
}

FILE *machine_vcpu_trace(const struct machine *machine, unsigned index)
{
    return machine->live_trace && machine->live_trace->on ? machine->live_trace->vcpu[index].stream : machine->trace;
}

/* Everything stands still. */
static int change(struct machine *machine, void *ctx, struct error *err)
{
    const struct machine_trace_sink *sink = ctx;
    struct machine_trace *trace = machine->live_trace;
    trace->on = sink != NULL;
    if (sink) {
        trace->sink = *sink;
        trace->began_ns = loop_now_ns();
    }
    for (unsigned i = 0; i < machine->cpu_count; i++)
        machine->vcpu[i].vcpu->trace = machine_vcpu_trace(machine, i);
    return 0;
}

int machine_trace(struct machine *machine, const struct machine_trace_sink *sink, struct error *err)
{
    if (machine->trace)
        return error_set(err, -EBUSY, "the virtual machine is traced to %s already", machine->config->trace);
    if (!machine->live_trace && !sink)
        return 0;
    if (!machine->live_trace && make_streams(machine))
        return error_set(err, -ENOMEM, "out of memory");
    return machine_call_still(machine, change, (void *)sink, err);
}
