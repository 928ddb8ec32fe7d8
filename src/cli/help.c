/*
 * What doppel says about itself: usage, help, version, completion scripts and the manual page, all from the tables of options and subcommands. Names of virtual machines
 * are completed by asking doppel ps.
 */
#include <stdio.h>
#include <string.h>

#include "cli/arguments.h"
#include "cli/report.h"
#include "doppel/doppel.h"
#include "machine/config.h"

static const struct {
    int status;
    const char *meaning;
} statuses[] = {
    {STATUS_SHUTDOWN, "the guest powered off"},
    {STATUS_ERROR, "trouble on the host while the guest ran"},
    {STATUS_USAGE, "bad option, file or configuration; nothing was started"},
    {STATUS_RESET, "the guest reset, with --on-reset exit"},
    {STATUS_CRASH, "the guest died: triple fault, or a panic with --on-panic exit"},
    {STATUS_STOPPED, "stopped from outside: Ctrl-A x, SIGHUP or a second SIGTERM"},
    {STATUS_MIGRATED, "it was migrated, and runs elsewhere"},
};
#define STATUS_COUNT (sizeof statuses / sizeof *statuses)

static const struct {
    const char *key, *meaning;
} keys[] = {
#define KEY(character, help, function) {(const char[]){'C', 't', 'r', 'l', '-', 'A', ' ', character, 0}, help},
#include "machine/keys.def"
#undef KEY
    {"Ctrl-A Ctrl-A", "send Ctrl-A to the guest"},
};
#define KEY_COUNT (sizeof keys / sizeof *keys)

static const struct {
    const char *signal, *meaning;
} signals[] = {
    {"SIGTERM, SIGINT", "press the power button; a second one ends the machine"},
    {"SIGHUP", "end the machine"},
    {"SIGUSR1", "print the machine's state to stderr"},
};
#define SIGNAL_COUNT (sizeof signals / sizeof *signals)

static const struct {
    const char *term, *meaning;
} json_rules[] = {
    {"Result", "what a command has done or found is one JSON value on standard output: an array where several machines, snapshots or files can be named or made (in it is what was done), "
               "else an object. A machine is told as ps --json does. Without a result there is nothing or an empty array"},
    {"Lines", "of events, logs, trace and top each line is a value"},
    {"Messages", "each is an object on a line of standard error, with \"message\" and, when it comes from a machine that starts, \"level\". Whether a command failed says its exit status, "
                 "which is the same as without --json"},
    {"exec", "standard output and standard error of the command are members \"stdout\" and \"stderr\" (their first 16 MiB; \"truncated\" tells when there was more), or \"stdout_base64\" "
             "and \"stderr_base64\" when they are not UTF-8. --json comes before the command"},
};
#define JSON_RULE_COUNT (sizeof json_rules / sizeof *json_rules)

static const char example[] = "doppel run --kernel vmlinuz --initrd initrd.img --memory 1G --cpus 2 \\\n"
                              "    --disk disk.img --net user,forward=tcp:2222:22 --append \"console=ttyS0 root=/dev/vda\"";

void print_usage(FILE *out)
{
    fprintf(out, "usage: doppel COMMAND [OPTIONS]\n\ncommands:\n");
    for (const struct subcommand *command = subcommands; command->name; command++)
        fprintf(out, "  %-12s %s\n", command->name, command->help);
    fprintf(out, "\nStart a guest:\n  %s\n\n\"doppel COMMAND --help\" explains a command, \"doppel run --help\" lists all options of a machine.\n", example);
}

static void print_options(FILE *out, const struct cli_option *options)
{
    for (; options->name; options++) {
        fprintf(out, "  %c%c%s--%s%s%s\n", options->letter ? '-' : ' ', options->letter ? options->letter : ' ', options->letter ? ", " : "  ", options->name,
                options->argument ? " " : "", options->argument ? options->argument : "");
        fprintf(out, "        %s\n", options->help);
    }
}

void print_command_help(FILE *out, const struct subcommand *command)
{
    fprintf(out, "usage: doppel %s%s%s\n\n%c%s.\n", command->name, command->argument[0] ? " " : "", command->argument, command->help[0] - 'a' + 'A', command->help + 1);
    if (command->names == NAMES_ANY)
        fprintf(out, "Without names: of all virtual machines.\n");
    if (command->names >= NAMES_ANY)
        fprintf(out, "Names may be shortened as long as only one virtual machine is meant.\n");
    if (command->options->name) {
        fprintf(out, "\noptions:\n");
        print_options(out, command->options);
    }
    if (command->names == NAMES_FIRST)
        fprintf(out, "\nexit status: exec: the command's, 128 + N when signal N ended it, 126 or 127 when it could not be run; 125 no answer from the guest; 2 bad arguments\n");
    else if (command->names != NAMES_OWN)
        fprintf(out, "\nexit status: 0 done, 1 failed, 2 bad arguments\n");
}

