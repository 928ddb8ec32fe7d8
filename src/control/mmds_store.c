/* The metadata store (mmds_store.h). */
#include "control/mmds_store.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define SEGMENT_BYTES 1024

struct mmds_store {
    pthread_mutex_t lock;
    json_t *value; /* NULL: nothing was put */
    size_t bytes_max;
};

struct mmds_store *mmds_store_create(size_t bytes_max)
{
    struct mmds_store *store = calloc(1, sizeof *store);
    if (!store)
        return NULL;
    pthread_mutex_init(&store->lock, NULL);
    store->bytes_max = bytes_max ? bytes_max : MMDS_BYTES_DEFAULT;
    return store;
}

void mmds_store_destroy(struct mmds_store *store)
{
    if (!store)
        return;
    json_decref(store->value);
    pthread_mutex_destroy(&store->lock);
    free(store);
}

/* Takes `value` over when it fits. With the lock held. */
static int replace(struct mmds_store *store, json_t *value, struct error *err)
{
    if (!value)
        return error_set(err, -ENOMEM, "out of memory");
    if (json_dumpb(value, NULL, 0, JSON_COMPACT) > store->bytes_max) {
        json_decref(value);
        return error_set(err, -EFBIG, "The MMDS data store is limited to %zu bytes; this would be larger.", store->bytes_max);
    }
    json_decref(store->value);
    store->value = value;
    return 0;
}

int mmds_store_put(struct mmds_store *store, const json_t *value, struct error *err)
{
    if (!json_is_object(value))
        return error_set(err, -EINVAL, "The MMDS data store must be a JSON object.");
    pthread_mutex_lock(&store->lock);
    int r = replace(store, json_deep_copy(value), err);
    pthread_mutex_unlock(&store->lock);
    return r;
}

/* RFC 7396, section 2. Takes `target` over and returns the result. The depth is that of the patch, which the parser bounds. */
static json_t *merge(json_t *target, const json_t *patch)
{
    const char *key;
    json_t *value;
    if (!json_is_object(patch)) {
        json_decref(target);
        return json_deep_copy(patch);
    }
    if (!json_is_object(target)) {
        json_decref(target);
        target = json_object();
    }
    json_object_foreach((json_t *)patch, key, value)
    {
        if (json_is_null(value))
            json_object_del(target, key);
        else
            json_object_set_new(target, key, merge(json_incref(json_object_get(target, key)), value));
    }
    return target;
}

int mmds_store_patch(struct mmds_store *store, const json_t *patch, struct error *err)
{
    int r;
    if (!json_is_object(patch))
        return error_set(err, -EINVAL, "The MMDS patch must be a JSON object.");
    pthread_mutex_lock(&store->lock);
    if (store->value)
        r = replace(store, merge(json_deep_copy(store->value), patch), err);
    else
        r = error_set(err, -ENODATA, "The MMDS data store is not initialized.");
    pthread_mutex_unlock(&store->lock);
    return r;
}

json_t *mmds_store_get(struct mmds_store *store)
{
    pthread_mutex_lock(&store->lock);
    json_t *copy = store->value ? json_deep_copy(store->value) : json_object();
    pthread_mutex_unlock(&store->lock);
    return copy;
}

static const json_t *step(const json_t *at, const char *segment)
{
    char *end;
    if (json_is_object(at))
        return json_object_get(at, segment);
    unsigned long index = strtoul(segment, &end, 10);
    return json_is_array(at) && *segment >= '0' && *segment <= '9' && !*end ? json_array_get(at, index) : NULL;
}

json_t *mmds_store_find(struct mmds_store *store, const char *path)
{
    char segment[SEGMENT_BYTES];
    pthread_mutex_lock(&store->lock);
    const json_t *at = store->value;
    while (at && *(path += strspn(path, "/"))) {
        size_t length = strcspn(path, "/");
        if (length >= sizeof segment) {
            at = NULL;
            break;
        }
        memcpy(segment, path, length);
        segment[length] = '\0';
        at = step(at, segment);
        path += length;
    }
    json_t *copy = at ? json_deep_copy(at) : NULL;
    pthread_mutex_unlock(&store->lock);
    return copy;
}
