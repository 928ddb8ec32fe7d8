/*
 * Snapshots in two files, state and memory (machine.h). The state file is section "snapshot" (what it is and what belongs to it), then "config", then
 * "machine", in the format of state/state.h. Each file is written under another name beside its own and renamed when it is complete and on the disk, memory first:
 * the state file's name is the last thing to change. It holds a number drawn anew each time that nothing else depends on; it tells one snapshot from another.
 * Threading: saving on any thread but the loop's and vCPUs'; the writing is done on the loop's, which opens nothing.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "machine/machine_priv.h"
#include "memory/ram_file.h"
#include "state/inputs.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_API, fsync);
SANDBOX_ALLOW(IN_API, rename);
SANDBOX_ALLOW(IN_API, unlink);
SANDBOX_ALLOW(IN_API, flock);
SANDBOX_ALLOW(IN_API, copy_file_range);

/* ---- files that appear when they are complete ---- */

struct new_file {
    char *temporary;
    const char *path;
    int fd;
    bool in_place;
};

static int new_file_open(struct new_file *file, const char *path, struct error *err)
{
    *file = (struct new_file){.path = path, .fd = -1};
    if (asprintf(&file->temporary, "%s.XXXXXX", path) < 0) {
        file->temporary = NULL;
        return error_set(err, -ENOMEM, "out of memory");
    }
    file->fd = mkostemp(file->temporary, O_CLOEXEC);
    if (file->fd >= 0)
        return 0;
    int r = error_set(err, -errno, "cannot write beside %s: %s", path, strerror(errno));
    free(file->temporary);
    file->temporary = NULL;
    return r;
}

/* What is not a hole. */
static int copy_file(int to, int from, uint64_t size_bytes)
{
    if (ftruncate(to, (off_t)size_bytes) < 0)
        return -errno;
    for (off_t at = 0; (uint64_t)at < size_bytes;) {
        off_t data = lseek(from, at, SEEK_DATA), hole = data < 0 ? -1 : lseek(from, data, SEEK_HOLE);
        if (data < 0 && errno == ENXIO)
            return 0;
        data = data < 0 ? at : data;
        hole = hole < 0 ? (off_t)size_bytes : hole;
        for (off_t out = data; data < hole;)
            if (copy_file_range(from, &data, to, &out, (size_t)(hole - data), 0) <= 0)
                return errno ? -errno : -EIO;
        at = hole;
    }
    return 0;
}

/* An existing regular file of this size, to be written over where it is (in a copy, when machines have its pages); else a new one. */
static int new_file_update(struct new_file *file, const char *path, uint64_t size_bytes, struct error *err)
{
    struct stat st;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    bool same = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (uint64_t)st.st_size == size_bytes;
    if (same && flock(fd, LOCK_EX | LOCK_NB) == 0) {
        *file = (struct new_file){.path = path, .fd = fd, .in_place = true};
        return 0;
    }
    int r = new_file_open(file, path, err);
    if (r == 0 && same) {
        errno = 0;
        r = copy_file(file->fd, fd, size_bytes);
        if (r)
            error_set(err, r, "cannot copy %s, which other machines use: %s", path, strerror(-r));
    }
    if (fd >= 0)
        close(fd);
    return r;
}

static int new_file_commit(struct new_file *file, struct error *err)
{
    if (fsync(file->fd) < 0 || (!file->in_place && rename(file->temporary, file->path) < 0))
        return error_set(err, -errno, "cannot write %s: %s", file->path, strerror(errno));
    file->in_place = true; /* nothing is left to remove */
    return 0;
}

static void new_file_close(struct new_file *file)
{
    if (file->fd >= 0) {
        close(file->fd);
        if (!file->in_place)
            unlink(file->temporary);
    }
    free(file->temporary);
}

/* ---- the state file ---- */

struct snapshot_header {
    uint64_t id[2];
    char *version; /* of the program that wrote it, for people */
    uint64_t ram_bytes;
};

static int header_state(struct snapshot_header *header, struct state_io *io)
{
    state_begin(io, "snapshot", 1);
    state_string(io, &header->version);
    for (unsigned i = 0; i < 2; i++)
        state_u64(io, &header->id[i]);
    state_u64(io, &header->ram_bytes);
    return state_end(io);
}

/* Identifiers are two numbers in sections and bytes elsewhere. */
static struct chunk_id id_of(const struct snapshot_header *header)
{
    struct chunk_id id;
    for (unsigned i = 0; i < sizeof id.bytes; i++)
        id.bytes[i] = (uint8_t)(header->id[i / 8] >> i % 8 * 8);
    return id;
}

