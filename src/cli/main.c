/* doppel: finds the subcommand and runs it. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "cli/cli.h"

const struct subcommand subcommands[] = {
    {"run", run_main, "OPTIONS", "run a virtual machine in the foreground"},
    {"serve", serve_main, "--api-sock PATH [OPTIONS]", "run a virtual machine behind an HTTP API on a Unix socket"},
    {"completion", completion_main, "bash|zsh|fish", "print a completion script for a shell"},
    {"manual", manual_main, "", "print the manual page's source (man -l -)"},
    {"version", version_main, "", "print the version"},
    {"help", help_main, "[COMMAND]", "explain a command"},
    {0},
};

/* Under the name that these tools start, all arguments are the API server's. */
static bool is_compatible_name(const char *path)
{
    const char *name = strrchr(path, '/');
    return strcmp(name ? name + 1 : path, "firecracker") == 0;
}

int main(int argc, char **argv)
{
    if (argc && is_compatible_name(argv[0]))
        return serve_main(argc, argv);
    if (argc < 2) {
        print_usage(stderr);
        return STATUS_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)
        return help_main(1, argv);
    if (strcmp(argv[1], "--version") == 0)
        return version_main(1, argv);
    for (const struct subcommand *command = subcommands; command->name; command++)
        if (strcmp(command->name, argv[1]) == 0)
            return command->main(argc - 1, argv + 1);
    fprintf(stderr, "doppel: unknown command \"%s\"; doppel help lists them\n", argv[1]);
    return STATUS_USAGE;
}
