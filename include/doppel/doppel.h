/*
 * libdoppel: virtual machines from a C program. The `doppel` command is a client of this interface.
 *
 *     struct doppel_config *config = doppel_config_create();
 *     doppel_config_set(config, "kernel", "vmlinuz", error);
 *     doppel_config_set(config, "memory", "512M", error);
 *     doppel_config_set(config, "disk", "disk.img,readonly", error);   (repeatable keys add)
 *     struct doppel_vm *vm;
 *     if (doppel_vm_create(config, &vm, error) == 0) {
 *         doppel_vm_start(vm);
 *         enum doppel_end end = doppel_vm_wait(vm);
 *         doppel_vm_destroy(vm);
 *     }
 *
 * Every function that can fail returns 0 or -errno and fills `error`, DOPPEL_ERROR_BYTES long (may be NULL), with one line for people.
 * `config` must outlive the VM made from it. Threading: a VM's functions may be called from any thread; not from a signal handler.
 */
#ifndef DOPPEL_DOPPEL_H
#define DOPPEL_DOPPEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DOPPEL_ERROR_BYTES 512

struct doppel_config;
struct doppel_vm;

/* Configuration: keys are the long options of `doppel run` without the dashes, values their texts. */
struct doppel_config *doppel_config_create(void);
void doppel_config_destroy(struct doppel_config *config);
int doppel_config_set(struct doppel_config *config, const char *key, const char *value, char *error);
/* A JSON object whose members are the same keys; arrays for repeatable keys. Unknown keys are errors. */
int doppel_config_load(struct doppel_config *config, const char *path, char *error);

/* The value of kernel, initrd, append, trace, pid-file, stats or sandbox; NULL when not set. Owned by config. */
const char *doppel_config_get(const struct doppel_config *config, const char *key);

/* Descriptors for console "stdio"; default 0 and 1. Not closed. */
void doppel_config_set_stdio(struct doppel_config *config, int input_fd, int output_fd);

/* How a VM ended. */
enum doppel_end {
    DOPPEL_END_SHUTDOWN = 0, /* the guest powered off */
    DOPPEL_END_RESET,        /* the guest reset, and on-reset is exit */
    DOPPEL_END_CRASH,        /* triple fault, or the guest reported a panic and on-panic is exit */
    DOPPEL_END_STOPPED,      /* doppel_vm_stop */
    DOPPEL_END_ERROR,        /* trouble on the host */
};

/* Makes a VM, loads its kernel and opens its files; nothing runs yet. */
int doppel_vm_create(const struct doppel_config *config, struct doppel_vm **vm, char *error);
int doppel_vm_start(struct doppel_vm *vm, char *error); /* its processors run when this returns */
enum doppel_end doppel_vm_wait(struct doppel_vm *vm); /* blocks */
void doppel_vm_destroy(struct doppel_vm *vm);         /* stops first when needed */

void doppel_vm_power_button(struct doppel_vm *vm); /* asks the guest to power off (ACPI) */
void doppel_vm_reset(struct doppel_vm *vm);        /* as by a reset button; on-reset decides what happens */
void doppel_vm_stop(struct doppel_vm *vm); /* pulls the plug; acknowledged flushes are safe */
int doppel_vm_pause(struct doppel_vm *vm, char *error); /* returns with every processor at rest; before doppel_vm_start: it starts paused */
int doppel_vm_resume(struct doppel_vm *vm, char *error); /* -ECANCELED from doppel_vm_pause of another thread that still waits */

/*
 * The sandbox (option "sandbox"). A VM's own threads enter it by themselves. doppel_sandbox_begin gives the whole process namespaces of its own: first thing in
 * main, with one thread. doppel_vm_shut_in leaves the calling thread only what it takes to wait for the VM and to destroy it; after the start, on each of the program's own threads.
 */
void doppel_sandbox_begin(void);
int doppel_vm_shut_in(struct doppel_vm *vm, char *error);

/* One screen of state: processors, interrupt controllers, queues, counters. */
void doppel_vm_dump(struct doppel_vm *vm, FILE *out);
/* Counters, one a line: "name value help". */
void doppel_vm_stats(struct doppel_vm *vm, FILE *out);

const char *doppel_version(void); /* "0.1.0" */

#ifdef __cplusplus
}
#endif

#endif
