/* What a network back end does for a device, on the loop's thread; what the guest's driver can take is told on a vCPU's. */
#include "filtered.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "net/net.h"

bool __real_net_transmit(struct net *net, const struct iovec *iov, unsigned iov_count);
bool __wrap_net_transmit(struct net *net, const struct iovec *iov, unsigned iov_count);
void __real_net_resume(struct net *net);
void __wrap_net_resume(struct net *net);
void __real_net_set_offloads(struct net *net, const struct net_offloads *offloads);
void __wrap_net_set_offloads(struct net *net, const struct net_offloads *offloads);

struct transmission {
    struct net *net;
    const struct iovec *iov;
    unsigned iov_count;
    bool result;
};

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

static void run_resume(void *ctx)
{
    __real_net_resume(ctx);
}

void __wrap_net_resume(struct net *net)
{
    filtered_call(IN_LOOP, run_resume, net);
}

struct setting {
    struct net *net;
    const struct net_offloads *offloads;
};

static void run_set_offloads(void *ctx)
{
    struct setting *setting = ctx;
    __real_net_set_offloads(setting->net, setting->offloads);
}

void __wrap_net_set_offloads(struct net *net, const struct net_offloads *offloads)
{
    struct setting setting = {net, offloads};
    filtered_call(IN_VCPU, run_set_offloads, &setting);
}

/* It becomes somebody else. */
__attribute__((constructor)) static void skip_permission(void)
{
    cmocka_set_skip_filter("test_permission");
}
