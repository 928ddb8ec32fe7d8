/* Handlers that change disks, network cards and persistent memory of a running machine. On the HTTP server's thread. */
#include <errno.h>

#include "control/api_priv.h"

/* A limiter's buckets as the machine's functions take them: NULL where the body has none, so that it stays. */
struct buckets {
    struct bucket_config bandwidth, ops;
    const struct bucket_config *bandwidth_given, *ops_given;
};

static struct buckets *buckets_of(const json_t *limiter, struct buckets *buckets)
{
    *buckets = (struct buckets){0};
    if (api_has(limiter, "bandwidth")) {
        api_bucket(json_object_get(limiter, "bandwidth"), &buckets->bandwidth);
        buckets->bandwidth_given = &buckets->bandwidth;
    }
    if (api_has(limiter, "ops")) {
        api_bucket(json_object_get(limiter, "ops"), &buckets->ops);
        buckets->ops_given = &buckets->ops;
    }
    return buckets;
}

/* What GET /vm/config shows from now on; a bucket that limits nothing is none. */
static void note_limiter(json_t *element, const char *field, const json_t *limiter)
{
    static const char *const names[] = {"bandwidth", "ops"};
    json_t *before = json_object_get(element, field), *now = json_is_object(before) ? json_deep_copy(before) : json_object();
    for (unsigned i = 0; i < 2; i++) {
        const json_t *bucket = json_object_get(limiter, names[i]);
        if (!json_is_object(bucket))
            continue;
        bool limits = api_integer(bucket, "size") && api_integer(bucket, "refill_time");
        json_object_set(now, names[i], limits ? (json_t *)bucket : json_null());
    }
    bool none = !api_has(now, names[0]) && !api_has(now, names[1]);
    json_object_set(element, field, none ? json_null() : now);
    json_decref(now);
}

/* NULL with a message: nothing was configured by that name. */
static json_t *element_of(struct api_request *request, const char *section, const char *id_field, struct error *err)
{
    json_t *element = api_section_element(request->api, section, id_field, request->id);
    if (!element)
        error_set(err, -ENODEV, "No such device: \"%s\" is not in %s.", request->id, section);
    return element;
}

int api_patch_drive(struct api_request *request, struct error *err)
{
    struct buckets buckets;
    const json_t *limiter = json_object_get(request->body, "rate_limiter");
    json_t *element = element_of(request, "drives", "drive_id", err);
    if (!element)
        return -ENODEV;
    if (api_has(request->body, "path_on_host")) {
        int r = machine_disk_replace(request->machine, request->id, api_text(request->body, "path_on_host"), err);
        if (r)
            return r;
        json_object_set(element, "path_on_host", json_object_get(request->body, "path_on_host"));
    }
    if (!json_is_object(limiter))
        return 0;
    buckets_of(limiter, &buckets);
    int r = machine_disk_limit(request->machine, request->id, buckets.bandwidth_given, buckets.ops_given, err);
    if (r == 0)
        note_limiter(element, "rate_limiter", limiter);
    return r;
}

int api_patch_network(struct api_request *request, struct error *err)
{
    static const char *const fields[] = {"tx_rate_limiter", "rx_rate_limiter"};
    struct buckets buckets;
    json_t *element = element_of(request, "network-interfaces", "iface_id", err);
    if (!element)
        return -ENODEV;
    for (unsigned receive = 0; receive < 2; receive++) {
        const json_t *limiter = json_object_get(request->body, fields[receive]);
        if (!json_is_object(limiter))
            continue;
        buckets_of(limiter, &buckets);
        int r = machine_net_limit(request->machine, request->id, receive, buckets.bandwidth_given, buckets.ops_given, err);
        if (r)
            return r;
        note_limiter(element, fields[receive], limiter);
    }
    return 0;
}

int api_patch_pmem(struct api_request *request, struct error *err)
{
    struct buckets buckets;
    const json_t *limiter = json_object_get(request->body, "rate_limiter");
    json_t *element = element_of(request, "pmem", "id", err);
    if (!element)
        return -ENODEV;
    if (!json_is_object(limiter))
        return 0;
    buckets_of(limiter, &buckets);
    int r = machine_pmem_limit(request->machine, request->id, buckets.bandwidth_given, buckets.ops_given, err);
    if (r == 0)
        note_limiter(element, "rate_limiter", limiter);
    return r;
}
