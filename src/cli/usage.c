/* What virtual machines use (usage.h): names of the counters, and sums over devices. */
#include "cli/usage.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "control/client.h"

#define ANSWER_MS 2000

static const struct {
    const char *counter;
    size_t offset;
} fields[] = {
    {"process_cpu_ns", offsetof(struct usage, cpu_ns)},
    {"process_resident_bytes", offsetof(struct usage, resident_bytes)},
    {"memory_bytes", offsetof(struct usage, guest_bytes)},
    {"memory_resident", offsetof(struct usage, guest_used_bytes)},
    {"block_read_bytes", offsetof(struct usage, disk_read_bytes)},
    {"block_write_bytes", offsetof(struct usage, disk_write_bytes)},
    {"net_rx_bytes_count", offsetof(struct usage, net_rx_bytes)},
    {"net_tx_bytes_count", offsetof(struct usage, net_tx_bytes)},
};

/* A number, or several with labels. */
static uint64_t sum(const json_t *counter)
{
    uint64_t total = 0;
    const char *label;
    json_t *value;
    if (json_is_integer(counter))
        return (uint64_t)json_integer_value(counter);
    json_object_foreach((json_t *)counter, label, value)
        total += (uint64_t)json_integer_value(value);
    return total;
}

static void read_exits(struct usage *usage, const json_t *counters)
{
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)counters, name, value)
    {
        if (strncmp(name, "exit_", 5) != 0 || usage->exit_count == USAGE_EXITS_MAX)
            continue;
        struct usage_exit *exit = &usage->exit[usage->exit_count++];
        snprintf(exit->name, sizeof exit->name, "%s", name + 5);
        exit->count = sum(value);
    }
}

static int take(struct instance_info *vm, void *ctx)
{
    struct usages *usages = ctx;
    if (vm->life != INSTANCE_ALIVE)
        return 0;
    struct usage *list = realloc(usages->list, (usages->count + 1) * sizeof *list);
    if (!list)
        return STATUS_ERROR;
    usages->list = list;
    struct usage *usage = &list[usages->count++];
    *usage = (struct usage){0};
    strcpy(usage->name, vm->name);
    strcpy(usage->state, vm->state);
    usage->answered = client_request(vm->name, "GET", "/doppel/v1/statistics", NULL, ANSWER_MS, &usage->statistics, NULL) == 0;
    const json_t *counters = json_object_get(usage->statistics, "counters");
    usage->when_ns = (uint64_t)json_integer_value(json_object_get(usage->statistics, "monotonic_ns"));
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        *(uint64_t *)((char *)usage + fields[i].offset) = sum(json_object_get(counters, fields[i].counter));
    read_exits(usage, counters);
    return 0;
}

int usages_take(const struct arguments *arguments, struct usages *usages)
{
    *usages = (struct usages){0};
    return for_each_vm(arguments, take, usages);
}

void usages_take_again(const struct usages *before, struct usages *now)
{
    struct instance_info vm;
    *now = (struct usages){0};
    for (unsigned i = 0; i < before->count; i++) {
        if (instance_read(before->list[i].name, &vm, NULL))
            continue; /* it has gone meanwhile */
        (void)!take(&vm, now);
        instance_info_clear(&vm);
    }
}

void usages_free(struct usages *usages)
{
    for (unsigned i = 0; i < usages->count; i++)
        json_decref(usages->list[i].statistics);
    free(usages->list);
    *usages = (struct usages){0};
}

json_t *usages_json(const struct usages *usages)
{
    json_t *list = json_array();
    for (unsigned i = 0; i < usages->count; i++) {
        json_t *object = json_pack("{s:s, s:s}", "name", usages->list[i].name, "state", usages->list[i].state);
        if (usages->list[i].statistics)
            json_object_update_missing(object, usages->list[i].statistics);
        json_array_append_new(list, object);
    }
    return list;
}

const struct usage *usages_find(const struct usages *usages, const struct usage *usage)
{
    for (unsigned i = 0; i < usages->count; i++)
        if (strcmp(usages->list[i].name, usage->name) == 0)
            return &usages->list[i];
    return NULL;
}

/* A machine that was restarted counts from 0 again. */
static double per_second(uint64_t before, uint64_t now, double seconds)
{
    return now > before ? (double)(now - before) / seconds : 0;
}

static void rank(struct rates *rates, const char *name, double rate)
{
    struct usage_exit new = {.count = (uint64_t)rate};
    snprintf(new.name, sizeof new.name, "%s", name);
    for (unsigned i = 0; i < 3 && new.count; i++) {
        if (rates->top[i].count >= new.count)
            continue;
        struct usage_exit old = rates->top[i];
        rates->top[i] = new;
        new = old;
    }
}

struct rates usage_rates(const struct usage *before, const struct usage *now)
{
    struct rates rates = {0};
    if (!before || !before->answered || !now->answered || now->when_ns <= before->when_ns)
        return rates;
    double seconds = (double)(now->when_ns - before->when_ns) / 1e9;
    rates.cpu = per_second(before->cpu_ns, now->cpu_ns, seconds) / 1e9;
    rates.disk_read = per_second(before->disk_read_bytes, now->disk_read_bytes, seconds);
    rates.disk_write = per_second(before->disk_write_bytes, now->disk_write_bytes, seconds);
    rates.net_rx = per_second(before->net_rx_bytes, now->net_rx_bytes, seconds);
    rates.net_tx = per_second(before->net_tx_bytes, now->net_tx_bytes, seconds);
    for (unsigned i = 0; i < now->exit_count && i < before->exit_count; i++) {
        double rate = per_second(before->exit[i].count, now->exit[i].count, seconds);
        rates.exits += rate;
        rank(&rates, now->exit[i].name, rate);
    }
    return rates;
}

void print_bytes(double bytes, char text[16])
{
    static const char units[] = " KMGT";
    unsigned unit = 0;
    for (; bytes >= 1000 && unit < sizeof units - 2; unit++)
        bytes /= 1024;
    if (unit == 0)
        snprintf(text, 16, "%.0f", bytes);
    else
        snprintf(text, 16, "%.*f%c", bytes < 10, bytes, units[unit]);
}
