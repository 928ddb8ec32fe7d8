/* doppel snapshot: which action it is, and those that only look or remove. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cli/report.h"
#include "cli/snapshot.h"
#include "cli/usage.h"
#include "control/snapshot_check.h"
#include "control/snapshot_disks.h"

/* ---- list, show ---- */

static void print_row(const struct stored_snapshot *snapshot, unsigned depth)
{
    char when[32] = "-", size[16], name[2 * STORE_NAME_BYTES + 2 * STORE_DEPTH_MAX];
    time_t created = (time_t)(snapshot->created_ms / 1000);
    struct tm tm;
    if (localtime_r(&created, &tm))
        strftime(when, sizeof when, "%Y-%m-%d %H:%M:%S", &tm);
    print_bytes((double)snapshot_store_bytes(snapshot), size);
    snprintf(name, sizeof name, "%*s%s/%s", (int)(2 * (depth < STORE_DEPTH_MAX ? depth : STORE_DEPTH_MAX)), "", snapshot->vm, snapshot->name);
    const char *description = json_string_value(json_object_get(snapshot->meta, "description"));
    printf("%-28s %-19s %10s  %-11s %s%s  %s\n", name, when, size, snapshot->base_id[0] ? "incremental" : "full", snapshot->zstd_level ? "z" : "-",
           snapshot->encrypted ? "e" : "-", description ? description : "");
}

/* Those whose parent it is, below it. */
static void print_branch(const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot, unsigned depth)
{
    print_row(snapshot, depth);
    for (unsigned i = 0; i < count && depth < 4 * STORE_DEPTH_MAX; i++)
        if (strcmp(list[i].vm, snapshot->vm) == 0 && strcmp(list[i].parent_id, snapshot->id) == 0 && &list[i] != snapshot)
            print_branch(list, count, &list[i], depth + 1);
}

static bool is_root(const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot)
{
    const struct stored_snapshot *parent = snapshot->parent_id[0] ? snapshot_store_by_id(list, count, snapshot->parent_id) : NULL;
    return !parent || strcmp(parent->vm, snapshot->vm) != 0;
}

static json_t *as_json(const struct stored_snapshot *snapshot)
{
    json_t *object = json_copy(snapshot->meta);
    json_object_set_new(object, "path", json_string(snapshot->path));
    json_object_set_new(object, "disk_bytes", json_integer((json_int_t)snapshot_store_bytes(snapshot)));
    return object;
}

