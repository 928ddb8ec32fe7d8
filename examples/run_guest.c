/*
 * Boots KERNEL with INITRD through libdoppel, waits for the guest's shell on its console, types a command and a power-off, and shows what it said.
 *
 *     cc run_guest.c $(pkg-config --cflags --libs doppel) -o run_guest && ./run_guest KERNEL INITRD
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <doppel/doppel.h>

/* Shows what the console says up to `text`; false at its end. */
static bool expect(FILE *console, const char *text)
{
    size_t seen = 0;
    for (int c; text[seen] && (c = fgetc(console)) != EOF; putchar(c))
        seen = c == text[seen] ? seen + 1 : c == text[0];
    return !text[seen];
}

int main(int argc, char **argv)
{
    char error[DOPPEL_ERROR_BYTES] = "usage: run_guest KERNEL INITRD";
    struct doppel_config *config = doppel_config_create();
    struct doppel_vm *vm = NULL;
    int input[2], output[2];
    if (argc != 3 || !config || pipe(input) || pipe(output) || doppel_config_set(config, "kernel", argv[1], error) ||
        doppel_config_set(config, "initrd", argv[2], error) || doppel_config_set(config, "memory", "256M", error))
        return fprintf(stderr, "%s\n", error), 2;
    doppel_config_set_stdio(config, input[0], output[1]); /* instead of this program's own */
    if (doppel_vm_create(config, &vm, error) || doppel_vm_start(vm, error))
        return fprintf(stderr, "%s\n", error), 1;
    FILE *console = fdopen(output[0], "r");
    if (expect(console, "~ # "))
        dprintf(input[1], "echo 6 times 7 is $((6 * 7)); poweroff\n");
    expect(console, "Power down");
    enum doppel_end end = doppel_vm_wait(vm);
    doppel_vm_destroy(vm);
    doppel_config_destroy(config);
    return end == DOPPEL_END_SHUTDOWN ? 0 : 1;
}
