/* doppel: finds the subcommand and runs it. */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli/arguments.h"
#include "cli/report.h"

/* Of every command that prints something a program may want to know; the last of a table. */
#define JSON_OPTION {"json", 0, NULL, "print the result, and messages, as JSON (doppel manual, JSON)"}

static const struct cli_option run_options[] = {
    [RUN_DETACH] = {"detach", 'd', NULL, "run in the background: returns when the guest runs, prints its name"},
    [RUN_NAME] = {"name", 0, "NAME", "name of the virtual machine (default: one is made up)"},
    [RUN_RESTART] = {"restart", 0, "no|on-failure[:N]|always", "with --detach: bring it back when it ends by itself (default no)"},
    [RUN_REMOVE] = {"rm", 0, NULL, "with --detach: leave nothing behind when it ends"},
    [RUN_JSON] = {"json", 0, NULL, "with --detach: print the machine, and messages, as JSON"},
    {0},
};
static const struct cli_option ps_options[] = {
    [PS_ALL] = {"all", 'a', NULL, "those that have ended, too"},
    [PS_QUIET] = {"quiet", 'q', NULL, "names only"},
    JSON_OPTION,
    {0},
};
static const struct cli_option logs_options[] = {
    [LOGS_FOLLOW] = {"follow", 'f', NULL, "go on until it ends"},
    [LOGS_LINES] = {"lines", 'n', "N", "the last N lines only"},
    [LOGS_MESSAGES] = {"messages", 'm', NULL, "what Doppel said, not the console"},
    JSON_OPTION,
    {0},
};
static const struct cli_option events_options[] = {
    [EVENTS_FOLLOW] = {"follow", 'f', NULL, "go on, with virtual machines that are yet to come"},
    {"json", 0, NULL, "one JSON object a line, messages too"},
    {0},
};
static const struct cli_option console_options[] = {
    [CONSOLE_RECENT] = {"recent", 'r', NULL, "first show what the console said last"},
    {0},
};
static const struct cli_option screen_options[] = {
    [SCREEN_SVG] = {"svg", 0, NULL, "as a picture (SVG), with colours"},
    JSON_OPTION,
    {0},
};
static const struct cli_option stop_options[] = {
    [STOP_TIMEOUT] = {"timeout", 't', "SECONDS", "how long the guest has to shut down before the plug is pulled (default 30)"},
    JSON_OPTION,
    {0},
};
static const struct cli_option rm_options[] = {
    [RM_FORCE] = {"force", 'f', NULL, "kill it first if it runs"},
    JSON_OPTION,
    {0},
};
static const struct cli_option plug_options[] = {
    [PLUG_DISK] = {"disk", 0, "FILE[,...]", "a disk, as with run --disk"},
    [PLUG_NET] = {"net", 0, "SPEC", "a network card, as with run --net"},
    JSON_OPTION,
    {0},
};
static const struct cli_option metadata_options[] = {
    [METADATA_SET] = {"set", 0, "FILE", "the JSON of this file in its place; - is standard input"},
    [METADATA_MERGE] = {"merge", 0, "FILE", "change what the JSON of this file names; null takes a name away"},
    JSON_OPTION,
    {0},
};
static const struct cli_option snapshot_options[] = {
    [SNAPSHOT_INCREMENTAL] = {"incremental", 0, NULL, "create: only what changed since the last snapshot, which it then needs"},
    [SNAPSHOT_FULL] = {"full", 0, NULL, "create: all of it (the default)"},
    [SNAPSHOT_COMPRESS] = {"compress", 0, "zstd[=LEVEL]", "create: compress it, LEVEL from 1 to 19 (default 3)"},
    [SNAPSHOT_ENCRYPT] = {"encrypt", 0, NULL, "create: encrypt it (AES-256-GCM)"},
    [SNAPSHOT_KEY_FILE] = {"key-file", 0, "FILE", "the key, for all that is encrypted: 32 bytes, 64 hexadecimal digits or a passphrase"},
    [SNAPSHOT_KEY_COMMAND] = {"key-command", 0, "COMMAND", "a command that prints the key"},
    [SNAPSHOT_DESCRIPTION] = {"description", 0, "TEXT", "create: a remark, shown by list"},
    [SNAPSHOT_NO_DISKS] = {"no-disks", 0, NULL, "create: without the files that the guest can write, disks and persistent memory"},
    [SNAPSHOT_TREE] = {"tree", 0, NULL, "list: each below the one it came after"},
    [SNAPSHOT_JSON] = JSON_OPTION,
    [SNAPSHOT_AS] = {"as", 0, "NAME", "restore: as a virtual machine of this name"},
    [SNAPSHOT_LOAD] = {"load", 0, "lazy|fill|whole", "restore: memory comes when it is touched (the default), the rest of it in the background, or all of it before the guest runs"},
    [SNAPSHOT_ENGINE] = {"engine", 0, "ENGINE", "restore: run it by this engine (default: as it was)"},
    {0},
};
#define WIRE_SECURITY_OPTIONS                                                                                                        \
    [WIRE_INSECURE] = {"insecure", 0, NULL, "over TCP, not encrypted: whoever is on the way can read and change the guest"},       \
    [WIRE_KEY_FILE] = {"key-file", 0, "FILE", "over TCP, by TLS with a secret of 16 bytes or more that both sides have"},          \
    [WIRE_CERT] = {"cert", 0, "FILE", "over TCP, by TLS with certificates: this side's own (PEM)"},                                \
    [WIRE_CERT_KEY] = {"cert-key", 0, "FILE", "its private key"},                                                                   \
    [WIRE_CA] = {"ca", 0, "FILE", "who has to have signed the other side's certificate"}
