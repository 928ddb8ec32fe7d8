/* JSON files with a checksum (checked_json.h). */
#include "control/checked_json.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_API, openat);
SANDBOX_ALLOW(IN_API, write);
SANDBOX_ALLOW(IN_API, renameat);
SANDBOX_ALLOW(IN_API, unlinkat);
SANDBOX_ALLOW(IN_API, fsync);

#define CHECKSUM_BYTES 17u /* of text */
#define NAME_BYTES 64u

/* False: no memory. */
static bool checksum_of(const json_t *value, char text[CHECKSUM_BYTES])
{
    char *plain = json_dumps(value, JSON_COMPACT | JSON_SORT_KEYS);
    if (plain)
        snprintf(text, CHECKSUM_BYTES, "%016llx", (unsigned long long)XXH64(plain, strlen(plain), 0));
    free(plain);
    return plain;
}

json_t *checked_json_parse(const char *text, size_t bytes)
{
    char right[CHECKSUM_BYTES];
    json_t *value = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, NULL), *said = json_incref(json_object_get(value, "checksum"));
    json_object_del(value, "checksum");
    bool damaged = said && (!checksum_of(value, right) || !json_is_string(said) || strcmp(json_string_value(said), right) != 0);
    json_decref(said);
    if (json_is_object(value) && !damaged)
        return value;
    json_decref(value);
    return NULL;
}

int checked_json_read(int directory, const char *name, json_t **value)
{
    struct stat st;
    char *text = NULL;
    int fd = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK), r = 0;
    *value = NULL;
    if (fd < 0 || fstat(fd, &st))
        r = -errno;
    else if (!S_ISREG(st.st_mode) || st.st_size > (off_t)CHECKED_JSON_BYTES_MAX)
        r = -EBADMSG;
    else if (!(text = malloc((size_t)st.st_size + 1)))
        r = -ENOMEM;
    ssize_t size = r == 0 ? read(fd, text, (size_t)st.st_size) : 0; /* at once: json_loadfd reads by the byte */
    if (size < 0)
        r = -errno;
    if (r == 0 && !(*value = checked_json_parse(text, (size_t)size)))
        r = -EBADMSG;
    free(text);
    if (fd >= 0)
        close(fd);
    return r;
}

static char *text_of(const json_t *value)
{
    char checksum[CHECKSUM_BYTES], *text = NULL;
    json_t *summed = json_copy((json_t *)(uintptr_t)value);
    if (summed && checksum_of(value, checksum) && json_object_set_new(summed, "checksum", json_string(checksum)) == 0)
        text = json_dumps(summed, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
    json_decref(summed);
    return text;
}

static int write_all(int fd, const char *text, size_t length)
{
    for (size_t done = 0; done < length;) {
        ssize_t n = write(fd, text + done, length - done);
        if (n < 0 && errno != EINTR)
            return -errno;
        done += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

int checked_json_write(int directory, const char *name, const json_t *value, bool lasting)
{
    char draft[NAME_BYTES], *text = text_of(value);
    if (!text)
        return -ENOMEM;
    snprintf(draft, sizeof draft, ".%s", name);
    int fd = openat(directory, draft, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600), r = fd < 0 ? -errno : write_all(fd, text, strlen(text));
    if (r == 0)
        r = write_all(fd, "\n", 1);
    if (r == 0 && lasting && fsync(fd))
        r = -errno;
    if (r == 0 && renameat(directory, draft, directory, name))
        r = -errno;
    if (fd >= 0) {
        close(fd);
        if (r)
            unlinkat(directory, draft, 0);
    }
    free(text);
    return r == 0 && lasting && fsync(directory) ? -errno : r;
}
