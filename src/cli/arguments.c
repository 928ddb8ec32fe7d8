/* The arguments of commands about virtual machines: options from the command's table, and names. Messages and help come from the same table. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/arguments.h"
#include "cli/report.h"

int complain(int status, const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    report_message(text);
    return status;
}

const struct subcommand *command_find(const char *name)
{
    for (const struct subcommand *command = subcommands; command->name; command++)
        if (strcmp(command->name, name) == 0)
            return command;
    return NULL;
}

static int find_long(const struct cli_option *options, const char *text, size_t length)
{
    for (int i = 0; options[i].name; i++)
        if (strlen(options[i].name) == length && strncmp(options[i].name, text, length) == 0)
            return i;
    return -1;
}

static int find_letter(const struct cli_option *options, char letter)
{
    for (int i = 0; options[i].name; i++)
        if (letter && options[i].letter == letter)
            return i;
    return -1;
}

/* --name, --name=value, --name value. Returns how many of the arguments were used, 0 after a message. */
static int take_long(const struct subcommand *command, char **argv, struct arguments *out)
{
    const char *text = argv[0] + 2, *equals = strchr(text, '=');
    size_t length = equals ? (size_t)(equals - text) : strlen(text);
    int i = find_long(command->options, text, length);
    if (i < 0)
        return complain(0, "%s: unknown option \"--%.*s\"; see doppel %s --help", command->name, (int)length, text, command->name);
    if (!command->options[i].argument) {
        out->value[i] = "";
        if (strcmp(command->options[i].name, "json") == 0)
            report_as_json();
        return equals ? complain(0, "%s: --%s takes no value", command->name, command->options[i].name) : 1;
    }
    out->value[i] = equals ? equals + 1 : argv[1];
    return out->value[i] ? equals ? 1 : 2 : complain(0, "%s: --%s needs a value: %s", command->name, command->options[i].name, command->options[i].argument);
}

/* -f, -fn5, -n 5. */
static int take_letters(const struct subcommand *command, char **argv, struct arguments *out)
{
    for (const char *letter = argv[0] + 1; *letter; letter++) {
        int i = find_letter(command->options, *letter);
        if (i < 0)
            return complain(0, "%s: unknown option \"-%c\"; see doppel %s --help", command->name, *letter, command->name);
        out->value[i] = "";
        if (!command->options[i].argument)
            continue;
        out->value[i] = letter[1] ? letter + 1 : argv[1];
        return letter[1] ? 1 : out->value[i] ? 2 : complain(0, "%s: -%c needs a value: %s", command->name, *letter, command->options[i].argument);
    }
    return 1;
}

int take_option(const struct subcommand *command, char **argv, struct arguments *out)
{
    return argv[0][1] == '-' ? take_long(command, argv, out) : take_letters(command, argv, out);
}

bool knows_option(const struct subcommand *command, const char *argument)
{
    if (argument[0] != '-' || !command->options)
        return false;
    return argument[1] == '-' ? find_long(command->options, argument + 2, strcspn(argument + 2, "=")) >= 0 : find_letter(command->options, argument[1]) >= 0;
}

/* What is said about arguments before --json is for the same reader. */
static void look_for_json(const struct subcommand *command, char **argv)
{
    for (; *argv && strcmp(*argv, "--") != 0; argv++)
        if (strcmp(*argv, "--json") == 0 && knows_option(command, *argv))
            report_as_json();
}

int parse_arguments(int argc, char **argv, struct arguments *out)
{
    const struct subcommand *command = command_find(argv[0]);
    bool only_names = false;
    *out = (struct arguments){.names = argv + 1};
    look_for_json(command, argv + 1);
    for (int i = 1; i < argc;) {
        if (only_names || argv[i][0] != '-' || !argv[i][1]) {
            argv[1 + out->name_count++] = argv[i++]; /* moves them to the front: what is there was looked at */
        } else if (strcmp(argv[i], "--") == 0) {
            only_names = true;
            i++;
        } else if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            print_command_help(stdout, command);
            return ARGUMENTS_HELP;
        } else {
            int used = take_option(command, argv + i, out);
            if (!used)
                return STATUS_USAGE;
            i += used;
        }
    }
    if (command->names == NAMES_NONE && out->name_count)
        return complain(STATUS_USAGE, "%s: unexpected argument \"%s\"; see doppel %s --help", command->name, out->names[0], command->name);
    if ((command->names == NAMES_SOME || command->names == NAMES_ONE) && !out->name_count)
        return complain(STATUS_USAGE, "%s: which virtual machine? usage: doppel %s %s", command->name, command->name, command->argument);
    if (command->names == NAMES_ONE && out->name_count > 1)
        return complain(STATUS_USAGE, "%s: one virtual machine at a time", command->name);
    return 0;
}

int parse_number(const char *command, const char *option, const char *text, unsigned long max, unsigned long *number)
{
    char *end;
    if (!text)
        return 0;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno || value > max)
        return complain(STATUS_USAGE, "%s: %s: \"%s\" is not a number from 0 to %lu", command, option, text, max);
    *number = value;
    return 0;
}