static const struct cli_option migrate_options[] = {
    WIRE_SECURITY_OPTIONS,
    [MIGRATE_DOWNTIME] = {"downtime", 0, "TIME", "how long the guest may stand still, as in 50ms (the default) or 2s: what is written faster than it can be sent is sent again until the rest goes in that time"},
    [MIGRATE_COMPRESS] = {"compress", 0, "zstd[=LEVEL]", "compress memory on its way, LEVEL from 1 to 19 (default 1), and send what changed of pages that go again: for slow networks"},
    [MIGRATE_BANDWIDTH] = {"bandwidth", 0, "BYTES[K|M|G]", "send at most so many bytes a second while the guest runs"},
    [MIGRATE_POST_COPY] = {"post-copy", 0, NULL, "a guest that writes faster than can be sent is not held up, but goes before its memory has, which follows"},
    [MIGRATE_DISKS] = {"disks", 0, NULL, "the disks that the guest can write are copied and move, too; otherwise both sides must have them"},
    [MIGRATE_RECOVER] = {"recover", 0, NULL, "go on sending the memory of a guest that has gone so, when the connection was lost"},
    [MIGRATE_CANCEL] = {"cancel", 0, NULL, "give up the migration that is under way; the machine goes on here"},
    [MIGRATE_STATUS] = {"status", 0, NULL, "print how far it is, as JSON"},
    JSON_OPTION,
    {0},
};
static const struct cli_option receive_options[] = {
    WIRE_SECURITY_OPTIONS,
    [RECEIVE_LISTEN] = {"listen", 0, "ADDRESS", "where to wait for it: HOST:PORT, [IPV6]:PORT or unix:PATH; port 0 takes a free one (default 0.0.0.0:4446)"},
    [RECEIVE_NAME] = {"name", 0, "NAME", "name of the virtual machine here (default: the one it has there)"},
    [RECEIVE_ENGINE] = {"engine", 0, "ENGINE", "run it by this engine (default: as there)"},
    [RECEIVE_DISK_DIR] = {"disk-dir", 0, "DIRECTORY", "where disks that come with it get their images; nothing there is overwritten"},
    [RECEIVE_RECOVER] = {"recover", 0, "VM", "go on receiving the memory of this virtual machine, whose migration lost its connection"},
    JSON_OPTION,
    {0},
};
static const struct cli_option export_options[] = {
    [EXPORT_COMPRESS] = {"compress", 0, "zstd[=LEVEL]", "compress it, LEVEL from 1 to 19 (default 3)"},
    JSON_OPTION,
    {0},
};
static const struct cli_option import_options[] = {
    [IMPORT_DIRECTORY] = {"directory", 0, "DIR", "where its files go: a directory that is not there yet (default: one named as it is, see docs/bundles.md)"},
    JSON_OPTION,
    {0},
};
static const struct cli_option clone_options[] = {
    [CLONE_COUNT] = {"count", 'n', "N", "how many (default 1)"},
    [CLONE_NAME] = {"name", 0, "NAME", "their name; several are NAME-1, NAME-2 ... (default VM-clone-1 ...)"},
    [CLONE_KEY_FILE] = {"key-file", 0, "FILE", "the key of an encrypted snapshot"},
    [CLONE_KEY_COMMAND] = {"key-command", 0, "COMMAND", "a command that prints the key"},
    JSON_OPTION,
    {0},
};
static const struct cli_option stats_options[] = {
    {"json", 0, NULL, "all counters, and messages, as JSON"},
    {0},
};
static const struct cli_option top_options[] = {
    [TOP_DELAY] = {"delay", 'd', "SECONDS", "time between two looks (default 2)"},
    [TOP_BATCH] = {"batch", 'b', NULL, "print instead of drawing"},
    [TOP_COUNT] = {"count", 'n', "N", "end after N looks"},
    JSON_OPTION,
    {0},
};
#define AGENT_OPTIONS                                                                                                  \
    [AGENT_VSOCK] = {"vsock", 0, "SOCKET", "the machine with this vsock socket (run --vsock) instead of one by name"}, \
    [AGENT_PORT_NUMBER] = {"port", 0, "N", "the agent's port in the guest (default 6789)"},                            \
    [AGENT_WAIT] = {"wait", 0, "SECONDS", "try for so long until the agent answers (default 0)"}
