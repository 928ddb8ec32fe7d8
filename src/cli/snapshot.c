/*
 * doppel snapshot: what is kept in the directory of snapshots (control/snapshot_store.h). A running machine writes its own state and memory; making directories, naming,
 * listing, removing and starting from them is done here.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cli/arguments.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/run.h"
#include "cli/snapshot.h"
#include "control/bundle.h"
#include "control/client.h"
#include "control/snapshot_disks.h"
#include "control/snapshot_store.h"
#include "doppel/doppel.h"

#define CREATE_MS (24 * 3600 * 1000)
#define ANSWER_MS 10000
#define CLONE_DEPTH_MAX 4u
#define ZSTD_LEVEL_DEFAULT 3ul
#define ZSTD_LEVEL_MAX 19ul

/* ---- options ---- */

int snapshot_read_secret(const struct arguments *arguments, struct chunk_secret *secret)
{
    return snapshot_secret_from(arguments->value[SNAPSHOT_KEY_FILE], arguments->value[SNAPSHOT_KEY_COMMAND], secret);
}

int snapshot_secret_from(const char *path, const char *command, struct chunk_secret *secret)
{
    uint8_t data[CHUNK_SECRET_BYTES_MAX + 2];
    *secret = (struct chunk_secret){0};
    if (!path && !command)
        return 0;
    if (path && command)
        return complain(STATUS_USAGE, "snapshot: give either --key-file or --key-command");
    FILE *file = path ? fopen(path, "re") : popen(command, "re");
    if (!file)
        return complain(STATUS_USAGE, "snapshot: cannot read the key from %s: %s", path ? path : command, strerror(errno));
    size_t size = fread(data, 1, sizeof data, file);
    int ended = path ? fclose(file) : pclose(file);
    int r = ended ? complain(STATUS_USAGE, "snapshot: %s gave no key: it failed", path ? path : command) : 0;
    if (r == 0 && chunk_secret_set(secret, data, size))
        r = complain(STATUS_USAGE, "snapshot: what %s gives is no key: it has to have 1 to %u bytes", path ? path : command, CHUNK_SECRET_BYTES_MAX);
    explicit_bzero(data, sizeof data);
    return r;
}

/* zstd, zstd=LEVEL */
static int read_level(const char *text, unsigned long *level)
{
    *level = 0;
    if (!text)
        return 0;
    *level = ZSTD_LEVEL_DEFAULT;
    if (strcmp(text, "zstd") == 0)
        return 0;
    if (strncmp(text, "zstd=", 5) != 0 || text[5] == '0')
        return complain(STATUS_USAGE, "snapshot: --compress: \"%s\" is not zstd or zstd=LEVEL, LEVEL from 1 to %lu", text, ZSTD_LEVEL_MAX);
    return parse_number("snapshot", "--compress", text + 5, ZSTD_LEVEL_MAX, level);
}

/* ---- create ---- */

struct create {
    const struct arguments *arguments;
    struct instance_info vm;
    char name[STORE_NAME_BYTES];
    unsigned long level;
    struct chunk_secret secret;
    struct stored_snapshot *list;
    unsigned count;
    const struct stored_snapshot *base; /* NULL: a full one */
    json_t *answer;
    bool for_clones;
};

static int choose_name(struct create *create, const char *wanted)
{
    unsigned long highest = 0;
    char *end;
    const char *prefix = create->for_clones ? STORE_CLONES : "s";
    if (wanted && strlen(wanted) >= sizeof create->name)
        return complain(STATUS_USAGE, "snapshot: the name is too long: %d bytes at most", STORE_NAME_BYTES - 1);
    for (unsigned i = 0; i < create->count; i++) {
        const char *name = create->list[i].name;
        unsigned long number = strncmp(name, prefix, strlen(prefix)) == 0 ? strtoul(name + strlen(prefix), &end, 10) : 0;
        if (number > highest && number < 1000000000 && !*end)
            highest = number;
    }
    if (wanted)
        strcpy(create->name, wanted);
    else
        snprintf(create->name, sizeof create->name, "%s%lu", prefix, highest + 1);
    return 0;
}

