/*
 * What is brought into memory unasked after a snapshot was loaded: first the pages that a machine touched in its first seconds the last time (state/working_set.h), so that the
 * guest need not wait for each of them; and, when wanted, later all the rest. Without a file of the former there is a record of what this machine touches, made before
 * anything is brought in that it did not ask for. One of several machines keeps it, by flock(); it is written in place, and its checksum tells when it is complete.
 * Pages come with the same calls as for whoever touches them, and any thread may wait for one that is on its way. So this thread has no lower priority, but rests for longer than it works.
 * Threading: one thread from read_ahead_start to read_ahead_close; `stop` is guarded by `lock`.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "machine/machine_priv.h"
#include "state/working_set.h"
#include "util/log.h"
#include "util/loop.h"

#define RECORD_NS 2000000000ull
#define REST_TIMES 3u          /* of the time that a piece took */
#define REST_NS_MIN 1000000ull

struct read_ahead {
    struct machine *machine;
    pthread_t thread;
    bool started, stop, fill, remote; /* remote: there are such pages */
    pthread_mutex_t lock;
    pthread_cond_t stopped;
    int fd; /* where the record goes; -1: nowhere */
    struct chunk_id id;
    uint64_t page_count, wanted; /* wanted: bits in `pages` */
    uint64_t pages[];
};

/* ---- the file ---- */

static int64_t read_pages(struct read_ahead *ahead, int fd)
{
    struct stat st;
    int64_t count = -EINVAL;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_size <= 0 || st.st_size > (off_t)WORKING_SET_BYTES_MAX)
        return -EINVAL;
    void *data = malloc((size_t)st.st_size);
    if (data && pread(fd, data, (size_t)st.st_size, 0) == st.st_size)
        count = working_set_read(data, (size_t)st.st_size, &ahead->id, ahead->page_count, ahead->pages);
    free(data);
    return count;
}

/* What cannot be read or written is no reason for anything: the guest does without. */
static void use_file(struct read_ahead *ahead, const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    bool writable = fd >= 0;
    if (fd < 0)
        fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return;
    struct stat st;
    bool mine = writable && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && flock(fd, LOCK_EX | LOCK_NB) == 0;
    int64_t count = read_pages(ahead, fd);
    ahead->wanted = count > 0 ? (uint64_t)count : 0;
    if (count < 0 && mine && ftruncate(fd, 0) == 0)
        ahead->fd = fd;
    else
        close(fd);
}

int read_ahead_open(struct machine *machine, const struct snapshot_files *files, const struct chunk_id *id, struct error *err)
{
    uint64_t page_count = physmap_ram_bytes(machine->memory) / PAGE_SIZE_BYTES, remote, shared;
    physmap_page_counts(machine->memory, &remote, &shared);
    if (!(remote || shared) || !(files->working_set || files->fill))
        return 0;
    struct read_ahead *ahead = calloc(1, sizeof *ahead + (page_count + 63) / 64 * sizeof ahead->pages[0]);
    if (!ahead)
        return error_set(err, -ENOMEM, "out of memory");
    *ahead = (struct read_ahead){.machine = machine, .fill = files->fill && remote, .fd = -1, .id = *id, .page_count = page_count};
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&ahead->stopped, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&ahead->lock, NULL);
    machine->read_ahead = ahead;
    if (files->working_set)
        use_file(ahead, files->working_set);
    return 0;
}

/* ---- the thread ---- */

/* False: it is time to end. */
static bool rest(struct read_ahead *ahead, uint64_t ns)
{
    uint64_t until_ns = loop_now_ns() + ns;
    struct timespec until = {.tv_sec = (time_t)(until_ns / 1000000000), .tv_nsec = (long)(until_ns % 1000000000)};
    pthread_mutex_lock(&ahead->lock);
    while (!ahead->stop && ns && pthread_cond_timedwait(&ahead->stopped, &ahead->lock, &until) != ETIMEDOUT)
        continue;
    bool go_on = !ahead->stop;
    pthread_mutex_unlock(&ahead->lock);
    return go_on;
}

static bool bring_wanted(struct read_ahead *ahead)
{
    for (uint64_t page = 0; page < ahead->page_count; page++) {
        if (!ahead->pages[page / 64]) {
            page |= 63;
            continue;
        }
        if (!(ahead->pages[page / 64] >> page % 64 & 1))
            continue;
        if (!rest(ahead, 0) || physmap_need(ahead->machine->memory, page * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES, PHYSMAP_READ))
            return false;
    }
    return true;
}

static void record(struct read_ahead *ahead)
{
    size_t size;
    physmap_pages_touched(ahead->machine->memory, ahead->pages);
    void *data = working_set_make(ahead->pages, ahead->page_count, &ahead->id, &size);
    if (data && pwrite(ahead->fd, data, size, 0) != (ssize_t)size)
        log_info("the pages that the guest touched first were not recorded: %s", strerror(errno));
    free(data);
}

static void bring_rest(struct read_ahead *ahead)
{
    uint64_t offset = 0, began;
    do
        began = loop_now_ns();
    while (physmap_fetch_next(ahead->machine->memory, &offset) > 0 && rest(ahead, REST_NS_MIN + REST_TIMES * (loop_now_ns() - began)));
}

static void *read_ahead_main(void *arg)
{
    struct read_ahead *ahead = arg;
    if (ahead->wanted) /* before it is shut in: later it needs no such call */
        physmap_advise(ahead->machine->memory, ahead->pages);
    if (!machine_enter_sandbox(ahead->machine, IN_WORKER))
        return NULL;
    if (ahead->wanted && ahead->remote && !bring_wanted(ahead))
        return NULL;
    if (ahead->fd >= 0) {
        bool go_on = rest(ahead, RECORD_NS);
        record(ahead); /* also when the machine ends before */
        if (!go_on)
            return NULL;
    }
    if (ahead->fill)
        bring_rest(ahead);
    return NULL;
}

void read_ahead_start(struct machine *machine)
{
    struct read_ahead *ahead = machine->read_ahead;
    uint64_t remote, shared;
    if (!ahead)
        return;
    physmap_page_counts(machine->memory, &remote, &shared);
    ahead->remote = remote > 0;
    if (ahead->fd < 0 && !ahead->wanted && !(remote && ahead->fill))
        return;
    ahead->started = pthread_create(&ahead->thread, NULL, read_ahead_main, ahead) == 0;
    if (!ahead->started)
        log_info("no thread that reads the guest's memory ahead");
}

void read_ahead_close(struct machine *machine)
{
    struct read_ahead *ahead = machine->read_ahead;
    if (!ahead)
        return;
    pthread_mutex_lock(&ahead->lock);
    ahead->stop = true;
    pthread_cond_signal(&ahead->stopped);
    pthread_mutex_unlock(&ahead->lock);
    if (ahead->started)
        pthread_join(ahead->thread, NULL);
    if (ahead->fd >= 0)
        close(ahead->fd);
    pthread_cond_destroy(&ahead->stopped);
    pthread_mutex_destroy(&ahead->lock);
    free(ahead);
    machine->read_ahead = NULL;
}