static int list_snapshots(const struct arguments *arguments)
{
    struct stored_snapshot *list;
    unsigned count;
    struct error err = {0};
    snapshot_store_tidy();
    if (snapshot_store_list(arguments->name_count > 1 ? arguments->names[1] : NULL, &list, &count, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    if (report_is_json()) {
        report_list();
        for (unsigned i = 0; i < count; i++)
            report(as_json(&list[i]), "%s", list[i].name);
    } else {
        printf("%-28s %-19s %10s  %-11s %s  %s\n", "SNAPSHOT", "MADE", "SIZE", "KIND", "ZE", "DESCRIPTION");
        for (unsigned i = 0; i < count; i++) {
            if (!arguments->value[SNAPSHOT_TREE])
                print_row(&list[i], 0);
            else if (is_root(list, count, &list[i]))
                print_branch(list, count, &list[i], 0);
        }
    }
    snapshot_store_free(list, count);
    return 0;
}

static int show_snapshot(const struct arguments *arguments)
{
    struct stored_snapshot *list;
    unsigned count;
    struct error err = {0};
    if (snapshot_store_list(arguments->names[1], &list, &count, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    const struct stored_snapshot *snapshot = snapshot_store_by_name(list, count, arguments->names[2]);
    if (snapshot)
        report_value(as_json(snapshot));
    else
        complain(0, "%s has no snapshot named %s", arguments->names[1], arguments->names[2]);
    snapshot_store_free(list, count);
    return snapshot ? 0 : STATUS_ERROR;
}

/* ---- delete ---- */

static void show_progress(uint64_t done, uint64_t all)
{
    if (isatty(STDERR_FILENO) && !report_is_json())
        fprintf(stderr, "\rmerging: %3d %% ", (int)(done * 100 / all));
}

static int delete_snapshots(const struct arguments *arguments)
{
    const char *vm = arguments->names[1];
    struct chunk_secret secret;
    struct error err = {0};
    int r = snapshot_read_secret(arguments, &secret);
    if (r)
        return r;
    int lock = snapshot_store_lock(vm, true, &err);
    if (lock < 0)
        return complain(STATUS_ERROR, "%s", err.text);
    report_list();
    for (unsigned i = 2; i < arguments->name_count; i++) {
        bool failed = snapshot_store_remove(vm, arguments->names[i], &secret, show_progress, &err);
        if (isatty(STDERR_FILENO) && !report_is_json())
            fprintf(stderr, "\r\033[K");
        if (failed)
            r = complain(STATUS_ERROR, "%s", err.text);
        else
            report(json_pack("{s:s, s:s}", "vm", vm, "name", arguments->names[i]), "%s/%s", vm, arguments->names[i]);
    }
    snapshot_disks_sweep(vm, true);
    close(lock);
    explicit_bzero(&secret, sizeof secret);
    return r;
}

/* ---- diff ---- */

static int chain_of(const struct stored_snapshot *list, unsigned count, const char *vm, const char *name, const struct chunk_secret *secret, struct snapshot_chain *chain)
{
    struct error err = {0};
    const struct stored_snapshot *snapshot = snapshot_store_by_name(list, count, name);
    if (!snapshot)
        return complain(STATUS_ERROR, "%s has no snapshot named %s", vm, name);
    if (snapshot_store_chain(list, count, snapshot, chain, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    chain->files.secret = secret;
    return 0;
}

struct difference {
    uint64_t pages, pages_all, clusters, clusters_all; /* clusters_all 0: no disks to compare */
    json_t *sections; /* {name: how} */
};

static void take_section(void *ctx, const char *name, const char *how)
{
    struct difference *difference = ctx;
    json_object_set_new(difference->sections, name, json_string(how));
}

static int diff_disks(const struct stored_snapshot *a, const struct stored_snapshot *b, struct difference *difference)
{
    struct error err = {0};
    if (!json_array_size(json_object_get(a->meta, "disk_files")) || !json_array_size(json_object_get(b->meta, "disk_files")))
        return 0;
    return snapshot_disks_compare(a, b, &difference->clusters, &difference->clusters_all, &err) ? complain(STATUS_ERROR, "%s", err.text) : 0;
}

static void print_difference(const struct difference *difference)
{
    const char *name, *separator = "sections:  ";
    json_t *how;
    printf("memory:    %llu of %llu pages differ (%.1f MiB)\n", (unsigned long long)difference->pages, (unsigned long long)difference->pages_all, (double)difference->pages / 256);
    json_object_foreach(difference->sections, name, how) {
        printf("%s%s%s%s", separator, name, json_string_length(how) ? " " : "", json_string_value(how));
        separator = ", ";
    }
    printf("%s", json_object_size(difference->sections) ? "\n" : "sections:  all the same\n");
    if (difference->clusters_all)
        printf("disks:     %llu of %llu clusters differ (%.1f MiB)\n", (unsigned long long)difference->clusters, (unsigned long long)difference->clusters_all,
               (double)difference->clusters / 16);
}

static void report_difference(const struct difference *difference)
{
    json_t *object = json_pack("{s:I, s:I, s:O}", "pages_different", (json_int_t)difference->pages, "pages", (json_int_t)difference->pages_all, "sections", difference->sections);
    if (difference->clusters_all)
        json_object_update_new(object, json_pack("{s:I, s:I}", "disk_clusters_different", (json_int_t)difference->clusters, "disk_clusters", (json_int_t)difference->clusters_all));
    report_value(object);
}

static int diff_snapshots(const struct arguments *arguments)
{
    const char *vm = arguments->names[1];
    struct snapshot_chain *chain = calloc(2, sizeof *chain);
    struct stored_snapshot *list = NULL;
    unsigned count = 0;
    struct chunk_secret secret;
    struct error err = {0};
    struct difference difference = {.sections = json_object()};
    int lock = -1, r = chain ? snapshot_read_secret(arguments, &secret) : complain(STATUS_ERROR, "out of memory");
    if (r == 0 && ((lock = snapshot_store_lock(vm, false, &err)) < 0 || snapshot_store_list(vm, &list, &count, &err)))
        r = complain(STATUS_ERROR, "%s", err.text);
    for (unsigned i = 0; r == 0 && i < 2; i++)
        r = chain_of(list, count, vm, arguments->names[2 + i], &secret, &chain[i]);
    if (r == 0 && snapshot_store_compare(&chain[0], &chain[1], &difference.pages, &difference.pages_all, &err))
        r = complain(STATUS_ERROR, "%s", err.text);
    if (r == 0 && machine_snapshot_compare(&chain[0].files, &chain[1].files, take_section, &difference, &err))
        r = complain(STATUS_ERROR, "%s", err.text);
    if (r == 0)
        r = diff_disks(snapshot_store_by_name(list, count, arguments->names[2]), snapshot_store_by_name(list, count, arguments->names[3]), &difference);
    if (r == 0 && report_is_json())
        report_difference(&difference);
    else if (r == 0)
        print_difference(&difference);
    json_decref(difference.sections);
    if (lock >= 0)
        close(lock);
    explicit_bzero(&secret, sizeof secret);
    snapshot_store_free(list, count);
    free(chain);
    return r;
}

/* ---- check ---- */

struct checking {
    const char *vm;
    bool damaged;
};

static void report_item(void *ctx, const char *snapshot, const char *item, enum check_result result, const char *text)
{
    static const char *const results[] = {[CHECK_SOUND] = "sound", [CHECK_DAMAGED] = "damaged", [CHECK_UNKNOWN] = "not checked"};
    struct checking *checking = ctx;
    char name[2 * STORE_NAME_BYTES + 2];
    checking->damaged |= result == CHECK_DAMAGED;
    snprintf(name, sizeof name, "%s%s%s", checking->vm, snapshot[0] ? "/" : "", snapshot);
    report(json_pack("{s:s, s:s, s:s, s:s, s:o}", "vm", checking->vm, "snapshot", snapshot, "item", item, "result", results[result], "message", report_text(text)), "%-28s %-14s %s%s%s", name, item,
           results[result], text[0] ? ": " : "", text);
}

/* With those that it needs. */
static int check_one(const struct stored_snapshot *list, unsigned count, const char *vm, const char *name, const struct chunk_secret *secret, const struct check_report *to)
{
    const struct stored_snapshot *at = snapshot_store_by_name(list, count, name);
    if (!at)
        return complain(STATUS_ERROR, "%s has no snapshot named %s", vm, name);
    for (unsigned depth = 0; at && depth <= STORE_DEPTH_MAX; depth++) {
        snapshot_check(list, count, at, secret, to);
        at = at->base_id[0] ? snapshot_store_by_id(list, count, at->base_id) : NULL;
    }
    return 0;
}

static int check_snapshots(const struct arguments *arguments)
{
    const char *vm = arguments->names[1], *name = arguments->name_count > 2 ? arguments->names[2] : NULL;
    struct stored_snapshot *list = NULL;
    unsigned count = 0;
    struct chunk_secret secret;
    struct error err = {0};
    struct checking checking = {.vm = vm};
    const struct check_report to = {report_item, &checking};
    int lock = -1, r = snapshot_read_secret(arguments, &secret);
    if (r == 0 && ((lock = snapshot_store_lock(vm, false, &err)) < 0 || snapshot_store_list(vm, &list, &count, &err)))
        r = complain(STATUS_ERROR, "%s", err.text);
    if (r == 0)
        report_list();
    if (r == 0 && name)
        r = check_one(list, count, vm, name, &secret, &to);
    for (unsigned i = 0; r == 0 && !name && i < count; i++)
        snapshot_check(list, count, &list[i], &secret, &to);
    if (r == 0)
        snapshot_check_rest(vm, list, count, &to);
    if (lock >= 0)
        close(lock);
    explicit_bzero(&secret, sizeof secret);
    snapshot_store_free(list, count);
    return r == 0 && checking.damaged ? STATUS_ERROR : r;
}

/* ---- the command ---- */

#define BIT(option) (1u << (option))
#define KEY_OPTIONS (BIT(SNAPSHOT_KEY_FILE) | BIT(SNAPSHOT_KEY_COMMAND))

static const struct {
    const char *name, *usage;
    int (*act)(const struct arguments *arguments);
    unsigned names_min, names_max; /* behind the action */
    unsigned options;
} actions[] = {
    {"create", "VM [NAME]", snapshot_create, 1, 2,
     KEY_OPTIONS | BIT(SNAPSHOT_INCREMENTAL) | BIT(SNAPSHOT_FULL) | BIT(SNAPSHOT_COMPRESS) | BIT(SNAPSHOT_ENCRYPT) | BIT(SNAPSHOT_DESCRIPTION) | BIT(SNAPSHOT_NO_DISKS)},
    {"list", "[VM]", list_snapshots, 0, 1, BIT(SNAPSHOT_TREE)},
    {"show", "VM NAME", show_snapshot, 2, 2, 0},
    {"restore", "VM NAME", snapshot_restore, 2, 2, KEY_OPTIONS | BIT(SNAPSHOT_AS) | BIT(SNAPSHOT_LOAD) | BIT(SNAPSHOT_ENGINE)},
    {"delete", "VM NAME...", delete_snapshots, 2, 64, KEY_OPTIONS},
    {"check", "VM [NAME]", check_snapshots, 1, 2, KEY_OPTIONS},
    {"diff", "VM NAME NAME", diff_snapshots, 3, 3, KEY_OPTIONS},
    {"export", "VM NAME FILE|-", snapshot_export, 3, 3, 0},
    {"import", "FILE|- [VM]", snapshot_import, 1, 2, 0},
};

int snapshot_main(int argc, char **argv)
{
    struct arguments arguments;
    const struct subcommand *command = command_find(argv[0]);
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (!arguments.name_count)
        return complain(STATUS_USAGE, "snapshot: usage: doppel snapshot %s", command->argument);
    for (size_t i = 0; i < sizeof actions / sizeof *actions; i++) {
        if (strcmp(actions[i].name, arguments.names[0]) != 0)
            continue;
        if (arguments.name_count - 1 < actions[i].names_min || arguments.name_count - 1 > actions[i].names_max)
            return complain(STATUS_USAGE, "snapshot: usage: doppel snapshot %s %s", actions[i].name, actions[i].usage);
        for (unsigned n = 0; command->options[n].name; n++)
            if (arguments.value[n] && !((actions[i].options | BIT(SNAPSHOT_JSON)) & BIT(n)))
                return complain(STATUS_USAGE, "snapshot: --%s is not for %s", command->options[n].name, actions[i].name);
        const unsigned vm = actions[i].act == snapshot_import ? 2 : 1; /* which of the words names a machine */
        if (arguments.name_count > vm && !instance_name_valid(arguments.names[vm]))
            return complain(STATUS_USAGE, "snapshot: \"%s\" is no name of a virtual machine", arguments.names[vm]);
        return actions[i].act(&arguments);
    }
    return complain(STATUS_USAGE, "snapshot: there is no action \"%s\"; usage: doppel snapshot %s", arguments.names[0], command->argument);
}
