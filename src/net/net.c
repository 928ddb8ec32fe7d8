/*
 * Network back ends: the table of them, parsing of the spec, and the calls that go through to the back end.
 *
 * A spec is "kind[:argument][,name=value]...". Parsing fills the back end's structure and acquires nothing, so that net_check is net_open
 * without its last step. The options mac= and mtu= belong to every back end.
 * Threading: see net.h; this file keeps no state of its own.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "net/net_priv.h"

#define GIVEN_MAX 512u

struct given_frame {
    struct given_frame *next;
    size_t size_bytes;
    uint8_t data[];
};

static const struct net_backend *const backends[] = {&net_backend_user, &net_backend_tap, &net_backend_none};

int net_option_error(const struct net_option *option, const char *value, struct error *err, const char *why)
{
    return error_set(err, -EINVAL, "network option '%s=%s': %s (example: %s)", option->name, value, why, option->example);
}

int net_parse_switch(const struct net_option *option, const char *value, bool *on, struct error *err)
{
    *on = strcmp(value, "on") == 0;
    if (*on || strcmp(value, "off") == 0)
        return 0;
    return net_option_error(option, value, err, "must be on or off");
}

int net_parse_ipv4(const struct net_option *option, const char *value, struct in_addr *address, struct error *err)
{
    if (inet_pton(AF_INET, value, address) == 1)
        return 0;
    return net_option_error(option, value, err, "must be an IPv4 address");
}

bool net_parse_number(const char *text, unsigned long min, unsigned long max, unsigned long *number)
{
    size_t digits = strspn(text, "0123456789");
    if (digits == 0 || digits > 9 || text[digits] != '\0')
        return false;
    *number = strtoul(text, NULL, 10);
    return *number >= min && *number <= max;
}

static int set_mac(struct net *net, const struct net_option *option, const char *value, struct error *err)
{
    unsigned byte[6];
    int used = -1;
    bool shaped = strspn(value, "0123456789abcdefABCDEF:") == 17 && value[17] == '\0' &&
                  sscanf(value, "%2x:%2x:%2x:%2x:%2x:%2x%n", &byte[0], &byte[1], &byte[2], &byte[3], &byte[4], &byte[5],
                         &used) == 6 && used == 17;
    if (!shaped)
        return net_option_error(option, value, err, "must be six bytes in hexadecimal with colons between");
    unsigned any = 0;
    for (unsigned i = 0; i < 6; i++) {
        net->info.mac[i] = (uint8_t)byte[i];
        any |= byte[i];
    }
    if (byte[0] & 1)
        return net_option_error(option, value, err, "is a multicast address; the first byte must be even");
    if (!any)
        return net_option_error(option, value, err, "is all zeros, which is no station's address");
    net->info.has_mac = true;
    return 0;
}

static int set_mtu(struct net *net, const struct net_option *option, const char *value, struct error *err)
{
    unsigned long mtu;
    if (!net_parse_number(value, NET_MTU_MIN, NET_MTU_MAX, &mtu))
        return net_option_error(option, value, err, "must be a number from 68 to 65520");
    net->info.mtu = (uint16_t)mtu;
    return 0;
}

static const struct net_option common_options[] = {
    {"mac", "mac=52:54:00:12:34:56", set_mac},
    {"mtu", "mtu=1500", set_mtu},
    {NULL},
};

static const struct net_option *option_find(const struct net_option *options, const char *name)
{
    for (; options && options->name; options++)
        if (strcmp(options->name, name) == 0)
            return options;
    return NULL;
}

/* Appends ", name" for each option; what does not fit is left out. */
static void option_names(const struct net_option *options, char *text, size_t size_bytes)
{
    for (; options && options->name; options++) {
        size_t used = strlen(text);
        snprintf(text + used, size_bytes - used, "%s%s", used ? ", " : "", options->name);
    }
}

static int parse_option(struct net *net, char *item, struct error *err)
{
    const struct net_backend *backend = net->backend;
    char *equals = strchr(item, '=');
    if (!equals)
        return error_set(err, -EINVAL, "network option '%s': options are written name=value (example: %s)", item,
                         backend->options ? backend->options->example : common_options->example);
    *equals = '\0';
    const struct net_option *option = option_find(backend->options, item);
    if (!option)
        option = option_find(common_options, item);
    if (option)
        return option->set(net, option, equals + 1, err);

    char names[200] = "";
    option_names(backend->options, names, sizeof names);
    option_names(common_options, names, sizeof names);
    return error_set(err, -EINVAL, "network option '%s' is unknown to '%s'; it knows %s (example: %s)", item, backend->name,
                     names, backend->example);
}

