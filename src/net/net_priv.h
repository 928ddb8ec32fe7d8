/*
 * What back ends share: the common structure in front of theirs, their table entry, and parsing of option values.
 */
#ifndef DOPPEL_NET_NET_PRIV_H
#define DOPPEL_NET_NET_PRIV_H

#include <netinet/in.h>
#include <stddef.h>

#include "net/net.h"

/* Smallest MTU that IPv4 allows a host to have, and the largest that still fits NET_FRAME_BYTES_MAX. */
#define NET_MTU_MIN 68u
#define NET_MTU_MAX 65520u

/* The head of every back end's own structure. Zeroed before the options are parsed. */
struct net {
    const struct net_backend *backend;
    struct loop *loop;
    struct net_client client;
    struct net_info info;
    struct given_frame *given, **given_end; /* frames of net_give that wait; NULL, NULL: none ever did */
    unsigned given_count;
};

/* One "name=value" of a spec. `set` stores the value or fills `err` through net_option_error. */
struct net_option {
    const char *name;
    const char *example; /* a whole valid option, for messages: "restrict=on" */
    int (*set)(struct net *net, const struct net_option *option, const char *value, struct error *err);
};

struct net_backend {
    const char *name;
    const char *example; /* a whole valid spec */
    size_t size_bytes;   /* of the structure that begins with struct net */
    /* The text after "name:"; NULL: the back end takes none. */
    int (*set_argument)(struct net *net, const char *argument, struct error *err);
    const struct net_option *options; /* ends with a NULL name; may be NULL */
    /* All options are in: fills defaults and checks them against each other. Optional. Acquires nothing. */
    int (*check)(struct net *net, struct error *err);
    /* A descriptor or -errno; NULL: it needs none (net_acquire). */
    int (*acquire)(const struct net *net, struct error *err);
    /* On failure it leaves nothing behind. Optional, as are all below. */
    int (*open)(struct net *net, struct error *err);
    void (*close)(struct net *net);
    bool (*transmit)(struct net *net, const struct iovec *iov, unsigned iov_count); /* NULL: frames vanish */
    void (*resume)(struct net *net);
    size_t (*take)(struct net *net, void *frame, size_t size_bytes); /* NULL: none waits */
    void (*set_offloads)(struct net *net, const struct net_offloads *offloads);
    void (*get_info)(const struct net *net, struct net_info *info); /* NULL: net->info */
};

extern const struct net_backend net_backend_user, net_backend_tap, net_backend_none;

/* "--net: option 'restrict=maybe': must be on or off (example: restrict=on)"; returns -EINVAL. */
int net_option_error(const struct net_option *option, const char *value, struct error *err, const char *why);
int net_parse_switch(const struct net_option *option, const char *value, bool *on, struct error *err);
int net_parse_ipv4(const struct net_option *option, const char *value, struct in_addr *address, struct error *err);
/* A decimal number, nothing else in the text. False when it is none or outside [min, max]. */
bool net_parse_number(const char *text, unsigned long min, unsigned long max, unsigned long *number);

#endif
