/*
 * Names of translated code for Linux perf: /tmp/perf-PID.map, one line "start size name" per block and stub.
 *
 * Several engines of one process share the file: each holds a shared lock on it, and whoever finds itself alone begins it anew, at creation (an older process with the
 * same id has left it) and after each flush of the cache (the same addresses hold other code from then on). It stays after the process, for perf report.
 * Threading: e->lock held.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/bt/bt_priv.h"
#include "util/log.h"

struct perf_map {
    int fd;
    uint64_t epoch;
};

static int write_line(const struct perf_map *map, uintptr_t start, uint32_t bytes, const char *name)
{
    char line[96];
    int length = snprintf(line, sizeof(line), "%" PRIxPTR " %" PRIx32 " %s\n", start, bytes, name);
    ssize_t written = write(map->fd, line, (size_t)length);
    return written == length ? 0 : written < 0 ? -errno : -ENOSPC;
}

/* A stub ends where the next one begins. */
static int write_stubs(const struct perf_map *map, const struct bt_engine *e)
{
    const struct {
        const char *name;
        uint32_t start;
    } stubs[] = {
        {"bt_miss", e->stubs.miss},   {"bt_enter", e->stubs.enter},             {"bt_lookup", e->stubs.lookup},
        {"bt_leave", e->stubs.leave}, {"bt_leave_saved", e->stubs.leave_saved},
    };
    int rc = 0;
    for (size_t n = 0; n < sizeof(stubs) / sizeof(*stubs) && !rc; n++) {
        uint32_t end = e->stubs.end;
        for (size_t other = 0; other < sizeof(stubs) / sizeof(*stubs); other++)
            if (stubs[other].start > stubs[n].start && stubs[other].start < end)
                end = stubs[other].start;
        rc = write_line(map, (uintptr_t)e->layout.tc_exec + stubs[n].start, end - stubs[n].start, stubs[n].name);
    }
    return rc;
}

static int begin(struct perf_map *map, const struct bt_engine *e)
{
    int rc = 0;
    map->epoch = e->epoch;
    if (flock(map->fd, LOCK_EX | LOCK_NB) == 0)
        rc = ftruncate(map->fd, 0) ? -errno : 0;
    if (flock(map->fd, LOCK_SH) && !rc)
        rc = -errno;
    return rc ? rc : write_stubs(map, e);
}

static int map_open(const char *path)
{
    struct stat st;
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    if (fd < 0)
        return -errno;
    int rc = fstat(fd, &st) ? -errno : !S_ISREG(st.st_mode) || st.st_uid != geteuid() ? -EPERM : 0; /* anybody may have put something there */
    if (!rc)
        return fd;
    close(fd);
    return rc;
}

int perf_map_create(struct bt_engine *e, struct error *err)
{
    char path[32];
    struct perf_map *map = malloc(sizeof(*map));
    if (!map)
        return error_set(err, -ENOMEM, "no memory for --perf-map");
    snprintf(path, sizeof(path), "/tmp/perf-%d.map", (int)getpid());
    map->fd = map_open(path);
    int rc = map->fd < 0 ? map->fd : begin(map, e);
    if (rc) {
        if (map->fd >= 0)
            close(map->fd);
        free(map);
        return error_set(err, rc, "--perf-map: cannot write %s: %s", path, strerror(-rc));
    }
    e->perf_map = map;
    return 0;
}

void perf_map_destroy(struct bt_engine *e)
{
    if (!e->perf_map)
        return;
    close(e->perf_map->fd);
    free(e->perf_map);
    e->perf_map = NULL;
}

void perf_map_add(struct bt_engine *e, const struct bt_block *block)
{
    struct perf_map *map = e->perf_map;
    char name[40];
    int rc = map->epoch != e->epoch ? begin(map, e) : 0;
    snprintf(name, sizeof(name), "guest_%c:%" PRIx64, block->page->mode.user ? 'u' : 'k', block->page->gva + block->start);
    if (!rc)
        rc = write_line(map, (uintptr_t)e->layout.tc_exec + block->tc_start, block->tc_end - block->tc_start, name);
    if (rc) {
        log_warning("--perf-map: cannot write: %s; no more names", strerror(-rc));
        perf_map_destroy(e);
    }
}
