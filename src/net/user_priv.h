/*
 * User networking: what the options (user_options.c) tell the back end (user.c).
 */
#ifndef DOPPEL_NET_USER_PRIV_H
#define DOPPEL_NET_USER_PRIV_H

#include "net/net_priv.h"

#define USER_FORWARDS_MAX 64u
#define USER_HOSTNAME_BYTES 33u /* as long as libslirp keeps it */

struct user_forward {
    bool udp;
    struct in_addr host, guest;
    uint16_t host_port, guest_port;
};

/* Zeroed addresses mean "the default in this network"; user_options_check fills them in. */
struct user_options {
    bool restricted, no_ipv6, no_loopback;
    struct in_addr network, mask, host, dns, dhcp_start;
    char hostname[USER_HOSTNAME_BYTES];
    unsigned forward_count;
    struct user_forward forward[USER_FORWARDS_MAX];
};

/* The head of user.c's structure, so that option functions reach the options. */
struct user_base {
    struct net net;
    struct user_options options;
};

extern const struct net_option user_option_table[];
int user_options_check(struct net *net, struct error *err);

#define USER_EXAMPLE "user,forward=tcp:2222:22"

#endif