static const struct cli_option agent_options[] = {AGENT_OPTIONS, JSON_OPTION, {0}};
static const struct cli_option exec_options[] = {
    AGENT_OPTIONS,
    [EXEC_INTERACTIVE] = {"interactive", 'i', NULL, "standard input goes to the command"},
    [EXEC_TERMINAL] = {"tty", 't', NULL, "the command gets a terminal"},
    [EXEC_VARIABLE] = {"env", 'e', "NAME[=VALUE]", "set a variable; may be repeated"},
    [EXEC_DIRECTORY] = {"workdir", 'w', "DIRECTORY", "where the command runs (default: the user's home)"},
    [EXEC_USER] = {"user", 'u', "USER", "as whom: name, number or UID:GID of the guest (default: root)"},
    JSON_OPTION,
    {0},
};
static const struct cli_option disk_options[] = {
    [DISK_BACKING] = {"backing", 0, "FILE", "create: an image on top of this one; a relative name begins at the new image"},
    [DISK_BACKING_FORMAT] = {"backing-format", 0, "raw|qcow2", "create: its format (default: qcow2 if its name ends so, else raw)"},
    [DISK_JSON] = JSON_OPTION,
    [DISK_REPAIR] = {"repair", 0, NULL, "check: repair what can be repaired"},
    [DISK_FROM] = {"from", 0, "FORMAT", "convert: qcow2, raw, vmdk, vdi, vhdx, ... (default: qcow2 if the name ends so, else raw)"},
    [DISK_TO] = {"to", 0, "FORMAT", "convert: the new image's"},
    {0},
};
static const struct cli_option json_options[] = {JSON_OPTION, {0}};
static const struct cli_option no_options[] = {{0}};

