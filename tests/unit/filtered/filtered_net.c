/* What a network back end does for a card that is plugged or goes, on the loop's thread. */
#include "filtered.h"

#include <string.h>

#include "net/net.h"
#include "net/slirp_library.h"

int __real_net_open(struct net **net, const char *spec, struct loop *loop, const struct net_client *client, struct error *err);
int __wrap_net_open(struct net **net, const char *spec, struct loop *loop, const struct net_client *client, struct error *err);
void __real_net_close(struct net *net);
void __wrap_net_close(struct net *net);

struct opening {
    struct net **net;
    const char *spec;
    struct loop *loop;
    const struct net_client *client;
    struct error *err;
    int result;
};

static void run_open(void *ctx)
{
    struct opening *opening = ctx;
    opening->result = __real_net_open(opening->net, opening->spec, opening->loop, opening->client, opening->err);
}

int __wrap_net_open(struct net **net, const char *spec, struct loop *loop, const struct net_client *client, struct error *err)
{
    struct opening opening = {net, spec, loop, client, err, 0};
    int r = strncmp(spec, "user", 4) ? 0 : library_load(&slirp_library_file, err); /* as the machine does before its threads are shut in */
    if (r < 0)
        return r;
    filtered_call(IN_LOOP, run_open, &opening);
    return opening.result;
}

static void run_close(void *ctx)
{
    __real_net_close(ctx);
}

void __wrap_net_close(struct net *net)
{
    filtered_call(IN_LOOP, run_close, net);
}
