/*
 * doppel events: what the machines have written into their events.log, in order of time; --follow watches the directories (inotify) of those that are there and
 * that come, and a crash loses nothing that was written.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/arguments.h"
#include "cli/report.h"

#define LINE_BYTES 1024u
#define LINES_MAX 100000u

struct source {
    char name[INSTANCE_NAME_BYTES];
    uint64_t offset_bytes; /* up to here its log was read */
    uint64_t inode;        /* of that log */
    int watch;             /* of inotify; -1: none */
};

struct events {
    struct arguments arguments;
    struct source *source;
    unsigned source_count;
    char **line; /* waiting to be sorted */
    unsigned line_count;
    int notify; /* -1: no following */
};

/* ---- printing ---- */

static void print_event(const struct events *events, const char *line)
{
    if (report_is_json()) {
        printf("%s\n", line);
        return;
    }
    json_t *event = json_loads(line, JSON_REJECT_DUPLICATES, NULL);
    const char *when = json_string_value(json_object_get(event, "time")), *vm = json_string_value(json_object_get(event, "vm")),
               *what = json_string_value(json_object_get(event, "event")), *detail = json_string_value(json_object_get(event, "detail"));
    if (when && vm && what)
        printf("%s %-20s %s%s%s\n", when, vm, what, detail ? ": " : "", detail ? detail : "");
    json_decref(event);
}

/* Lines begin with the time, so they sort as text. */
static int compare(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void flush(struct events *events)
{
    if (events->line_count)
        qsort(events->line, events->line_count, sizeof *events->line, compare);
    for (unsigned i = 0; i < events->line_count; i++) {
        print_event(events, events->line[i]);
        free(events->line[i]);
    }
    events->line_count = 0;
    fflush(stdout);
}

/* ---- reading ---- */

static void add_line(struct events *events, const char *line)
{
    if (events->line_count == LINES_MAX)
        flush(events);
    if (events->line_count % 256 == 0) {
        char **more = realloc(events->line, (events->line_count + 256) * sizeof *more);
        if (!more)
            return;
        events->line = more;
    }
    char *copy = strdup(line);
    if (copy)
        events->line[events->line_count++] = copy;
}

static void read_lines(struct events *events, int fd)
{
    char line[LINE_BYTES];
    FILE *file = fdopen(fd, "r");
    if (!file) {
        close(fd);
        return;
    }
    while (fgets(line, sizeof line, file)) {
        size_t length = strcspn(line, "\n");
        if (!line[length])
            continue; /* half a line, or one that is none of ours */
        line[length] = '\0';
        add_line(events, line);
    }
    fclose(file);
}

static void read_source(struct events *events, struct source *source)
{
    struct stat st;
    int fd = instance_open(source->name, "events.log", O_RDONLY);
    if (fd < 0)
        return;
    if (fstat(fd, &st) == 0) {
        if (st.st_ino != source->inode)
            source->offset_bytes = 0;
        lseek(fd, (off_t)source->offset_bytes, SEEK_SET);
        source->inode = st.st_ino;
        source->offset_bytes = (uint64_t)st.st_size;
    }
    read_lines(events, fd);
}

/* ---- which machines ---- */

static bool is_asked_for(const struct events *events, const char *name)
{
    const struct arguments *arguments = &events->arguments;
    for (unsigned i = 0; i < arguments->name_count; i++)
        if (strncmp(name, arguments->names[i], strlen(arguments->names[i])) == 0)
            return true;
    return !arguments->name_count;
}

static struct source *find_source(struct events *events, const char *name)
{
    for (unsigned i = 0; i < events->source_count; i++)
        if (strcmp(events->source[i].name, name) == 0)
            return &events->source[i];
    struct source *more = realloc(events->source, (events->source_count + 1) * sizeof *more);
    if (!more)
        return NULL;
    events->source = more;
    struct source *source = &more[events->source_count++];
    *source = (struct source){.watch = -1};
    snprintf(source->name, sizeof source->name, "%s", name);
    return source;
}

static void read_all(struct events *events)
{
    char path[INSTANCE_PATH_BYTES], old[] = "events.log.1";
    struct instance_info *list;
    unsigned count;
    if (instance_list(&list, &count, NULL))
        return;
    for (unsigned i = 0; i < count; i++) {
        struct source *source = is_asked_for(events, list[i].name) ? find_source(events, list[i].name) : NULL;
        if (!source)
            continue;
        if (events->notify >= 0 && instance_path_of(source->name, "", path, NULL) == 0)
            source->watch = inotify_add_watch(events->notify, path, IN_MODIFY | IN_CREATE | IN_ONLYDIR);
        int fd = source->inode ? -1 : instance_open(source->name, old, O_RDONLY);
        if (fd >= 0)
            read_lines(events, fd);
        read_source(events, source);
    }
    instance_list_free(list, count);
    flush(events);
}

static int follow(struct events *events)
{
    char changes[8192], root[INSTANCE_PATH_BYTES];
    struct error err = {0};
    if (instance_root(root, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    if (inotify_add_watch(events->notify, root, IN_MOVED_TO | IN_DELETE | IN_ONLYDIR) < 0)
        return complain(STATUS_ERROR, "cannot watch %s: %s", root, strerror(errno));
    for (;;) {
        read_all(events);
        if (ferror(stdout))
            return STATUS_ERROR;
        ssize_t n = read(events->notify, changes, sizeof changes);
        if (n < 0 && errno != EINTR)
            return complain(STATUS_ERROR, "cannot watch %s: %s", root, strerror(errno));
    }
}

int events_main(int argc, char **argv)
{
    struct events events = {.notify = -1};
    int r = parse_arguments(argc, argv, &events.arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (events.arguments.value[EVENTS_FOLLOW]) {
        events.notify = inotify_init1(IN_CLOEXEC);
        r = events.notify >= 0 ? follow(&events) : complain(STATUS_ERROR, "cannot watch: %s", strerror(errno));
    } else {
        read_all(&events);
    }
    free(events.line);
    free(events.source);
    return r;
}
