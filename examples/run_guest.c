/*
 * A program that runs a guest through libdoppel: boots KERNEL with INITRD, presses the power button after SECONDS, and says how it ended.
 *
 *     run_guest KERNEL INITRD SECONDS
 */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <doppel/doppel.h>

int main(int argc, char **argv)
{
    static const char *const ends[] = {"powered off", "reset", "crashed", "was stopped", "failed"};
    char error[DOPPEL_ERROR_BYTES];
    struct doppel_vm *vm = NULL;
    if (argc != 4) {
        fprintf(stderr, "usage: run_guest KERNEL INITRD SECONDS\n");
        return 2;
    }
    struct doppel_config *config = doppel_config_create();
    if (!config || doppel_config_set(config, "kernel", argv[1], error) || doppel_config_set(config, "initrd", argv[2], error) ||
        doppel_config_set(config, "memory", "256M", error) || doppel_vm_create(config, &vm, error) || doppel_vm_start(vm, error)) {
        fprintf(stderr, "run_guest: %s\n", config ? error : "out of memory");
        doppel_vm_destroy(vm);
        doppel_config_destroy(config);
        return 1;
    }
    sleep((unsigned)atoi(argv[3]));
    doppel_vm_power_button(vm);
    enum doppel_end end = doppel_vm_wait(vm);
    doppel_vm_stats(vm, stdout);
    doppel_vm_destroy(vm);
    doppel_config_destroy(config);
    printf("the guest %s\n", ends[end]);
    return end == DOPPEL_END_SHUTDOWN ? 0 : 1;
}
