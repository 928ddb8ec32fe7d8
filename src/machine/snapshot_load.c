/*
 * What loading a snapshot reads that is not raw: state files that are compressed or encrypted, and memory in layers (state/chunk_file.h). The lowest layer is a raw file or
 * a chunk file with all pages; the others are laid upon it, from the lowest to the highest. Threading: no vCPU runs.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "machine/machine_priv.h"
#include "memory/ram_file.h"

#define STATE_FILE_BYTES_MAX (256ull << 20)

static int read_plain(int fd, const char *path, size_t size, char **data, struct error *err)
{
    size_t done = 0;
    *data = malloc(size + 1);
    if (!*data)
        return error_set(err, -ENOMEM, "no memory to read %s", path);
    while (done < size) {
        ssize_t n = read(fd, *data + done, size - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            free(*data);
            *data = NULL;
            return error_set(err, n < 0 ? -errno : -EIO, "cannot read %s: %s", path, n < 0 ? strerror(errno) : "it shrank meanwhile");
        }
        done += (size_t)n;
    }
    return 0;
}

int snapshot_read_state(const struct snapshot_files *files, char **data, size_t *size, struct error *err)
{
    struct chunk_reader *reader = NULL;
    struct stat st;
    int fd = open(files->state, O_RDONLY | O_CLOEXEC), r = 0;
    *data = NULL;
    if (fd < 0 || fstat(fd, &st) < 0)
        r = error_set(err, -errno, "cannot read %s: %s", files->state, strerror(errno));
    else if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size > STATE_FILE_BYTES_MAX)
        r = error_set(err, -EINVAL, "%s is not a snapshot's state file", files->state);
    else if (!chunk_file_is(fd))
        r = read_plain(fd, files->state, *size = (size_t)st.st_size, data, err);
    else if ((r = chunk_reader_open(&reader, fd, files->state, files->secret, STATE_FILE_BYTES_MAX, err)) == 0) {
        fd = -1; /* the reader's */
        r = chunk_reader_read_all(reader, data, size, err);
    }
    chunk_reader_close(reader);
    if (fd >= 0)
        close(fd);
    return r;
}

/* RAM's bytes are one range of host addresses; whole chunks of it, but for the last. */
static int read_chunks(struct machine *machine, struct chunk_reader *reader, struct error *err)
{
    uint64_t size = physmap_ram_bytes(machine->memory);
    bool layer = chunk_reader_info(reader)->layer;
    uint8_t *ram = physmap_get(machine->memory, 0, PAGE_SIZE_BYTES, PHYSMAP_READ);
    int r = 0;
    for (uint64_t chunk = 0; r == 0 && chunk * CHUNK_BYTES < size; chunk++) {
        uint64_t zero, present = chunk_reader_present(reader, chunk, &zero);
        uint64_t wanted = layer ? present : present & ~zero; /* RAM is zero before the lowest */
        if (wanted)
            r = chunk_reader_read(reader, chunk, wanted, ram + chunk * CHUNK_BYTES, err);
    }
    return r;
}

/* The file number `level`, 0 the highest. *raw: it is no chunk file, and `fd` stays open. */
static int open_layer(const struct machine *machine, const struct snapshot_files *files, unsigned level, struct chunk_reader **reader, int *fd, struct error *err)
{
    const char *path = level ? files->below[level - 1] : files->memory;
    uint64_t size = physmap_ram_bytes(machine->memory);
    *reader = NULL;
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0)
        return error_set(err, -errno, "cannot read %s: %s", path, strerror(errno));
    if (!chunk_file_is(*fd))
        return 0;
    int r = chunk_reader_open(reader, *fd, path, files->secret, CHUNK_FILE_BYTES_MAX, err);
    if (r)
        close(*fd);
    *fd = -1;
    if (r == 0 && chunk_reader_info(*reader)->size_bytes != size)
        r = error_set(err, -EINVAL, "%s: it has %llu bytes and the guest's memory %llu", path, (unsigned long long)chunk_reader_info(*reader)->size_bytes,
                      (unsigned long long)size);
    if (r) {
        chunk_reader_close(*reader);
        *reader = NULL;
    }
    return r;
}

/* What the file says that it lies upon, which the next one must be. */
static int check_order(const struct snapshot_files *files, unsigned level, const struct chunk_reader *reader, const struct chunk_id *wanted, struct error *err)
{
    const char *path = level ? files->below[level - 1] : files->memory;
    const struct chunk_info *info = reader ? chunk_reader_info(reader) : NULL;
    bool layer = info && info->layer;
    if (level && info && memcmp(&info->id, wanted, sizeof *wanted) != 0)
        return error_set(err, -EINVAL, "%s is not what the memory above it lies upon", path);
    if (layer && level == files->below_count)
        return error_set(err, -EINVAL, "%s has only what changed since the snapshot before, which is needed, too", path);
    if (!layer && level < files->below_count)
        return error_set(err, -EINVAL, "%s is whole: nothing belongs below it", path);
    return 0;
}

static int read_from(struct machine *machine, const struct snapshot_files *files, unsigned level, const struct chunk_id *wanted, struct error *err)
{
    struct chunk_reader *reader;
    int fd, r = open_layer(machine, files, level, &reader, &fd, err);
    if (r)
        return r;
    r = check_order(files, level, reader, wanted, err);
    if (r == 0 && reader && chunk_reader_info(reader)->layer)
        r = read_from(machine, files, level + 1, &chunk_reader_info(reader)->base, err);
    if (r == 0 && reader)
        r = read_chunks(machine, reader, err);
    else if (r == 0 && ram_file_read(machine->memory, fd, err))
        r = error_prefix(err, "%s", level ? files->below[level - 1] : files->memory);
    chunk_reader_close(reader);
    if (fd >= 0)
        close(fd);
    return r;
}

int snapshot_read_layers(struct machine *machine, const struct snapshot_files *files, struct error *err)
{
    return read_from(machine, files, 0, NULL, err);
}
