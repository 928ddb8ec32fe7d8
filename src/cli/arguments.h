/* Arguments of commands about virtual machines, and what these commands share. Single-threaded. */
#ifndef DOPPEL_CLI_ARGUMENTS_H
#define DOPPEL_CLI_ARGUMENTS_H

#include "cli/cli.h"
#include "control/instance.h"

#define ARGUMENTS_HELP (-1)

struct arguments {
    const char *value[CLI_OPTIONS_MAX]; /* by place in the command's table: NULL not given, "" a flag */
    char **names;
    unsigned name_count;
};

/* argv[0] is the command. 0: go on; ARGUMENTS_HELP: help was printed, all is well; else an exit status, after a message. */
int parse_arguments(int argc, char **argv, struct arguments *out);
/* One option at argv[0] (and argv[1]): how many were used, 0 after a message. */
int take_option(const struct subcommand *command, char **argv, struct arguments *out);
bool knows_option(const struct subcommand *command, const char *argument);
/* `text` NULL: *number stays. An exit status. */
int parse_number(const char *command, const char *option, const char *text, unsigned long max, unsigned long *number);

/* A message on stderr, "doppel: text" for people (cli/report.h); returns status. */
int complain(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Calls `act` for each name, which prints its own messages; STATUS_ERROR when a name is unknown or any returned other than 0. No names: for all. */
int for_each_vm(const struct arguments *arguments, int (*act)(struct instance_info *vm, void *ctx), void *ctx);

/* Whatever it does: nothing of it is left when this returns 0 (vms.c). */
int end_by_force(struct instance_info *vm);

/* Starts an ended one again, in the background, with the arguments it had (start.c). */
int start_again(const struct instance_info *vm);

#endif