void print_run_help(FILE *out)
{
    const struct subcommand *run = command_find("run");
    fprintf(out, "usage: doppel run --kernel FILE [OPTIONS]\n\nRuns a virtual machine, in the foreground unless told otherwise.\n\noptions:\n");
    print_options(out, run->options);
    for (const struct option_info *option = option_table; option->key; option++) {
        fprintf(out, "      --%s%s%s%s\n", option->key, option->argument ? " " : "", option->argument ? option->argument : "",
                option->flags & OPT_MANY ? "   (repeatable)" : "");
        fprintf(out, "        %s\n", option->help);
    }
    fprintf(out, "\nkeys while a terminal is attached:\n");
    for (size_t i = 0; i < KEY_COUNT; i++)
        fprintf(out, "  %-14s %s\n", keys[i].key, keys[i].meaning);
    fprintf(out, "\nsignals:\n");
    for (size_t i = 0; i < SIGNAL_COUNT; i++)
        fprintf(out, "  %-16s %s\n", signals[i].signal, signals[i].meaning);
    fprintf(out, "\nexit status:\n");
    for (size_t i = 0; i < STATUS_COUNT; i++)
        fprintf(out, "  %d  %s\n", statuses[i].status, statuses[i].meaning);
    fprintf(out, "\nexample:\n  %s\n", example);
}

/* Its options are those of the machine, too. */
static bool is_run(const struct subcommand *command)
{
    return command->main == run_main;
}

static json_t *options_json(const struct cli_option *options)
{
    json_t *list = json_array();
    for (; options->name; options++)
        json_array_append_new(list, json_pack("{s:s, s:s, s:s?, s:s}", "name", options->name, "letter", (const char[]){options->letter, 0}, "argument", options->argument, "help", options->help));
    return list;
}

static json_t *command_json(const struct subcommand *command)
{
    json_t *options = options_json(command->options);
    for (const struct option_info *option = option_table; option->key && is_run(command); option++)
        json_array_append_new(options, json_pack("{s:s, s:s, s:s?, s:s}", "name", option->key, "letter", "", "argument", option->argument, "help", option->help));
    return json_pack("{s:s, s:s, s:s, s:o}", "name", command->name, "arguments", command->argument, "help", command->help, "options", options);
}

int help_main(int argc, char **argv)
{
    struct arguments arguments;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (arguments.name_count > 1)
        return complain(STATUS_USAGE, "help: unexpected argument \"%s\"; see doppel help --help", arguments.names[1]);
    const struct subcommand *command = arguments.name_count ? command_find(arguments.names[0]) : NULL;
    if (arguments.name_count && !command)
        return complain(STATUS_USAGE, "unknown command \"%s\"; doppel help lists them", arguments.names[0]);
    if (report_is_json()) {
        report_list();
        for (const struct subcommand *each = subcommands; each->name; each++)
            if (!command || each == command)
                report(command_json(each), "%s", each->name);
    } else if (!command) {
        print_usage(stdout);
    } else if (is_run(command)) {
        print_run_help(stdout);
    } else {
        print_command_help(stdout, command);
    }
    return 0;
}

int version_main(int argc, char **argv)
{
    struct arguments arguments;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    report(json_pack("{s:s, s:s}", "program", "doppel", "version", doppel_version()), "doppel %s", doppel_version());
    return 0;
}

/* ---- completion ---- */

static bool takes_vms(const struct subcommand *command)
{
    return command->names >= NAMES_ANY || (command->words && command->words[0] == '@');
}

static void print_commands(void)
{
    for (const struct subcommand *command = subcommands; command->name; command++)
        printf("%s%s", command == subcommands ? "" : " ", command->name);
}

static void print_words(const struct subcommand *command)
{
    if (command->words && command->words[0] == '?')
        print_commands();
    else if (command->words)
        printf("%s", command->words + (command->words[0] == '@'));
}

/* Values of run's options that are words; what is a file's name is left to the shell. */
static void complete_bash_values(void)
{
    for (const struct option_info *option = option_table; option->key; option++) {
        if (option->argument && strchr(option->argument, '|') && !strchr(option->argument, '[')) {
            printf("        --%s) COMPREPLY=($(compgen -W '", option->key);
            for (const char *c = option->argument; *c; c++)
                putchar(*c == '|' ? ' ' : *c);
            printf("' -- \"$cur\")); return ;;\n");
        } else if (option->argument && strncmp(option->argument, "FILE", 4) == 0) {
            printf("        --%s) return ;;\n", option->key);
        }
    }
}