int snapshot_encode(struct machine *machine, const struct chunk_id *id, struct state_io **out, struct error *err)
{
    struct state_io *io = state_writer_create();
    struct snapshot_header header = {.version = (char *)DOPPEL_VERSION, .ram_bytes = physmap_ram_bytes(machine->memory)};
    struct machine_config config = *machine->config; /* saving changes nothing, but says so in no type */
    *out = io;
    if (!io)
        return error_set(err, -ENOMEM, "out of memory");
    for (unsigned i = 0; i < sizeof id->bytes; i++)
        header.id[i / 8] |= (uint64_t)id->bytes[i] << i % 8 * 8;
    int r = header_state(&header, io);
    if (r == 0)
        r = machine_config_state(&config, io);
    size_t place = 0;
    (void)state_writer_data(io, &place);
    if (r == 0)
        r = machine_state(machine, io);
    if (r == 0)
        r = state_put_parts(io, place);
    return r ? error_set(err, r, "cannot save the machine's state: %s", state_error(io)) : 0;
}

static int write_state(struct machine *machine, struct new_file *file, const struct chunk_id *id, struct error *err)
{
    struct state_io *io = NULL;
    size_t size = 0;
    int r = snapshot_encode(machine, id, &io, err);
    const char *data = r == 0 ? state_writer_data(io, &size) : NULL;
    for (size_t done = 0; r == 0 && done < size;) {
        ssize_t n = write(file->fd, data + done, size - done);
        if (n < 0 && errno != EINTR)
            r = error_set(err, -errno, "cannot write %s: %s", file->path, strerror(errno));
        done += n > 0 ? (size_t)n : 0;
    }
    state_io_destroy(io);
    return r;
}

struct save {
    struct new_file state, memory;
    bool differential;
    struct chunk_id id;
};

static int collect(struct machine *machine, struct error *err)
{
    int r = machine->engine_ops->collect_dirty ? machine->engine_ops->collect_dirty(machine->engine, true) : 0;
    return r ? error_set(err, r, "engine %s does not tell what the guest wrote: %s", machine->engine_ops->name, strerror(-r)) : 0;
}

/* What may be written without a fault was noted as dirty before: engines are to notice again. */
static void notice_again(struct machine *machine)
{
    physmap_need_marks(machine->memory);
    for (unsigned i = 0; i < machine->cpu_count; i++)
        machine->engine_ops->state_changed(machine->vcpu[i].vcpu);
}

int snapshot_collect(struct machine *machine, uint64_t *pages, struct error *err)
{
    int r = collect(machine, err);
    if (r)
        return r;
    physmap_take_dirty_pages(machine->memory, pages);
    notice_again(machine);
    return 0;
}

/* Everything stands still meanwhile, and the thread may open nothing. */
static int save(struct machine *machine, void *ctx, struct error *err)
{
    struct save *files = ctx;
    int r = write_state(machine, &files->state, &files->id, err);
    if (r == 0)
        r = collect(machine, err);
    if (r)
        return r;
    r = ram_file_write(machine->memory, files->memory.fd, files->differential, err);
    if (r)
        return error_prefix(err, "%s", files->memory.path);
    notice_again(machine);
    return 0;
}

int machine_snapshot_save(struct machine *machine, const struct snapshot_files *files, struct error *err)
{
    struct save ctx = {.state = {.fd = -1}, .memory = {.fd = -1}, .differential = files->differential};
    if (strcmp(files->state, files->memory) == 0)
        return error_set(err, -EINVAL, "state and memory of a snapshot cannot be one file (%s)", files->state);
    if (pthread_mutex_trylock(&machine->snapshot_lock))
        return error_set(err, -EBUSY, "another snapshot is being made");
    int r = inputs_random(&ctx.id, sizeof ctx.id);
    if (r)
        error_set(err, r, "no random numbers: %s", strerror(-r));
    if (r == 0)
        r = new_file_open(&ctx.state, files->state, err);
    if (r == 0)
        r = files->differential ? new_file_update(&ctx.memory, files->memory, physmap_ram_bytes(machine->memory), err)
                                : new_file_open(&ctx.memory, files->memory, err);
    if (r == 0)
        r = machine_call_still(machine, save, &ctx, err);
    if (r == 0) {
        r = new_file_commit(&ctx.memory, err);
        if (r == 0)
            r = new_file_commit(&ctx.state, err);
        if (r) { /* the marks are gone, and what they stood for is in no file */
            physmap_mark_written(machine->memory, 0, physmap_low_bytes(machine->memory));
            physmap_mark_written(machine->memory, PHYSMAP_HIGH_BASE, physmap_high_bytes(machine->memory));
        }
    }
    if (r == 0)
        snapshot_set_base(machine, &ctx.id);
    pthread_mutex_unlock(&machine->snapshot_lock);
    new_file_close(&ctx.memory);
    new_file_close(&ctx.state);
    return r;
}

void snapshot_set_base(struct machine *machine, const struct chunk_id *id)
{
    pthread_mutex_lock(&machine->run_lock);
    machine->has_base = true;
    machine->base = *id;
    pthread_mutex_unlock(&machine->run_lock);
}

bool machine_snapshot_base(struct machine *machine, struct chunk_id *id)
{
    pthread_mutex_lock(&machine->run_lock);
    bool has_base = machine->has_base;
    *id = machine->base;
    pthread_mutex_unlock(&machine->run_lock);
    return has_base;
}

/* ---- reading ---- */

