/* The counters of one machine and of its process, as JSON and as text for a metrics collector: two readers of one walk. Requests' thread; machine_lock held. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "control/vm_control_priv.h"

#define PREFIX "doppel_"

/* What the process uses, and then what the machine counts. */
static void walk(struct vm_control *control, struct machine *machine, counter_fn *counter, void *ctx)
{
    struct process_usage usage;
    if (process_usage(control->proc, control->self.pid, &usage) == 0) {
        const struct counter list[] = {
            {.name = "process_cpu_ns", .help = "processor time of the process and its children", .value = usage.cpu_ns},
            {.name = "process_resident_bytes", .help = "memory in which the process has pages, the guest's included", .value = usage.resident_bytes, .gauge = true},
            {.name = "process_threads", .help = "threads of the process and its children", .value = usage.threads, .gauge = true},
        };
        for (size_t i = 0; i < sizeof list / sizeof *list; i++)
            counter(ctx, &list[i]);
    }
    if (machine)
        machine_count(machine, counter, ctx);
}

/* ---- JSON ---- */

static void add_json(void *ctx, const struct counter *counter)
{
    json_t *object = ctx, *value = json_integer((json_int_t)(counter->value & INT64_MAX));
    if (!counter->label) {
        json_object_set_new(object, counter->name, value);
        return;
    }
    json_t *labels = json_object_get(object, counter->name);
    if (!labels) {
        labels = json_object();
        json_object_set_new(object, counter->name, labels);
    }
    json_object_set_new(labels, counter->label_value, value);
}

json_t *vm_statistics(struct vm_control *control, struct machine *machine)
{
    json_t *counters = json_object();
    walk(control, machine, add_json, counters);
    return json_pack("{s:s, s:I, s:o}", "name", control->name, "monotonic_ns", (json_int_t)loop_now_ns(), "counters", counters);
}

/* ---- metrics ---- */

struct sample {
    char name[48], label[16], value_of_label[64];
    const char *help; /* literals */
    uint64_t value;
    bool gauge, written;
};

struct samples {
    struct sample *list;
    unsigned count, room;
};

static void add_sample(void *ctx, const struct counter *counter)
{
    struct samples *all = ctx;
    if (all->count == all->room) {
        unsigned room = all->room ? 2 * all->room : 128;
        struct sample *list = realloc(all->list, room * sizeof *list);
        if (!list)
            return;
        all->list = list;
        all->room = room;
    }
    struct sample *sample = &all->list[all->count++];
    *sample = (struct sample){.help = counter->help, .value = counter->value, .gauge = counter->gauge};
    snprintf(sample->name, sizeof sample->name, "%s%s", counter->name, counter->gauge ? "" : "_total");
    snprintf(sample->label, sizeof sample->label, "%s", counter->label ? counter->label : "");
    snprintf(sample->value_of_label, sizeof sample->value_of_label, "%s", counter->label ? counter->label_value : "");
}

/* Inside quotes. */
static void print_escaped(FILE *out, const char *text)
{
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            fputc('\\', out);
        fputc(*text == '\n' ? ' ' : *text, out);
    }
}

static void print_sample(FILE *out, const struct vm_control *control, const struct sample *sample)
{
    fprintf(out, PREFIX "%s{vm=\"%s\"", sample->name, control->name);
    if (sample->label[0]) {
        fprintf(out, ",%s=\"", sample->label);
        print_escaped(out, sample->value_of_label);
        fputc('"', out);
    }
    fprintf(out, "} %" PRIu64 "\n", sample->value);
}

/* All lines of a name together, as the format wants them. */
static void print_samples(FILE *out, const struct vm_control *control, struct samples *all)
{
    for (unsigned i = 0; i < all->count; i++) {
        struct sample *first = &all->list[i];
        if (first->written)
            continue;
        fprintf(out, "# HELP " PREFIX "%s %s\n# TYPE " PREFIX "%s %s\n", first->name, first->help, first->name, first->gauge ? "gauge" : "counter");
        for (unsigned n = i; n < all->count; n++) {
            if (strcmp(all->list[n].name, first->name) != 0)
                continue;
            print_sample(out, control, &all->list[n]);
            all->list[n].written = true;
        }
    }
}

char *vm_metrics(struct vm_control *control, struct machine *machine, size_t *size_bytes)
{
    struct samples all = {0};
    char *text = NULL;
    FILE *out = open_memstream(&text, size_bytes);
    if (!out)
        return NULL;
    walk(control, machine, add_sample, &all);
    print_samples(out, control, &all);
    free(all.list);
    fclose(out);
    return text;
}
