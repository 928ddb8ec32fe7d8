/*
 * The option --vsock: the socket's path and the guest's address. Threading: none.
 */
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device/virtio_vsock.h"
#include "machine/config_priv.h"

static int set_vsock_property(struct vsock_config *vsock, const char *word, struct error *err)
{
    char *end;
    if (strncmp(word, "path=", 5) == 0 && word[5]) {
        if (strlen(word + 5) > VIRTIO_VSOCK_PATH_MAX)
            return error_set(err, -ENAMETOOLONG, "--vsock: the path %s is longer than %u characters", word + 5, VIRTIO_VSOCK_PATH_MAX);
        return config_replace(&vsock->path, word + 5, err);
    }
    if (strncmp(word, "cid=", 4) == 0) {
        errno = 0;
        unsigned long long cid = isdigit((unsigned char)word[4]) ? strtoull(word + 4, &end, 10) : 0;
        if (cid < VIRTIO_VSOCK_CID_MIN || cid > VIRTIO_VSOCK_CID_MAX || *end || errno)
            return error_set(err, -EINVAL, "--vsock: %s is not an address for a guest: 3 to 4294967294", word);
        vsock->cid = (uint32_t)cid;
        return 0;
    }
    return error_set(err, -EINVAL, "--vsock: unknown property \"%s\"; write path=SOCKET[,cid=N] (a comma in a path is written twice)", word);
}

int config_set_vsock(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    struct vsock_config vsock = {.present = true, .cid = VIRTIO_VSOCK_CID_MIN};
    char *text = strdup(value);
    if (!text)
        return error_set(err, -ENOMEM, "out of memory");
    int r = 0;
    for (char *word = text, *rest; r == 0 && word; word = rest) {
        rest = config_cut_path(word);
        r = set_vsock_property(&vsock, word, err);
    }
    if (r == 0 && !vsock.path)
        r = error_set(err, -EINVAL, "--vsock: no path; write path=SOCKET[,cid=N]");
    if (r == 0) {
        free(config->vsock.path);
        config->vsock = vsock;
    } else {
        free(vsock.path);
    }
    free(text);
    return r;
}