/* A reader behind the configuration of a state file; *data is its memory. */
static int open_state(const struct snapshot_files *files, struct snapshot_header *header, struct machine_config *config, char **data, struct state_io **io, struct error *err)
{
    size_t size;
    int r = snapshot_read_state(files, data, &size, err);
    if (r)
        return r;
    *io = state_reader_create(*data, size);
    r = *io ? header_state(header, *io) : -ENOMEM;
    if (r == 0)
        r = machine_config_state(config, *io);
    free(header->version);
    header->version = NULL;
    if (r == 0)
        return 0;
    error_set(err, r, "%s: %s", files->state, *io ? state_error(*io) : "out of memory");
    state_io_destroy(*io);
    free(*data);
    return r;
}

int machine_snapshot_config(const struct snapshot_files *files, struct machine_config *config, struct error *err)
{
    struct snapshot_header header = {0};
    struct state_io *io;
    char *data;
    int r = open_state(files, &header, config, &data, &io, err);
    if (r)
        return r;
    state_io_destroy(io);
    free(data);
    return 0;
}

int machine_snapshot_check_state(const struct snapshot_files *files, struct snapshot_state *state, struct error *err)
{
    struct snapshot_header header = {0};
    struct machine_config config;
    struct state_io *io;
    const void *body;
    size_t body_bytes;
    char *data, name[64] = "";
    machine_config_init(&config);
    int r = open_state(files, &header, &config, &data, &io, err);
    machine_config_clear(&config);
    if (r)
        return r;
    while (state_next(io, name, &body, &body_bytes))
        if (strcmp(name, "parts") == 0)
            state_check_parts(io, body, body_bytes);
    if (state_failed(io) || strcmp(name, "machine") != 0)
        r = error_set(err, -EINVAL, "%s: %s", files->state, state_failed(io) ? state_error(io) : "section \"machine\" is missing");
    state_io_destroy(io);
    free(data);
    *state = (struct snapshot_state){id_of(&header), header.ram_bytes};
    return r;
}

int machine_snapshot_check(const struct snapshot_files *files, struct error *err)
{
    struct snapshot_state state;
    int r = machine_snapshot_check_state(files, &state, err);
    return r ? r : snapshot_check_layers(state.ram_bytes, files, err);
}

/* Memory before the parts: some look at what they left there. */
static int begin_from(struct machine *machine, void *ctx, struct error *err)
{
    const struct snapshot_files *files = ctx;
    struct snapshot_header header = {0};
    struct machine_config saved;
    struct state_io *io = NULL;
    char *data = NULL;
    machine_config_init(&saved);
    int r = open_state(files, &header, &saved, &data, &io, err);
    machine_config_clear(&saved);
    if (r)
        return r;
    if (header.ram_bytes != physmap_ram_bytes(machine->memory))
        r = error_set(err, -EINVAL, "%s: the guest's memory has %llu bytes, not %llu", files->state, (unsigned long long)header.ram_bytes,
                      (unsigned long long)physmap_ram_bytes(machine->memory));
    if (r == 0)
        r = snapshot_read_memory(machine, files, err);
    for (unsigned i = 0; i < machine->cpu_count; i++)
        machine->vcpu[i].vcpu->trace = machine_vcpu_trace(machine, i);
    machine->catch_up = files->catch_up;
    if (r == 0 && machine_state(machine, io))
        r = error_set(err, -EINVAL, "%s: %s", files->state, state_error(io));
    const struct chunk_id id = id_of(&header);
    snapshot_set_base(machine, &id);
    physmap_need_marks(machine->memory);
    if (r == 0)
        r = read_ahead_open(machine, files, &id, err);
    if (r == 0)
        r = machine_become_another(machine, err);
    state_io_destroy(io);
    free(data);
    return r;
}

int snapshot_decode(struct machine *machine, const void *data, size_t size, const char *name, struct error *err)
{
    struct snapshot_header header = {0};
    struct machine_config saved;
    struct state_io *io = state_reader_create(data, size);
    machine_config_init(&saved);
    int r = io ? header_state(&header, io) : -ENOMEM;
    if (r == 0)
        r = machine_config_state(&saved, io);
    if (r == 0 && header.ram_bytes != physmap_ram_bytes(machine->memory)) {
        state_fail(io, "the guest's memory has another size");
        r = -EINVAL;
    }
    for (unsigned i = 0; i < machine->cpu_count; i++)
        machine->vcpu[i].vcpu->trace = machine_vcpu_trace(machine, i);
    if (r == 0)
        r = machine_state(machine, io);
    if (r)
        error_set(err, -EINVAL, "%s: %s", name, io ? state_error(io) : "out of memory");
    free(header.version);
    machine_config_clear(&saved);
    state_io_destroy(io);
    return r ? -EINVAL : 0;
}

int machine_snapshot_load(struct machine **machine, const struct machine_config *config, const struct snapshot_files *files, struct error *err)
{
    return machine_create_with(machine, config, begin_from, (void *)(uintptr_t)files, err);
}