/* What an incremental one is counted from: the machine knows. */
static int find_base(struct create *create)
{
    const struct arguments *arguments = create->arguments;
    struct error err = {0};
    json_t *answer;
    if (!arguments->value[SNAPSHOT_INCREMENTAL])
        return 0;
    if (arguments->value[SNAPSHOT_FULL])
        return complain(STATUS_USAGE, "snapshot: give either --incremental or --full");
    if (client_request(create->vm.name, "GET", "/doppel/v1/snapshot", NULL, ANSWER_MS, &answer, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    const char *id = json_string_value(json_object_get(answer, "base_id"));
    create->base = id && *id ? snapshot_store_by_id(create->list, create->count, id) : NULL;
    int r = 0;
    if (!create->base)
        r = complain(STATUS_ERROR, "%s: the snapshot that its memory is counted from is not kept here, or there is none: make a full one", create->vm.name);
    else if (create->base->passing)
        r = complain(STATUS_ERROR, "%s: its memory is counted from what its last clones were made from, which is not kept: make a full one", create->vm.name);
    else if (create->base->encrypted && !arguments->value[SNAPSHOT_ENCRYPT])
        r = complain(STATUS_ERROR, "%s/%s, which this one would need, is encrypted: give --encrypt with a key", create->vm.name, create->base->name);
    json_decref(answer);
    return r;
}

/* What clones begin with needs little when something before it is there. The chain stays short, because what is in upper layers is no longer shared. */
static void find_base_for_clones(struct create *create)
{
    json_t *answer = NULL;
    unsigned depth = 0;
    if (client_request(create->vm.name, "GET", "/doppel/v1/snapshot", NULL, ANSWER_MS, &answer, NULL))
        return;
    const char *id = json_string_value(json_object_get(answer, "base_id"));
    const struct stored_snapshot *base = id && *id ? snapshot_store_by_id(create->list, create->count, id) : NULL;
    json_decref(answer);
    for (const struct stored_snapshot *at = base; at; at = snapshot_store_by_id(create->list, create->count, at->base_id), depth++)
        if (at->encrypted || depth == CLONE_DEPTH_MAX)
            return;
    create->base = base;
}

static json_t *request_body(const struct create *create)
{
    json_t *body = json_pack("{s:s, s:i, s:b}", "name", create->name, "zstd_level", (int)create->level, "without_disks", create->arguments->value[SNAPSHOT_NO_DISKS] != NULL);
    if (create->base)
        json_object_set_new(body, "since", json_string(create->base->id));
    if (create->arguments->value[SNAPSHOT_ENCRYPT]) {
        char text[2 * CHUNK_SECRET_BYTES_MAX + 1];
        for (unsigned i = 0; i < create->secret.size_bytes; i++)
            snprintf(text + 2 * i, 3, "%02x", create->secret.data[i]);
        json_object_set_new(body, "secret", json_string(text));
        explicit_bzero(text, sizeof text);
    }
    return body;
}

static void show_request_progress(const void *ctx)
{
    const struct create *create = ctx;
    json_t *answer;
    if (client_request(create->vm.name, "GET", "/doppel/v1/snapshot", NULL, ANSWER_MS, &answer, NULL))
        return;
    json_int_t pages = json_integer_value(json_object_get(answer, "pages")), all = json_integer_value(json_object_get(answer, "pages_expected"));
    if (all > 0)
        fprintf(stderr, "\r%s/%s: %3d %% of %lld MiB ", create->vm.name, create->name, (int)(pages * 100 / all), (long long)all / 256);
    json_decref(answer);
}

static int request_snapshot(struct create *create)
{
    struct error err = {0};
    json_t *body = request_body(create);
    int r = request_with_progress(create->vm.name, create->for_clones ? "/doppel/v1/clone" : "/doppel/v1/snapshot", body, CREATE_MS, show_request_progress, create, &create->answer, &err);
    json_decref(body);
    return r ? complain(STATUS_ERROR, "%s", err.text) : 0;
}

/* snapshot.json, complete. */
static json_t *describe(const struct create *create)
{
    static const char *const from_answer[] = {"id", "parent_id", "pause_ns", "duration_ns", "rounds", "pages", "memory_bytes", "state_bytes", "memory_xxh3", "state_xxh3", "disk_files"};
    static const char *const from_vm[] = {"arguments", "directory"};
    const char *description = create->arguments->value[SNAPSHOT_DESCRIPTION];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    json_t *meta = json_pack("{s:i, s:s, s:s, s:s, s:s, s:I, s:s, s:s, s:s, s:i, s:b, s:s, s:s}", "format", 1, "vm", create->vm.name, "name", create->name, "version", doppel_version(),
                             "kind", create->base ? "incremental" : "full", "created_ms", (json_int_t)now.tv_sec * 1000 + now.tv_nsec / 1000000, "base_id",
                             create->base ? create->base->id : "", "state", "state", "memory", "memory", "zstd_level", (int)create->level, "encrypted",
                             create->arguments->value[SNAPSHOT_ENCRYPT] != NULL, "disks", create->arguments->value[SNAPSHOT_NO_DISKS] ? "left out" : json_array_size(json_object_get(create->answer, "disk_files")) ? "kept" : "none", "description",
                             description ? description : "");
    for (size_t i = 0; i < sizeof from_answer / sizeof *from_answer; i++)
        json_object_set(meta, from_answer[i], json_object_get(create->answer, from_answer[i]));
    for (size_t i = 0; i < sizeof from_vm / sizeof *from_vm; i++)
        json_object_set(meta, from_vm[i], json_object_get(create->vm.vm, from_vm[i]));
    json_object_set(meta, "config", json_object_get(create->vm.vm, "config"));
    char boot_id[64];
    if (create->for_clones && snapshot_store_boot_id(boot_id))
        json_object_set_new(meta, "boot_id", json_string(boot_id));
    return meta;
}

/* Who asked for encryption should not take more for encrypted than is. */
static void tell_of_plain_disks(const struct create *create)
{
    const json_t *files = json_object_get(create->answer, "disk_files");
    if (create->secret.size_bytes && (json_array_size(files) || json_object_size(files)))
        complain(0, "%s/%s: memory and state are encrypted, the images of its disks are not; --no-disks leaves them out", create->vm.name, create->name);
}

static int create_locked(struct create *create)
{
    struct error err = {0};
    if (snapshot_store_list(create->vm.name, &create->list, &create->count, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    int r = choose_name(create, create->arguments->name_count > 2 ? create->arguments->names[2] : NULL);
    if (create->for_clones)
        find_base_for_clones(create);
    else if (r == 0)
        r = find_base(create);
    if (r == 0 && snapshot_store_begin(create->vm.name, create->name, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    if (r)
        return r;
    r = request_snapshot(create);
    json_t *meta = r ? NULL : describe(create);
    if (r == 0 && (!meta || snapshot_store_commit(create->vm.name, create->name, meta, &err)))
        r = complain(STATUS_ERROR, "%s", meta ? err.text : "the description is not UTF-8");
    if (r)
        snapshot_store_abort(create->vm.name, create->name);
    else if (!create->for_clones)
        report(json_incref(meta), "%s/%s", create->vm.name, create->name);
    if (r == 0)
        tell_of_plain_disks(create);
    json_decref(meta);
    return r;
}

int snapshot_create(const struct arguments *arguments)
{
    struct create create = {.arguments = arguments};
    struct error err = {0};
    bool encrypt = arguments->value[SNAPSHOT_ENCRYPT];
    int r = snapshot_read_secret(arguments, &create.secret);
    if (r == 0)
        r = read_level(arguments->value[SNAPSHOT_COMPRESS], &create.level);
    if (r == 0 && encrypt != (create.secret.size_bytes > 0))
        r = complain(STATUS_USAGE, encrypt ? "snapshot: --encrypt needs --key-file or --key-command" : "snapshot: a key is for --encrypt");
    if (r)
        return r;
    if (instance_find(arguments->names[1], &create.vm, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    int lock = -1;
    if (create.vm.life != INSTANCE_ALIVE)
        r = complain(STATUS_ERROR, "%s is not running: there is nothing to take a snapshot of", create.vm.name);
    else if ((lock = snapshot_store_lock(create.vm.name, true, &err)) < 0)
        r = complain(STATUS_ERROR, "%s", err.text);
    else
        r = create_locked(&create);
    if (lock >= 0)
        close(lock);
    snapshot_store_free(create.list, create.count);
    json_decref(create.answer);
    instance_info_clear(&create.vm);
    explicit_bzero(&create.secret, sizeof create.secret);
    return r;
}

/* Those before a full one that nothing is counted from any more; the last first, so that none is left without what it needs. */
static void drop_passed(const struct create *create)
{
    for (unsigned i = create->count; !create->base && i-- > 0;) {
        bool needed = false;
        for (unsigned n = 0; n < create->count; n++)
            needed |= !create->list[n].passing && strcmp(create->list[n].base_id, create->list[i].id) == 0;
        struct error err = {0};
        if (create->list[i].passing && !needed && snapshot_store_remove(create->vm.name, create->list[i].name, NULL, NULL, &err))
            complain(0, "%s", err.text);
    }
}

int snapshot_create_for_clones(struct instance_info *vm, int lock, char name[STORE_NAME_BYTES])
{
    static const struct arguments none;
    struct create create = {.arguments = &none, .vm = *vm, .for_clones = true};
    int r = create_locked(&create);
    if (r == 0)
        drop_passed(&create);
    strcpy(name, create.name);
    snapshot_store_free(create.list, create.count);
    json_decref(create.answer);
    if (r == 0 && flock(lock, LOCK_SH))
        r = complain(STATUS_ERROR, "cannot lock the snapshots of %s: %s", vm->name, strerror(errno));
    return r;
}

/* ---- restore ---- */

/* What a snapshot says of the machine does not say this; the machine's own options do. On without a word. */
static int set_sandbox(struct machine_config *config, const json_t *arguments, struct error *err)
{
    static const char option[] = "--sandbox";
    const char *value = "on";
    for (size_t i = 0; i < json_array_size(arguments); i++) {
        const char *text = json_string_value(json_array_get(arguments, i)), *next = json_string_value(json_array_get(arguments, i + 1));
        if (text && strcmp(text, option) == 0 && next)
            value = next;
        else if (text && strncmp(text, option, sizeof option - 1) == 0 && text[sizeof option - 1] == '=')
            value = text + sizeof option;
    }
    return machine_config_set(config, "sandbox", value, err);
}

int snapshot_start(const struct stored_snapshot *snapshot, struct snapshot_chain *chain, const char *name, int lock, int (*change)(struct machine_config *config, void *ctx), void *ctx)
{
    struct instance_info old;
    struct error err = {0};
    const json_t *arguments = json_object_get(snapshot->meta, "arguments");
    const char *directory = json_string_value(json_object_get(snapshot->meta, "directory"));
    struct run run = {.ready_fd = -1, .log_fd = -1, .name = name, .detach = true, .from = &chain->files, .from_lock = lock};
    if (json_is_true(json_object_get(snapshot->meta, "without_disks")))
        return complain(STATUS_ERROR, "%s/%s came in a bundle because another one needs its memory: its disks did not", snapshot->vm, snapshot->name);
    if (directory && chdir(directory))
        return complain(STATUS_ERROR, "%s was started in %s, where one cannot go: %s", snapshot->vm, directory, strerror(errno));
    machine_config_init(&run.config);
    bool wrong = machine_snapshot_check(&chain->files, &err) || machine_snapshot_config(&chain->files, &run.config, &err) || set_sandbox(&run.config, arguments, &err);
    int r = wrong ? complain(STATUS_ERROR, "%s", err.text) : 0;
    if (r == 0 && json_object_get(snapshot->meta, "files") && bundle_set_paths(&run.config, json_object_get(snapshot->meta, "files"), &err)) /* it came in a bundle */
        r = complain(STATUS_ERROR, "%s/%s: %s", snapshot->vm, snapshot->name, err.text);
    if (r == 0 && change)
        r = change(&run.config, ctx);
    if (r == 0 && snapshot_disks_check(snapshot, name, &err))
        r = complain(STATUS_ERROR, "%s", err.text);
    if (r == 0 && instance_read(name, &old, NULL) == 0) { /* its place is taken: by now it is known that the snapshot is complete */
        if (old.life == INSTANCE_ALIVE && end_by_force(&old))
            r = complain(STATUS_ERROR, "%s, which runs, does not end", name);
        instance_info_clear(&old);
    }
    if (r == 0 && snapshot_disks_restore(snapshot, name, &err))
        r = complain(STATUS_ERROR, "%s", err.text);
    if (r == 0)
        r = run_again(&run, arguments);
    machine_config_clear(&run.config);
    return r;
}

static int read_load(const char *text, struct snapshot_files *files)
{
    files->fill = text && strcmp(text, "fill") == 0;
    files->whole = text && strcmp(text, "whole") == 0;
    return !text || files->fill || files->whole || strcmp(text, "lazy") == 0 ? 0 : complain(STATUS_USAGE, "snapshot: --load: \"%s\" is not one of lazy, fill, whole", text);
}

static int set_engine(struct machine_config *config, void *ctx)
{
    struct error err = {0};
    return ctx && machine_config_set(config, "engine", ctx, &err) ? complain(STATUS_USAGE, "snapshot: %s", err.text) : 0;
}

int snapshot_restore(const struct arguments *arguments)
{
    struct snapshot_chain *chain = calloc(1, sizeof *chain);
    struct stored_snapshot *list = NULL;
    unsigned count = 0;
    struct chunk_secret secret;
    const char *vm = arguments->names[1], *as = arguments->value[SNAPSHOT_AS];
    struct error err = {0};
    int lock = -1, r = chain ? snapshot_read_secret(arguments, &secret) : complain(STATUS_ERROR, "out of memory");
    if (r == 0 && ((lock = snapshot_store_lock(vm, false, &err)) < 0 || snapshot_store_list(vm, &list, &count, &err)))
        r = complain(STATUS_ERROR, "%s", err.text);
    const struct stored_snapshot *snapshot = r == 0 ? snapshot_store_by_name(list, count, arguments->names[2]) : NULL;
    if (r == 0 && !snapshot)
        r = complain(STATUS_ERROR, "%s has no snapshot named %s", vm, arguments->names[2]);
    if (r == 0 && as && !instance_name_valid(as))
        r = complain(STATUS_USAGE, "--as: \"%s\" is no name for a virtual machine", as);
    if (r == 0 && snapshot_store_chain(list, count, snapshot, chain, &err))
        r = complain(STATUS_ERROR, "%s", err.text);
    if (r == 0)
        r = read_load(arguments->value[SNAPSHOT_LOAD], &chain->files);
    if (r == 0) {
        chain->files.secret = &secret;
        r = snapshot_start(snapshot, chain, as ? as : vm, lock, set_engine, (void *)arguments->value[SNAPSHOT_ENGINE]);
        if (r == 0)
            report_machine(as ? as : vm);
    }
    if (lock >= 0)
        close(lock);
    explicit_bzero(&secret, sizeof secret);
    snapshot_store_free(list, count);
    free(chain);
    return r;
}
