/* libdoppel: the public interface (include/doppel/doppel.h) over the machine. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "doppel/doppel.h"
#include "machine/config.h"
#include "machine/machine.h"
#include "sandbox/sandbox.h"

struct doppel_config {
    struct machine_config machine;
};

struct doppel_vm {
    struct machine *machine;
};

static int report(int result, const struct error *err, char *text)
{
    if (result && text)
        snprintf(text, DOPPEL_ERROR_BYTES, "%s", err->text[0] ? err->text : strerror(-result));
    return result;
}

struct doppel_config *doppel_config_create(void)
{
    struct doppel_config *config = malloc(sizeof *config);
    if (config)
        machine_config_init(&config->machine);
    return config;
}

void doppel_config_destroy(struct doppel_config *config)
{
    if (!config)
        return;
    machine_config_clear(&config->machine);
    free(config);
}

int doppel_config_set(struct doppel_config *config, const char *key, const char *value, char *error)
{
    struct error err = {0};
    return report(machine_config_set(&config->machine, key, value, &err), &err, error);
}

int doppel_config_load(struct doppel_config *config, const char *path, char *error)
{
    struct error err = {0};
    return report(machine_config_load(&config->machine, path, &err), &err, error);
}

const char *doppel_config_get(const struct doppel_config *config, const char *key)
{
    return machine_config_text(&config->machine, key);
}

void doppel_config_set_stdio(struct doppel_config *config, int input_fd, int output_fd)
{
    config->machine.input_fd = input_fd;
    config->machine.output_fd = output_fd;
}

int doppel_vm_create(const struct doppel_config *config, struct doppel_vm **out, char *error)
{
    struct error err = {0};
    struct doppel_vm *vm = calloc(1, sizeof *vm);
    if (!vm)
        return report(error_set(&err, -ENOMEM, "out of memory"), &err, error);
    int r = machine_create(&vm->machine, &config->machine, &err);
    if (r)
        free(vm);
    else
        *out = vm;
    return report(r, &err, error);
}

int doppel_vm_start(struct doppel_vm *vm, char *error)
{
    struct error err = {0};
    return report(machine_start(vm->machine, &err), &err, error);
}

enum doppel_end doppel_vm_wait(struct doppel_vm *vm)
{
    switch (machine_wait(vm->machine)) {
    case MACHINE_SHUTDOWN:
        return DOPPEL_END_SHUTDOWN;
    case MACHINE_RESET:
        return DOPPEL_END_RESET;
    case MACHINE_CRASH:
        return DOPPEL_END_CRASH;
    case MACHINE_STOPPED:
        return DOPPEL_END_STOPPED;
    default:
        return DOPPEL_END_ERROR;
    }
}

void doppel_vm_destroy(struct doppel_vm *vm)
{
    if (!vm)
        return;
    machine_destroy(vm->machine);
    free(vm);
}

void doppel_vm_power_button(struct doppel_vm *vm)
{
    machine_power_button(vm->machine);
}

void doppel_vm_reset(struct doppel_vm *vm)
{
    machine_reset(vm->machine);
}

void doppel_vm_stop(struct doppel_vm *vm)
{
    machine_stop(vm->machine, MACHINE_STOPPED);
}

int doppel_vm_pause(struct doppel_vm *vm, char *error)
{
    struct error err = {0};
    return report(machine_pause(vm->machine, &err), &err, error);
}

int doppel_vm_resume(struct doppel_vm *vm, char *error)
{
    struct error err = {0};
    return report(machine_resume(vm->machine, &err), &err, error);
}

void doppel_sandbox_begin(void)
{
    sandbox_begin();
}

int doppel_vm_shut_in(struct doppel_vm *vm, char *error)
{
    struct error err = {0};
    return report(machine_shut_in(vm->machine, IN_MAIN, &err), &err, error);
}

void doppel_vm_dump(struct doppel_vm *vm, FILE *out)
{
    machine_dump(vm->machine, out);
}

void doppel_vm_stats(struct doppel_vm *vm, FILE *out)
{
    machine_stats(vm->machine, out);
}

const char *doppel_version(void)
{
    return DOPPEL_VERSION;
}