static void complete_bash_command(const struct subcommand *command)
{
    printf("    %s)\n", command->name);
    if (is_run(command)) {
        printf("        case $prev in\n");
        complete_bash_values();
        printf("        esac\n");
    }
    printf("        COMPREPLY=($(compgen -W \"");
    for (const struct cli_option *option = command->options; option->name; option++)
        printf("--%s ", option->name);
    for (const struct option_info *option = option_table; is_run(command) && option->key; option++)
        printf("--%s ", option->key);
    print_words(command);
    printf(" --help%s\" -- \"$cur\")) ;;\n", takes_vms(command) ? " $(doppel ps --all --quiet 2>/dev/null)" : "");
}

/* Where nothing else fits, the shell offers files. */
static void complete_bash(void)
{
    printf("_doppel()\n{\n    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}\n    COMPREPLY=()\n    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
           "        COMPREPLY=($(compgen -W '");
    print_commands();
    printf("' -- \"$cur\"))\n        return\n    fi\n    case ${COMP_WORDS[1]} in\n");
    for (const struct subcommand *command = subcommands; command->name; command++)
        complete_bash_command(command);
    printf("    esac\n}\ncomplete -o default -F _doppel doppel\n");
}

/* Single quotes end and reopen around an escaped one, as shells want it. */
static void print_quoted(const char *text, const char *also_escape)
{
    for (; *text; text++) {
        if (*text == '\'')
            printf("'\\''");
        else if (strchr(also_escape, *text))
            printf("\\%c", *text);
        else
            putchar(*text);
    }
}

static void complete_zsh_option(const char *name, const char *help, const char *argument, bool many)
{
    printf(" \\\n        '%s--%s[", many ? "*" : "", name);
    print_quoted(help, "[]:");
    printf("]%s'", !argument ? "" : strncmp(argument, "FILE", 4) == 0 ? ":file:_files" : ":value:");
}

static void complete_zsh_command(const struct subcommand *command)
{
    printf("%s)\n    _arguments", command->name);
    for (const struct cli_option *option = command->options; option->name; option++)
        complete_zsh_option(option->name, option->help, option->argument, false);
    for (const struct option_info *option = option_table; is_run(command) && option->key; option++)
        complete_zsh_option(option->key, option->help, option->argument, option->flags & OPT_MANY);
    printf(" \\\n        '*: :{");
    if (command->words) {
        printf("compadd -- ");
        print_words(command);
        printf("; ");
    }
    printf("%s}' ;;\n", takes_vms(command) ? "_doppel_vms" : "_files");
}

static void complete_zsh(void)
{
    printf("#compdef doppel\n_doppel_vms() { compadd -- ${(f)\"$(doppel ps --all --quiet 2>/dev/null)\"} }\nif (( CURRENT == 2 )); then\n    _values command");
    for (const struct subcommand *command = subcommands; command->name; command++) {
        printf(" '%s[", command->name);
        print_quoted(command->help, "[]");
        printf("]'");
    }
    printf("\n    return\nfi\ncase $words[2] in\n");
    for (const struct subcommand *command = subcommands; command->name; command++)
        complete_zsh_command(command);
    printf("esac\n");
}

static void complete_fish_option(const struct subcommand *command, const char *name, const char *help, const char *argument)
{
    printf("complete -c doppel -n '__fish_seen_subcommand_from %s' -l %s %s -d '", command->name, name, argument ? "-r" : "");
    print_quoted(help, "");
    printf("'\n");
}

static void complete_fish_command(const struct subcommand *command)
{
    printf("complete -c doppel -n __fish_use_subcommand -f -a %s -d '", command->name);
    print_quoted(command->help, "");
    printf("'\n");
    if (takes_vms(command))
        printf("complete -c doppel -n '__fish_seen_subcommand_from %s' -f -a '(doppel ps --all --quiet 2>/dev/null)'\n", command->name);
    if (command->words) {
        printf("complete -c doppel -n '__fish_seen_subcommand_from %s' -a '", command->name);
        print_words(command);
        printf("'\n");
    }
    for (const struct cli_option *option = command->options; option->name; option++)
        complete_fish_option(command, option->name, option->help, option->argument);
    for (const struct option_info *option = option_table; is_run(command) && option->key; option++)
        complete_fish_option(command, option->key, option->help, option->argument);
}

static void complete_fish(void)
{
    for (const struct subcommand *command = subcommands; command->name; command++)
        complete_fish_command(command);
}

