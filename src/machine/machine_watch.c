/*
 * Watching a machine: events for one observer, a tap on its console (machine.h). Events are told with whatever locks the place has where they happen, so watch_lock is
 * the innermost; taking it also makes sure that an observer that was removed is not called any more.
 */
#include <string.h>

#include "machine/machine_priv.h"

const struct machine_event_info machine_event_table[MACHINE_EVENT_COUNT] = {
#define EVENT(id, name, help) {name, help},
#include "machine/events.def"
#undef EVENT
};

const char *machine_end_name(enum machine_end end)
{
    static const char *const names[] = {NULL, "shutdown", "reset", "crash", "stopped", "error", "migrated"};
    return names[end];
}

void machine_observe(struct machine *machine, const struct machine_observer *observer)
{
    pthread_mutex_lock(&machine->watch_lock);
    machine->observer = observer ? *observer : (struct machine_observer){0};
    pthread_mutex_unlock(&machine->watch_lock);
}

void machine_tell(struct machine *machine, enum machine_event event, const char *detail)
{
    pthread_mutex_lock(&machine->watch_lock);
    if (machine->observer.event)
        machine->observer.event(machine->observer.ctx, event, detail);
    pthread_mutex_unlock(&machine->watch_lock);
}

static bool is_stdio(const char *spec)
{
    return spec && strcmp(spec, "stdio") == 0;
}

/* The one at which the user sits, or would. */
static struct console *main_console(const struct machine *machine)
{
    const struct machine_config *config = machine->config;
    if (machine->virtio_console_backend && is_stdio(config->virtio_console))
        return machine->virtio_console_backend;
    if (machine->debug_console && is_stdio(config->debug_console))
        return machine->debug_console;
    return machine->serial_console;
}

void machine_console_tap(struct machine *machine, const struct console_tap *tap)
{
    pthread_mutex_lock(&machine->device_lock);
    console_set_tap(main_console(machine), tap);
    pthread_mutex_unlock(&machine->device_lock);
}

size_t machine_console_type(struct machine *machine, const uint8_t *data, size_t size_bytes)
{
    pthread_mutex_lock(&machine->device_lock);
    size_t taken = console_type(main_console(machine), data, size_bytes);
    pthread_mutex_unlock(&machine->device_lock);
    return taken;
}
