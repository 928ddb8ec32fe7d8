/* The `doppel` program: one file a subcommand, one line a subcommand in main.c's table. */
#ifndef DOPPEL_CLI_CLI_H
#define DOPPEL_CLI_CLI_H

#include <stdio.h>

/* Exit statuses. */
enum exit_status {
    STATUS_SHUTDOWN = 0, /* the guest powered off; also success of other commands */
    STATUS_ERROR = 1,    /* trouble on the host while the guest ran */
    STATUS_USAGE = 2,    /* bad option, file or configuration: nothing was started */
    STATUS_RESET = 3,    /* the guest reset, with --on-reset exit */
    STATUS_CRASH = 4,    /* the guest died: triple fault, or panic with --on-panic exit */
    STATUS_STOPPED = 5,  /* stopped from outside: Ctrl-A x or a second SIGTERM */
};

struct subcommand {
    const char *name;
    int (*main)(int argc, char **argv); /* argv[0] is the subcommand's name */
    const char *argument, *help;
};

extern const struct subcommand subcommands[];

int serve_main(int argc, char **argv);
int run_main(int argc, char **argv);
int help_main(int argc, char **argv);
int version_main(int argc, char **argv);
int completion_main(int argc, char **argv);
int manual_main(int argc, char **argv);

void print_usage(FILE *out);
void print_run_help(FILE *out);

#endif
