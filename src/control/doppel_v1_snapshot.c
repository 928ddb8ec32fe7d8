/*
 * Requests about snapshots under /doppel/v1: the machine's own part, which is writing state and memory into a directory that whoever asks has made (control/snapshot_store.h) and
 * will give its name. The directory is opened before a sandbox closes, and only files in it are made here.
 * Threading: a snapshot takes long, so it has a thread of its own, and the reply comes from there.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/snapshot_disks.h"
#include "control/snapshot_store_priv.h"
#include "control/vm_control_priv.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_API, openat);
/* A thread that begins and ends. */
SANDBOX_ALLOW(IN_API, rseq);
SANDBOX_ALLOW(IN_API, set_robust_list);

#define ZSTD_LEVEL_MAX 19
#define COMPRESSION_THREADS 4u

struct making {
    struct vm_control *control;
    struct http_call *call;
    int state_fd, memory_fd;
    struct chunk_secret secret;
    struct machine_snapshot snapshot;
    bool passing; /* for clones, which read it at once: it need not outlive the host's next start */
};

static void note_progress(void *ctx, uint64_t pages, uint64_t pages_expected)
{
    struct vm_control *control = ctx;
    atomic_store(&control->snapshot_pages, pages);
    atomic_store(&control->snapshot_pages_expected, pages_expected);
}

static void free_making(struct making *making)
{
    if (making->state_fd >= 0)
        close(making->state_fd);
    if (making->memory_fd >= 0)
        close(making->memory_fd);
    explicit_bzero(&making->secret, sizeof making->secret);
    free(making);
}

static json_t *describe(const struct machine_snapshot *snapshot, json_t *disks)
{
    char id[33], parent[33] = "";
    snapshot_id_text(&snapshot->id, id);
    if (snapshot->has_parent)
        snapshot_id_text(&snapshot->parent, parent);
    json_t *answer = json_pack("{s:s, s:s, s:I, s:I, s:i, s:I, s:I, s:I, s:o}", "id", id, "parent_id", parent, "pause_ns", (json_int_t)snapshot->pause_ns, "duration_ns",
                     (json_int_t)snapshot->duration_ns, "rounds", (int)snapshot->rounds, "pages", (json_int_t)snapshot->pages, "memory_bytes",
                     (json_int_t)snapshot->memory_bytes, "state_bytes", (json_int_t)snapshot->state_bytes, "disk_files", disks);
    if (snapshot->memory_sum[0])
        json_object_set_new(answer, "memory_xxh3", json_string(snapshot->memory_sum));
    if (snapshot->state_sum[0])
        json_object_set_new(answer, "state_xxh3", json_string(snapshot->state_sum));
    return answer;
}

static void *make(void *arg)
{
    struct making *making = arg;
    struct vm_control *control = making->control;
    struct error err = {0};
    struct disks_under_way disks = {0};
    struct machine *machine = vm_machine_get(control);
    int r = machine ? 0 : error_set(&err, -ESRCH, "the virtual machine has ended");
    if (r == 0 && !making->snapshot.without_disks)
        r = snapshot_disks_begin(&disks, machine, control->snapshots_fd, control->snapshots, &err);
    making->snapshot.overlays = disks.overlay;
    making->snapshot.overlay_count = disks.count;
    if (r == 0)
        r = machine_snapshot_live(machine, &making->snapshot, &err);
    if (machine)
        vm_machine_put(control);
    if (r == 0 && !making->passing && (fsync(making->memory_fd) || fsync(making->state_fd)))
        r = error_set(&err, -errno, "cannot write the snapshot: %s", strerror(errno));
    atomic_store(&control->snapshot_under_way, false);
    if (r)
        http_reply_error(making->call, 400, "%s", err.text);
    else
        http_reply_json(making->call, 200, describe(&making->snapshot, snapshot_disks_describe(&disks)));
    snapshot_disks_end(&disks, making->snapshot.overlaid);
    free_making(making);
    return NULL;
}

/* ---- what is asked for ---- */

static bool take_hex(struct chunk_secret *secret, const char *text)
{
    size_t length = strlen(text);
    uint8_t bytes[CHUNK_SECRET_BYTES_MAX];
    if (length % 2 || length / 2 > sizeof bytes || strspn(text, "0123456789abcdefABCDEF") != length)
        return false;
    for (size_t i = 0; i < length / 2; i++) {
        char two[3] = {text[2 * i], text[2 * i + 1], 0};
        bytes[i] = (uint8_t)strtoul(two, NULL, 16);
    }
    int r = chunk_secret_set(secret, bytes, length / 2);
    explicit_bzero(bytes, sizeof bytes);
    return r == 0;
}

