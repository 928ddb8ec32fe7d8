/* The `doppel` program: one file a subcommand, one line a subcommand in main.c's table. */
#ifndef DOPPEL_CLI_CLI_H
#define DOPPEL_CLI_CLI_H

#include <stdbool.h>
#include <stdio.h>

/* Exit statuses. */
enum exit_status {
    STATUS_SHUTDOWN = 0, /* the guest powered off; also success of other commands */
    STATUS_ERROR = 1,    /* trouble on the host while the guest ran */
    STATUS_USAGE = 2,    /* bad option, file or configuration: nothing was started */
    STATUS_RESET = 3,    /* the guest reset, with --on-reset exit */
    STATUS_CRASH = 4,    /* the guest died: triple fault, or panic with --on-panic exit */
    STATUS_STOPPED = 5,  /* stopped from outside: Ctrl-A x or a second SIGTERM */
    STATUS_MIGRATED = 6, /* it runs elsewhere */
};

struct cli_option {
    const char *name;
    char letter; /* 0: none */
    const char *argument, *help; /* argument NULL: a flag */
};

#define CLI_OPTIONS_MAX 16

/* Places in the commands' tables of options. */
enum { RUN_DETACH, RUN_NAME, RUN_RESTART, RUN_REMOVE, RUN_JSON };
enum { PS_ALL, PS_QUIET };
enum { LOGS_FOLLOW, LOGS_LINES, LOGS_MESSAGES };
enum { EVENTS_FOLLOW };
enum { CONSOLE_RECENT };
enum { SCREEN_SVG };
enum { STOP_TIMEOUT };
enum { RM_FORCE };
enum { PLUG_DISK, PLUG_NET };
enum { METADATA_SET, METADATA_MERGE };
enum { AGENT_VSOCK, AGENT_PORT_NUMBER, AGENT_WAIT };
enum { EXEC_INTERACTIVE = AGENT_WAIT + 1, EXEC_TERMINAL, EXEC_VARIABLE, EXEC_DIRECTORY, EXEC_USER };
enum {
    SNAPSHOT_INCREMENTAL, SNAPSHOT_FULL, SNAPSHOT_COMPRESS, SNAPSHOT_ENCRYPT, SNAPSHOT_KEY_FILE, SNAPSHOT_KEY_COMMAND, SNAPSHOT_DESCRIPTION, SNAPSHOT_NO_DISKS, SNAPSHOT_TREE,
    SNAPSHOT_JSON, SNAPSHOT_AS, SNAPSHOT_LOAD, SNAPSHOT_ENGINE
};
enum { WIRE_INSECURE, WIRE_KEY_FILE, WIRE_CERT, WIRE_CERT_KEY, WIRE_CA, WIRE_OPTIONS };
enum { MIGRATE_DOWNTIME = WIRE_OPTIONS, MIGRATE_COMPRESS, MIGRATE_BANDWIDTH, MIGRATE_POST_COPY, MIGRATE_DISKS, MIGRATE_RECOVER, MIGRATE_CANCEL, MIGRATE_STATUS };
enum { RECEIVE_LISTEN = WIRE_OPTIONS, RECEIVE_NAME, RECEIVE_ENGINE, RECEIVE_DISK_DIR, RECEIVE_RECOVER };
enum { DISK_BACKING, DISK_BACKING_FORMAT, DISK_JSON, DISK_REPAIR, DISK_FROM, DISK_TO };
enum { EXPORT_COMPRESS };
enum { IMPORT_DIRECTORY };
enum { CLONE_COUNT, CLONE_NAME, CLONE_KEY_FILE, CLONE_KEY_COMMAND };
enum { TOP_DELAY, TOP_BATCH, TOP_COUNT };

/* How many names of virtual machines a command takes. */
enum command_names { NAMES_OWN, NAMES_NONE, NAMES_ANY, NAMES_ONE, NAMES_SOME, NAMES_FIRST /* a name, then what the command reads itself */ };

struct subcommand {
    const char *name;
    int (*main)(int argc, char **argv); /* argv[0] is the subcommand's name */
    const char *argument, *help;
    enum command_names names;         /* NAMES_OWN: the command reads its arguments itself */
    const struct cli_option *options; /* ended by a NULL name */
    const char *words;                /* for shells: what may stand beside options and names; "@" in front: names, too; "?": commands. NULL: nothing, or files */
};

extern const struct subcommand subcommands[];
extern const struct cli_option serve_options[]; /* serve.c */

int serve_main(int argc, char **argv);
int run_main(int argc, char **argv);
int exec_main(int argc, char **argv);
int cp_main(int argc, char **argv);
int guest_main(int argc, char **argv);
int help_main(int argc, char **argv);
int version_main(int argc, char **argv);
int completion_main(int argc, char **argv);
int manual_main(int argc, char **argv);
int ps_main(int argc, char **argv);
int inspect_main(int argc, char **argv);
int logs_main(int argc, char **argv);
int events_main(int argc, char **argv);
int console_main(int argc, char **argv);
int start_main(int argc, char **argv);
int restart_main(int argc, char **argv);
int stop_main(int argc, char **argv);
int kill_main(int argc, char **argv);
int pause_main(int argc, char **argv);
int resume_main(int argc, char **argv);
int reset_main(int argc, char **argv);
int plug_main(int argc, char **argv);
int screen_main(int argc, char **argv);
int trace_main(int argc, char **argv);
int unplug_main(int argc, char **argv);
int metadata_main(int argc, char **argv);
int rm_main(int argc, char **argv);
int migrate_main(int argc, char **argv);
int receive_main(int argc, char **argv);
int clone_main(int argc, char **argv);
int cpu_baseline_main(int argc, char **argv);
int disk_main(int argc, char **argv);
int snapshot_main(int argc, char **argv);
int export_main(int argc, char **argv);
int import_main(int argc, char **argv);
int stats_main(int argc, char **argv);
int top_main(int argc, char **argv);

const struct subcommand *command_find(const char *name); /* NULL: there is none */

void print_usage(FILE *out);
void print_run_help(FILE *out);
void print_command_help(FILE *out, const struct subcommand *command);

#endif
