/* Handlers of the API for the balloon and pluggable memory of a machine that runs. On the HTTP server's thread. */
#include <errno.h>

#include "control/api_priv.h"

#define PAGES_PER_MIB 256

/* What GET /vm/config and GET /balloon show follows. */
static int remember(struct api_request *request, const char *section, const char *name)
{
    json_t *configured = api_section(request->api, section);
    return !configured || json_object_set_new(configured, name, json_integer(api_integer(request->body, name))) == 0 ? 0 : -ENOMEM;
}

/* A balloon in the making. */
static int change_configured(struct api_request *request, const char *name, struct error *err)
{
    struct api *api = request->api;
    json_t *changed = json_deep_copy(api_section(api, "balloon"));
    if (!changed)
        return error_set(err, -ENODEV, "No such device: balloon was not configured.");
    json_object_set(changed, name, json_object_get(request->body, name));
    int r = api_check_balloon(api, changed, err);
    if (r == 0)
        json_object_set(api->configuration, "balloon", changed);
    json_decref(changed);
    return r;
}

int api_patch_balloon(struct api_request *request, struct error *err)
{
    if (!request->machine)
        return change_configured(request, "amount_mib", err);
    int r = machine_balloon_resize(request->machine, (uint64_t)api_integer(request->body, "amount_mib"), err);
    return r ? r : remember(request, "balloon", "amount_mib");
}

static int get_status(struct api_request *request, struct machine_balloon *balloon, struct error *err)
{
    int r = machine_balloon_get(request->machine, balloon, err);
    if (r == 0 && !balloon->statistics)
        r = error_set(err, -ENODEV, "Statistics for the balloon device are not enabled.");
    return r;
}

int api_get_balloon_statistics(struct api_request *request, struct error *err)
{
    struct machine_balloon balloon;
    int r = get_status(request, &balloon, err);
    if (r)
        return r;
    json_t *answer = json_pack("{s:I, s:I, s:I, s:I}", "target_pages", (json_int_t)balloon.target_pages, "actual_pages", (json_int_t)balloon.actual_pages, "target_mib",
                               (json_int_t)(balloon.target_pages / PAGES_PER_MIB), "actual_mib", (json_int_t)(balloon.actual_pages / PAGES_PER_MIB));
    for (unsigned tag = 0; tag < MACHINE_BALLOON_STATISTICS; tag++)
        if (balloon.known[tag])
            json_object_set_new(answer, machine_balloon_statistic_names[tag], json_integer((json_int_t)(balloon.statistic[tag] & INT64_MAX)));
    request->answer = answer;
    return answer ? 0 : -ENOMEM;
}

int api_patch_balloon_statistics(struct api_request *request, struct error *err)
{
    if (!request->machine)
        return change_configured(request, "stats_polling_interval_s", err);
    int r = machine_balloon_set_interval(request->machine, (uint32_t)api_integer(request->body, "stats_polling_interval_s"), err);
    return r ? r : remember(request, "balloon", "stats_polling_interval_s");
}

int api_start_hinting(struct api_request *request, struct error *err)
{
    bool acknowledge = !request->body || !api_has(request->body, "acknowledge_on_stop") || api_flag(request->body, "acknowledge_on_stop");
    return machine_balloon_hint_start(request->machine, acknowledge, err);
}

int api_stop_hinting(struct api_request *request, struct error *err)
{
    return machine_balloon_hint_stop(request->machine, err);
}

int api_get_hinting(struct api_request *request, struct error *err)
{
    struct machine_balloon balloon;
    int r = machine_balloon_get(request->machine, &balloon, err);
    if (r == 0 && !balloon.hinting)
        r = error_set(err, -ENODEV, "the balloon was made without free page hinting");
    if (r)
        return r;
    request->answer = json_pack("{s:I, s:I}", "host_cmd", (json_int_t)balloon.host_command, "guest_cmd", (json_int_t)balloon.guest_command);
    return request->answer ? 0 : -ENOMEM;
}

/* ---- pluggable memory ---- */

int api_get_memory_hotplug(struct api_request *request, struct error *err)
{
    json_t *configured = api_section(request->api, "memory-hotplug");
    struct machine_memory memory = {0};
    if (!configured)
        return error_set(err, -ENODEV, "No such device: memory-hotplug was not configured.");
    int r = request->machine ? machine_memory_get(request->machine, &memory, err) : 0;
    if (r)
        return r;
    request->answer = json_deep_copy(configured);
    json_object_set_new(request->answer, "plugged_size_mib", json_integer((json_int_t)memory.plugged_mib));
    json_object_set_new(request->answer, "requested_size_mib", json_integer((json_int_t)memory.requested_mib));
    return request->answer ? 0 : -ENOMEM;
}

int api_patch_memory_hotplug(struct api_request *request, struct error *err)
{
    return machine_memory_request(request->machine, (uint64_t)api_integer(request->body, "requested_size_mib"), err);
}