int completion_main(int argc, char **argv)
{
    static const struct {
        const char *shell;
        void (*print)(void);
    } shells[] = {{"bash", complete_bash}, {"zsh", complete_zsh}, {"fish", complete_fish}};
    struct arguments arguments;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (arguments.name_count > 1)
        return complain(STATUS_USAGE, "completion: unexpected argument \"%s\"; see doppel completion --help", arguments.names[1]);
    for (size_t i = 0; arguments.name_count && i < sizeof shells / sizeof *shells; i++) {
        if (strcmp(shells[i].shell, arguments.names[0]) == 0) {
            shells[i].print();
            return 0;
        }
    }
    return complain(STATUS_USAGE, "say which shell: doppel completion bash, zsh or fish");
}

/* ---- manual page ---- */

static void print_roff(const char *text)
{
    for (; *text; text++) {
        if (*text == '-')
            printf("\\-");
        else if (*text == '\\')
            printf("\\e");
        else
            putchar(*text);
    }
}

static void print_roff_option(const struct cli_option *option)
{
    printf(".TP\n.B ");
    if (option->letter)
        printf("\\-%c, ", option->letter);
    printf("\\-\\-");
    print_roff(option->name);
    printf("%s", option->argument ? " \\fI" : "");
    print_roff(option->argument ? option->argument : "");
    printf("%s\n", option->argument ? "\\fR" : "");
    print_roff(option->help);
    printf(".\n");
}

static void print_roff_commands(void)
{
    printf(".SH COMMANDS\nNames of virtual machines may be shortened as long as only one is meant.\n");
    for (const struct subcommand *command = subcommands; command->name; command++) {
        printf(".TP\n.B doppel %s \\fI", command->name);
        print_roff(command->argument);
        printf("\\fR\n");
        print_roff(command->help);
        printf(".\n");
        if (!command->options->name || is_run(command))
            continue; /* run's are a section of their own */
        printf(".RS\n");
        for (const struct cli_option *option = command->options; option->name; option++)
            print_roff_option(option);
        printf(".RE\n");
    }
}

int manual_main(int argc, char **argv)
{
    struct arguments arguments;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    printf(".TH DOPPEL 1 \"\" \"doppel %s\" \"User Commands\"\n.SH NAME\ndoppel \\- virtual machines with and without hardware virtualization\n"
           ".SH SYNOPSIS\n.B doppel run\n.B \\-\\-kernel\n.I FILE\n[\\fIOPTIONS\\fR]\n.SH DESCRIPTION\n"
           "Doppel runs unmodified x86\\-64 operating systems in one ordinary process.\n"
           ".B doppel run\nstarts a machine in the foreground and stays until the guest ends,\nor with\n.B \\-\\-detach\nin the background.\n",
           doppel_version());
    print_roff_commands();
    printf(".SH OPTIONS OF RUN\n");
    for (const struct cli_option *option = command_find("run")->options; option->name; option++)
        print_roff_option(option);
    for (const struct option_info *option = option_table; option->key; option++) {
        printf(".TP\n.B \\-\\-");
        print_roff(option->key);
        printf("%s", option->argument ? " \\fI" : "");
        print_roff(option->argument ? option->argument : "");
        printf("%s\n", option->argument ? "\\fR" : "");
        print_roff(option->help);
        printf("%s.\n", option->flags & OPT_MANY ? " (repeatable)" : "");
    }
    printf(".SH CONFIGURATION FILE\nA JSON object whose keys are the options without the dashes; repeatable ones take arrays:\n.PP\n.nf\n"
           "{\"kernel\": \"vmlinuz\", \"memory\": \"1G\", \"cpus\": 2, \"disk\": [\"root.img\", \"data.img,readonly\"]}\n.fi\n.SH KEYS\n");
    for (size_t i = 0; i < KEY_COUNT; i++)
        printf(".TP\n.B %s\n%s\n", keys[i].key, keys[i].meaning);
    printf(".SH JSON\nWith \\-\\-json a command is for programs:\n");
    for (size_t i = 0; i < JSON_RULE_COUNT; i++) {
        printf(".TP\n.B %s\n", json_rules[i].term);
        print_roff(json_rules[i].meaning);
        printf(".\n");
    }
    printf(".SH SIGNALS\n");
    for (size_t i = 0; i < SIGNAL_COUNT; i++)
        printf(".TP\n.B %s\n%s\n", signals[i].signal, signals[i].meaning);
    printf(".SH EXIT STATUS\n");
    for (size_t i = 0; i < STATUS_COUNT; i++)
        printf(".TP\n.B %d\n%s\n", statuses[i].status, statuses[i].meaning);
    printf(".SH EXAMPLES\n.nf\n");
    print_roff(example);
    printf("\n.fi\n");
    return 0;
}