/* `head` is "kind" or "kind:argument"; allocates the back end's structure. */
static int parse_head(char *head, struct net **out, struct error *err)
{
    char *argument = strchr(head, ':');
    if (argument)
        *argument++ = '\0';
    const struct net_backend *backend = NULL;
    for (size_t i = 0; i < sizeof backends / sizeof backends[0]; i++)
        if (strcmp(backends[i]->name, head) == 0)
            backend = backends[i];
    if (!backend)
        return error_set(err, -EINVAL, "network '%s' is unknown; use user, tap:NAME or none (example: %s)", head,
                         net_backend_user.example);
    if (argument && !backend->set_argument)
        return error_set(err, -EINVAL, "network '%s' takes no ':%s'; options follow a comma (example: %s)", head, argument,
                         backend->example);

    struct net *net = calloc(1, backend->size_bytes);
    if (!net)
        return error_set(err, -ENOMEM, "network '%s': out of memory", head);
    net->backend = backend;
    net->info.kind = backend->name;
    int result = backend->set_argument ? backend->set_argument(net, argument ? argument : "", err) : 0;
    if (result < 0) {
        free(net);
        return result;
    }
    *out = net;
    return 0;
}

static int parse(struct net **out, const char *spec, struct error *err)
{
    char *text = strdup(spec);
    if (!text)
        return error_set(err, -ENOMEM, "network '%s': out of memory", spec);
    char *rest = text;
    char *item = strsep(&rest, ",");
    struct net *net = NULL;
    int result = parse_head(item, &net, err);
    while (result == 0 && (item = strsep(&rest, ",")))
        result = parse_option(net, item, err);
    if (result == 0 && net->backend->check)
        result = net->backend->check(net, err);
    free(text);
    if (result < 0) {
        free(net);
        return result;
    }
    *out = net;
    return 0;
}

int net_check(const char *spec, struct error *err)
{
    struct net *net;
    int result = parse(&net, spec, err);
    if (result == 0)
        free(net);
    return result;
}

int net_acquire(const char *spec, int *fd, struct error *err)
{
    struct net *net;
    int result = parse(&net, spec, err);
    *fd = -1;
    if (result < 0)
        return result;
    if (net->backend->acquire)
        result = *fd = net->backend->acquire(net, err);
    free(net);
    return result < 0 ? result : 0;
}

int net_open(struct net **out, const char *spec, struct loop *loop, const struct net_client *client, struct error *err)
{
    struct net *net;
    int result = parse(&net, spec, err);
    if (result < 0)
        return result;
    net->loop = loop;
    net->client = *client;
    net->info.link_up = true;
    result = net->backend->open ? net->backend->open(net, err) : 0;
    if (result < 0) {
        free(net);
        return result;
    }
    *out = net;
    return 0;
}

void net_close(struct net *net)
{
    if (!net)
        return;
    if (net->backend->close)
        net->backend->close(net);
    while (net->given) {
        struct given_frame *next = net->given->next;
        free(net->given);
        net->given = next;
    }
    free(net);
}

bool net_transmit(struct net *net, const struct iovec *iov, unsigned iov_count)
{
    return net->backend->transmit ? net->backend->transmit(net, iov, iov_count) : true;
}

static bool deliver(const struct net *net, const void *frame, size_t size_bytes)
{
    const struct iovec iov = {(void *)frame, size_bytes};
    return net->client.receive(net->client.ctx, &iov, 1);
}

void net_give(struct net *net, const void *frame, size_t size_bytes)
{
    if (!net->given && deliver(net, frame, size_bytes))
        return;
    struct given_frame *given = net->given_count < GIVEN_MAX ? malloc(sizeof *given + size_bytes) : NULL;
    if (!given)
        return;
    *given = (struct given_frame){.size_bytes = size_bytes};
    memcpy(given->data, frame, size_bytes);
    *(net->given ? net->given_end : &net->given) = given;
    net->given_end = &given->next;
    net->given_count++;
}

void net_resume(struct net *net)
{
    for (struct given_frame *given; (given = net->given); net->given_count--) {
        if (!deliver(net, given->data, given->size_bytes))
            return;
        net->given = given->next;
        free(given);
    }
    if (net->backend->resume)
        net->backend->resume(net);
}

size_t net_take(struct net *net, void *frame, size_t size_bytes)
{
    return net->backend->take ? net->backend->take(net, frame, size_bytes) : 0;
}

void net_set_offloads(struct net *net, const struct net_offloads *offloads)
{
    if (net->backend->set_offloads)
        net->backend->set_offloads(net, offloads);
}

void net_get_info(const struct net *net, struct net_info *info)
{
    if (net->backend->get_info)
        net->backend->get_info(net, info);
    else
        *info = net->info;
}

/* A NIC without a cable. */
static int none_open(struct net *net, struct error *err)
{
    net->info.link_up = false;
    return 0;
}

const struct net_backend net_backend_none = {
    .name = "none",
    .example = "none",
    .size_bytes = sizeof(struct net),
    .open = none_open,
};
