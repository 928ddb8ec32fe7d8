/* Handlers of the API that belong to no device: instance, version, actions, pause and resume, metadata. On the HTTP server's thread. */
#include <errno.h>
#include <string.h>

#include "control/api_priv.h"
#include "doppel/doppel.h"
#include "util/loop.h"

int api_get_instance(struct api_request *request, struct error *err)
{
    struct api *api = request->api;
    request->answer = json_pack("{s:s, s:s, s:s, s:s}", "id", api->options.id, "state",
                                !request->machine ? "Not started" : machine_is_paused(request->machine) ? "Paused" : "Running", "vmm_version", doppel_version(), "app_name",
                                api->options.app_name);
    return request->answer ? 0 : -ENOMEM;
}

int api_get_version(struct api_request *request, struct error *err)
{
    request->answer = json_pack("{s:s}", "firecracker_version", API_VERSION);
    return request->answer ? 0 : -ENOMEM;
}

/* ---- actions ---- */

static int instance_start(struct api_request *request, struct error *err)
{
    return api_start(request->api, err);
}

static int flush_metrics(struct api_request *request, struct error *err)
{
    return api_metrics_flush(request->api->metrics, err);
}

static int send_ctrl_alt_del(struct api_request *request, struct error *err)
{
    return machine_ctrl_alt_del(request->machine, err);
}

int api_put_action(struct api_request *request, struct error *err)
{
    static const struct {
        const char *name;
        api_handler *run;
        bool before; /* legal only before the start, else only after */
    } actions[] = {{"InstanceStart", instance_start, true}, {"FlushMetrics", flush_metrics, false}, {"SendCtrlAltDel", send_ctrl_alt_del, false}};
    const char *type = api_text(request->body, "action_type");
    for (size_t i = 0; i < sizeof actions / sizeof *actions; i++) {
        if (strcmp(actions[i].name, type) != 0)
            continue;
        if (actions[i].before == (request->machine != NULL))
            return error_set(err, -EPERM, "The requested operation is not supported %s starting the microVM.", actions[i].before ? "after" : "before");
        return actions[i].run(request, err);
    }
    return -EINVAL; /* the schema knows no others */
}

int api_patch_vm(struct api_request *request, struct error *err)
{
    bool pause = strcmp(api_text(request->body, "state"), "Paused") == 0;
    uint64_t begin_ns = loop_now_ns();
    if (pause == machine_is_paused(request->machine))
        return 0;
    int r = pause ? machine_pause(request->machine, err) : machine_resume(request->machine, err);
    if (r)
        return r;
    api_metrics_latency(request->api->metrics, pause ? LATENCY_PAUSE : LATENCY_RESUME, loop_now_ns() - begin_ns);
    return 0;
}

/* ---- metadata ---- */

int api_put_mmds(struct api_request *request, struct error *err)
{
    return metadata_put(request->api->mmds, request->body, err);
}

int api_patch_mmds(struct api_request *request, struct error *err)
{
    return metadata_patch(request->api->mmds, request->body, err);
}

int api_get_mmds(struct api_request *request, struct error *err)
{
    request->answer = metadata_get(request->api->mmds);
    return request->answer ? 0 : -ENOMEM;
}

/* ---- what devices were configured to ---- */

static int get_device(struct api_request *request, const char *section, struct error *err)
{
    json_t *configured = api_section(request->api, section);
    if (!configured)
        return error_set(err, -ENODEV, "No such device: %s was not configured.", section);
    request->answer = json_deep_copy(configured);
    return request->answer ? 0 : -ENOMEM;
}

int api_get_balloon(struct api_request *request, struct error *err)
{
    return get_device(request, "balloon", err);
}