const struct subcommand subcommands[] = {
    {"run", run_main, "OPTIONS", "run a virtual machine", NAMES_OWN, run_options},
    {"ps", ps_main, "[OPTIONS]", "list virtual machines", NAMES_NONE, ps_options},
    {"inspect", inspect_main, "NAME...", "print all that is known about virtual machines, as JSON", NAMES_SOME, json_options},
    {"logs", logs_main, "[OPTIONS] NAME", "print what the console said", NAMES_ONE, logs_options},
    {"console", console_main, "[OPTIONS] NAME", "attach this terminal to the console; Ctrl-] detaches", NAMES_ONE, console_options},
    {"screen", screen_main, "[OPTIONS] NAME", "print what a terminal at the console would show now", NAMES_ONE, screen_options},
    {"trace", trace_main, "NAME", "print what its processors do from now on: exceptions, interrupts, port, memory-mapped and MSR accesses", NAMES_ONE, json_options},
    {"start", start_main, "NAME...", "start ended virtual machines again, in the background", NAMES_SOME, json_options},
    {"stop", stop_main, "[OPTIONS] NAME...", "ask guests to shut down, and pull the plug if they do not", NAMES_SOME, stop_options},
    {"restart", restart_main, "[OPTIONS] NAME...", "stop virtual machines and start them again", NAMES_SOME, stop_options},
    {"kill", kill_main, "NAME...", "pull the plug", NAMES_SOME, json_options},
    {"pause", pause_main, "NAME...", "make virtual machines stand still", NAMES_SOME, json_options},
    {"resume", resume_main, "NAME...", "let paused ones go on", NAMES_SOME, json_options},
    {"reset", reset_main, "NAME...", "press the reset button", NAMES_SOME, json_options},
    {"plug", plug_main, "OPTION NAME", "plug a disk or a network card into a running virtual machine", NAMES_ONE, plug_options},
    {"unplug", unplug_main, "NAME DEVICE", "ask a guest to let a device go, named as doppel inspect shows it", NAMES_SOME, json_options},
    {"metadata", metadata_main, "[OPTIONS] NAME", "print or change what a guest can ask for at 169.254.169.254 (run --metadata)", NAMES_ONE, metadata_options},
    {"rm", rm_main, "[OPTIONS] NAME...", "remove what ended virtual machines left behind", NAMES_SOME, rm_options},
    {"snapshot", snapshot_main, "create VM [NAME] | list [VM] | show VM NAME | restore VM NAME | delete VM NAME... | check VM [NAME] | diff VM NAME NAME | export VM NAME FILE | import FILE [VM]",
     "keep states of virtual machines and go back to them", NAMES_OWN, snapshot_options, "@create list show restore delete check diff export import"},
    {"disk", disk_main, "create FILE [SIZE] | info FILE... | check FILE | commit FILE | convert FILE NEW", "make images of disks and look after them", NAMES_OWN, disk_options, "create info check commit convert"},
    {"cpu-baseline", cpu_baseline_main, "[FILE...]", "print the processor features that guests can have here, or on all hosts where these files come from, for run --cpu-baseline", NAMES_OWN, json_options},
    {"migrate", migrate_main, "[OPTIONS] VM HOST[:PORT]|unix:PATH", "move a running virtual machine to where doppel receive waits", NAMES_SOME, migrate_options},
    {"receive", receive_main, "[OPTIONS]", "wait for a virtual machine that migrates, and run it in the background; prints its name", NAMES_NONE, receive_options},
    {"export", export_main, "[OPTIONS] VM|VM/SNAPSHOT FILE", "put a virtual machine into one file, with kernel, disks and (of a snapshot) its state; - is standard output", NAMES_SOME, export_options},
    {"import", import_main, "[OPTIONS] FILE [NAME]", "unpack such a file, an OVF appliance or an image of a disk, and print the configuration for run --config", NAMES_OWN, import_options},
    {"clone", clone_main, "[OPTIONS] VM | VM/SNAPSHOT", "start copies of a running virtual machine, or of a snapshot, that share its memory", NAMES_ONE, clone_options},
    {"stats", stats_main, "[OPTIONS] [NAME...]", "print what virtual machines use", NAMES_ANY, stats_options},
    {"top", top_main, "[OPTIONS] [NAME...]", "watch what virtual machines use", NAMES_ANY, top_options},
    {"events", events_main, "[OPTIONS] [NAME...]", "print what happened to virtual machines", NAMES_ANY, events_options},
    {"serve", serve_main, "--api-sock PATH [OPTIONS]", "run a virtual machine behind an HTTP API on a Unix socket", NAMES_OWN, serve_options},
    {"exec", exec_main, "[OPTIONS] NAME [--] COMMAND...", "run a command in a guest", NAMES_FIRST, exec_options},
    {"cp", cp_main, "[OPTIONS] FILE NAME:PATH | NAME:PATH FILE", "copy a file into a guest or out of it; - is standard input or output", NAMES_FIRST, agent_options},
    {"guest", guest_main, "[OPTIONS] NAME info|ping|set-clock|poweroff|reboot", "ask a guest's agent", NAMES_FIRST, agent_options, "info ping set-clock poweroff reboot"},
    {"completion", completion_main, "bash|zsh|fish", "print a completion script for a shell", NAMES_OWN, no_options, "bash zsh fish"},
    {"manual", manual_main, "", "print the manual page's source (man -l -)", NAMES_NONE, no_options},
    {"version", version_main, "", "print the version", NAMES_NONE, json_options},
    {"help", help_main, "[COMMAND]", "explain a command", NAMES_OWN, json_options, "?"},
    {0},
};

/* Under the name that these tools start, all arguments are the API server's. */
static bool is_compatible_name(const char *path)
{
    const char *name = strrchr(path, '/');
    return strcmp(name ? name + 1 : path, "firecracker") == 0;
}

/* A file that is opened must not take the place of a standard stream that the caller closed: what is printed would go into a guest's disk. */
static bool open_standard_streams(void)
{
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            return false;
    return true;
}

/* What was printed has to have arrived. */
static int finish(int status)
{
    bool told = report_end();
    int code = fflush(stdout) ? errno : 0;
    if (!code && !ferror(stdout) && told)
        return status;
    complain(0, "cannot write to standard output: %s", code ? strerror(code) : "some of it is missing");
    return status ? status : STATUS_ERROR;
}

static int run_command(int argc, char **argv)
{
    if (argc && is_compatible_name(argv[0]))
        return serve_main(argc, argv);
    if (argc < 2) {
        print_usage(stderr);
        return STATUS_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)
        return help_main(1, (char *[]){"help", NULL});
    if (strcmp(argv[1], "--version") == 0)
        return version_main(1, (char *[]){"version", NULL});
    for (const struct subcommand *command = subcommands; command->name; command++)
        if (strcmp(command->name, argv[1]) == 0)
            return command->main(argc - 1, argv + 1);
    return complain(STATUS_USAGE, "unknown command \"%s\"; doppel help lists them", argv[1]);
}

int main(int argc, char **argv)
{
    if (!open_standard_streams())
        return complain(STATUS_ERROR, "cannot open /dev/null: %s", strerror(errno));
    return finish(run_command(argc, argv));
}