/* Everything but the name, which *name gets; false: it is not what it should be. */
static bool understand(struct making *making, json_t *body, const char **name)
{
    struct machine_snapshot *snapshot = &making->snapshot;
    const char *key;
    json_t *value;
    *name = NULL;
    json_object_foreach(body, key, value)
    {
        const char *text = json_string_value(value);
        json_int_t number = json_integer_value(value);
        if (strcmp(key, "name") == 0 && text && strlen(text) < STORE_NAME_BYTES && instance_name_valid(text))
            *name = text;
        else if (strcmp(key, "since") == 0 && text && snapshot_id_parse(text, &snapshot->parent))
            snapshot->layer = true;
        else if (strcmp(key, "zstd_level") == 0 && json_is_integer(value) && number >= 0 && number <= ZSTD_LEVEL_MAX)
            snapshot->zstd_level = (int)number;
        else if (strcmp(key, "secret") == 0 && text && take_hex(&making->secret, text))
            snapshot->secret = &making->secret;
        else if (strcmp(key, "without_disks") == 0 && json_is_boolean(value))
            snapshot->without_disks = json_is_true(value);
        else
            return false;
    }
    return *name != NULL;
}

/* In the directory .new-NAME, which must be there and be empty. */
static int open_files(struct making *making, const char *name, struct error *err)
{
    char path[STORE_NAME_BYTES + 32];
    static const char *const files[] = {"state", "memory"};
    int *const fds[] = {&making->state_fd, &making->memory_fd};
    for (unsigned i = 0; i < 2; i++) {
        snprintf(path, sizeof path, STORE_NEW "%s/%s", name, files[i]);
        *fds[i] = openat(making->control->snapshots_fd, path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (*fds[i] < 0)
            return error_set(err, -errno, "cannot make the file %s of snapshot %s: %s", files[i], name, strerror(errno));
    }
    return 0;
}

static struct making *prepare(struct http_call *call, struct vm_control *control, bool passing)
{
    struct error err = {0};
    const char *name;
    json_t *body = http_body_json(call);
    if (!body)
        return NULL;
    struct making *making = calloc(1, sizeof *making);
    if (making)
        *making = (struct making){.control = control, .call = call, .passing = passing, .state_fd = -1, .memory_fd = -1,
                                  .snapshot = {.threads = COMPRESSION_THREADS, .sums = !passing, .progress = note_progress, .ctx = control, .state_name = "the state", .memory_name = "the memory"}};
    bool good = making && understand(making, body, &name);
    if (!good)
        http_reply_error(call, 400, "The body has a \"name\", and may have \"since\" (an identifier), \"zstd_level\" (0 to %d), \"secret\" (hexadecimal) and \"without_disks\".",
                         ZSTD_LEVEL_MAX);
    else if (open_files(making, name, &err)) {
        http_reply_error(call, 400, "%s", err.text);
        good = false;
    }
    json_decref(body);
    if (good)
        return making;
    if (making)
        free_making(making);
    return NULL;
}

static void begin(struct http_call *call, struct vm_control *control, bool passing)
{
    pthread_t thread;
    if (control->snapshots_fd < 0) {
        http_reply_error(call, 400, "There is no directory for this machine's snapshots.");
        return;
    }
    if (atomic_exchange(&control->snapshot_under_way, true)) {
        http_reply_error(call, 400, "Another snapshot is being made.");
        return;
    }
    struct making *making = prepare(call, control, passing);
    if (!making) {
        atomic_store(&control->snapshot_under_way, false);
        return;
    }
    making->snapshot.state_fd = making->state_fd;
    making->snapshot.memory_fd = making->memory_fd;
    note_progress(control, 0, 0);
    http_defer(call);
    if (pthread_create(&thread, NULL, make, making) == 0)
        pthread_detach(thread);
    else {
        atomic_store(&control->snapshot_under_way, false);
        http_reply_error(call, 500, "cannot start a thread");
        free_making(making);
    }
}

void vm_post_snapshot(struct http_call *call, void *ctx)
{
    begin(call, ctx, false);
}

void vm_post_clone(struct http_call *call, void *ctx)
{
    begin(call, ctx, true);
}

void vm_get_snapshot(struct http_call *call, void *ctx)
{
    struct vm_control *control = ctx;
    struct chunk_id id;
    char text[33] = "";
    struct machine *machine = vm_machine_get(control);
    if (machine && machine_snapshot_base(machine, &id))
        snapshot_id_text(&id, text);
    if (machine)
        vm_machine_put(control);
    http_reply_json(call, 200, json_pack("{s:s, s:b, s:I, s:I}", "base_id", text, "under_way", atomic_load(&control->snapshot_under_way), "pages",
                                         (json_int_t)atomic_load(&control->snapshot_pages), "pages_expected", (json_int_t)atomic_load(&control->snapshot_pages_expected)));
}
