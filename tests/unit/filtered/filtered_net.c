/* What a network back end does for a device, and for a card that is plugged, on the loop's thread. */
#include "filtered.h"

#include "net/net.h"

int __real_net_open(struct net **net, const char *spec, struct loop *loop, const struct net_client *client, struct error *err);
int __wrap_net_open(struct net **net, const char *spec, struct loop *loop, const struct net_client *client, struct error *err);
bool __real_net_transmit(struct net *net, const struct iovec *iov, unsigned iov_count);
bool __wrap_net_transmit(struct net *net, const struct iovec *iov, unsigned iov_count);
void __real_net_close(struct net *net);
void __wrap_net_close(struct net *net);
void __real_net_resume(struct net *net);
void __wrap_net_resume(struct net *net);

struct opening {
    struct net **net;
    const char *spec;
    struct loop *loop;
    const struct net_client *client;
    struct error *err;
    int result;
};

struct transmission {
    struct net *net;
    const struct iovec *iov;
    unsigned iov_count;
    bool result;
};

static void run_open(void *ctx)
{
    struct opening *opening = ctx;
    opening->result = __real_net_open(opening->net, opening->spec, opening->loop, opening->client, opening->err);
}

int __wrap_net_open(struct net **net, const char *spec, struct loop *loop, const struct net_client *client, struct error *err)
{
    struct opening opening = {net, spec, loop, client, err, 0};
    filtered_call(IN_LOOP, run_open, &opening);
    return opening.result;
}

static void run_transmit(void *ctx)
{
    struct transmission *transmission = ctx;
    transmission->result = __real_net_transmit(transmission->net, transmission->iov, transmission->iov_count);
}

bool __wrap_net_transmit(struct net *net, const struct iovec *iov, unsigned iov_count)
{
    struct transmission transmission = {net, iov, iov_count, false};
    filtered_call(IN_LOOP, run_transmit, &transmission);
    return transmission.result;
}

static void run_close(void *ctx)
{
    __real_net_close(ctx);
}

void __wrap_net_close(struct net *net)
{
    filtered_call(IN_LOOP, run_close, net);
}

static void run_resume(void *ctx)
{
    __real_net_resume(ctx);
}

void __wrap_net_resume(struct net *net)
{
    filtered_call(IN_LOOP, run_resume, net);
}
