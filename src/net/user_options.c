/*
 * The options of user networking: parsing, defaults and checks. Nothing is acquired here.
 *
 *     forward=tcp|udp:[hostaddr:]hostport:[guestaddr:]guestport   the host address is 127.0.0.1 unless given, so that nothing is
 *                                                                 opened to other machines by accident; the guest address is dhcpstart
 *     restrict=on|off   on: the guest reaches nothing: DHCP, ping of the gateway, and what is forwarded to it
 *     loopback=on|off   off: the gateway's address does not lead to services on the host's 127.0.0.1
 *     ipv6=on|off
 *     net=A.B.C.D/LENGTH, host=, dns=, dhcpstart=   the guest's network and the addresses in it: .2, .3 and .15
 *     hostname=NAME     told to the guest by DHCP
 */
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "net/user_priv.h"

#define FORWARD_FIELDS_MAX 5

#define DEFAULT_NETWORK "10.0.2.0"
#define DEFAULT_PREFIX_BITS 24u
#define PREFIX_BITS_MIN 8ul
#define PREFIX_BITS_MAX 29ul
/* Places in the network when not given. */
#define HOST_PLACE 2u
#define DNS_PLACE 3u
#define DHCP_PLACE 15u

static struct user_options *options_of(struct net *net)
{
    return &((struct user_base *)net)->options;
}

static int set_restrict(struct net *net, const struct net_option *option, const char *value, struct error *err)
{
    return net_parse_switch(option, value, &options_of(net)->restricted, err);
}

static int set_loopback(struct net *net, const struct net_option *option, const char *value, struct error *err)
{
    bool on;
    int result = net_parse_switch(option, value, &on, err);
    options_of(net)->no_loopback = !on;
    return result;
}

static int set_ipv6(struct net *net, const struct net_option *option, const char *value, struct error *err)
{
    bool on;
    int result = net_parse_switch(option, value, &on, err);
    options_of(net)->no_ipv6 = !on;
    return result;
}

static struct in_addr prefix_mask(unsigned bits)
{
    return (struct in_addr){htonl(~0u << (32 - bits))};
}

static int set_net(struct net *net, const struct net_option *option, const char *value, struct error *err)
{
    struct user_options *options = options_of(net);
    char text[INET_ADDRSTRLEN];
    const char *slash = strchr(value, '/');
    unsigned long bits;
    if (!slash || (size_t)(slash - value) >= sizeof text)
        return net_option_error(option, value, err, "must be an IPv4 network with its prefix length");
    snprintf(text, sizeof text, "%.*s", (int)(slash - value), value);
    if (inet_pton(AF_INET, text, &options->network) != 1)
        return net_option_error(option, value, err, "must be an IPv4 network with its prefix length");
    if (!net_parse_number(slash + 1, PREFIX_BITS_MIN, PREFIX_BITS_MAX, &bits))
        return net_option_error(option, value, err, "the prefix length must be from 8 to 29");
    options->mask = prefix_mask((unsigned)bits);
    if (options->network.s_addr & ~options->mask.s_addr)
        return net_option_error(option, value, err, "has bits set behind the prefix");
    if (options->network.s_addr == 0)
        return net_option_error(option, value, err, "is not a network that a host can be in");
    return 0;
}

static int set_host(struct net *net, const struct net_option *option, const char *value, struct error *err)
{
    return net_parse_ipv4(option, value, &options_of(net)->host, err);
}

static int set_dns(struct net *net, const struct net_option *option, const char *value, struct error *err)
{
    return net_parse_ipv4(option, value, &options_of(net)->dns, err);
}

static int set_dhcpstart(struct net *net, const struct net_option *option, const char *value, struct error *err)
{
    return net_parse_ipv4(option, value, &options_of(net)->dhcp_start, err);
}

static int set_hostname(struct net *net, const struct net_option *option, const char *value, struct error *err)
{
    struct user_options *options = options_of(net);
    size_t length = strlen(value);
    if (length == 0 || length >= sizeof options->hostname)
        return net_option_error(option, value, err, "must have 1 to 32 characters");
    for (const char *c = value; *c; c++)
        if (!isalnum((unsigned char)*c) && *c != '-')
            return net_option_error(option, value, err, "may have letters, digits and '-' only");
    memcpy(options->hostname, value, length + 1);
    return 0;
}

/*
 * Splits "proto:..." at the colons. Between two and four fields follow the protocol; with three, the first is a host address when it is
 * empty or has a dot in it, and a host port otherwise.
 */
static int set_forward(struct net *net, const struct net_option *option, const char *value, struct error *err)
{
    struct user_options *options = options_of(net);
    char text[128];
    if (options->forward_count == USER_FORWARDS_MAX)
        return net_option_error(option, value, err, "there are 64 forwards already");
    if ((size_t)snprintf(text, sizeof text, "%s", value) >= sizeof text)
        return net_option_error(option, value, err, "is too long");

    const char *field[FORWARD_FIELDS_MAX];
    unsigned count = 0;
    char *rest = text;
    for (char *item; (item = strsep(&rest, ":")); field[count++] = item)
        if (count == FORWARD_FIELDS_MAX)
            return net_option_error(option, value, err, "has too many fields");

    struct user_forward forward = {.udp = strcmp(field[0], "udp") == 0, .host.s_addr = htonl(INADDR_LOOPBACK)};
    if (!forward.udp && strcmp(field[0], "tcp") != 0)
        return net_option_error(option, value, err, "must begin with tcp: or udp:");
    if (count < 3)
        return net_option_error(option, value, err, "needs a host port and a guest port");
    bool has_host = count == 5 || (count == 4 && (field[1][0] == '\0' || strchr(field[1], '.')));
    bool has_guest = count == 5 || (count == 4 && !has_host);
    const char *host = has_host ? field[1] : "", *host_port = field[has_host ? 2 : 1];
    const char *guest = has_guest ? field[count - 2] : "", *guest_port = field[count - 1];

    unsigned long number;
    if (*host && inet_pton(AF_INET, host, &forward.host) != 1)
        return net_option_error(option, value, err, "the host address is not an IPv4 address");
    if (!net_parse_number(host_port, 1, 65535, &number))
        return net_option_error(option, value, err, "the host port is not a number from 1 to 65535");
    forward.host_port = (uint16_t)number;
    if (*guest && inet_pton(AF_INET, guest, &forward.guest) != 1)
        return net_option_error(option, value, err, "the guest address is not an IPv4 address");
    if (!net_parse_number(guest_port, 1, 65535, &number))
        return net_option_error(option, value, err, "the guest port is not a number from 1 to 65535");
    forward.guest_port = (uint16_t)number;
    options->forward[options->forward_count++] = forward;
    return 0;
}

const struct net_option user_option_table[] = {
    {"forward", "forward=tcp:2222:22", set_forward},
    {"restrict", "restrict=on", set_restrict},
    {"loopback", "loopback=off", set_loopback},
    {"ipv6", "ipv6=off", set_ipv6},
    {"net", "net=10.0.2.0/24", set_net},
    {"host", "host=10.0.2.2", set_host},
    {"dns", "dns=10.0.2.3", set_dns},
    {"dhcpstart", "dhcpstart=10.0.2.15", set_dhcpstart},
    {"hostname", "hostname=guest", set_hostname},
    {NULL},
};

/* Fills in the default and checks that the address is a host's in the network. */
static int place(const struct user_options *options, struct in_addr *address, unsigned default_place, const char *name, struct error *err)
{
    if (address->s_addr == 0)
        address->s_addr = options->network.s_addr | htonl(default_place);
    uint32_t own = ntohl(address->s_addr & ~options->mask.s_addr), all = ntohl(~options->mask.s_addr);
    if ((address->s_addr & options->mask.s_addr) == options->network.s_addr && own != 0 && own != all)
        return 0;
    char text[INET_ADDRSTRLEN], network[INET_ADDRSTRLEN];
    inet_ntop(AF_INET, address, text, sizeof text);
    inet_ntop(AF_INET, &options->network, network, sizeof network);
    return error_set(err, -EINVAL, "network option '%s=%s': is not a host's address in the guest's network %s; give another %s=", name,
                     text, network, name);
}

int user_options_check(struct net *net, struct error *err)
{
    struct user_options *options = options_of(net);
    if (options->mask.s_addr == 0) {
        inet_pton(AF_INET, DEFAULT_NETWORK, &options->network);
        options->mask = prefix_mask(DEFAULT_PREFIX_BITS);
    }
    int result = place(options, &options->host, HOST_PLACE, "host", err);
    if (result == 0)
        result = place(options, &options->dns, DNS_PLACE, "dns", err);
    if (result == 0)
        result = place(options, &options->dhcp_start, DHCP_PLACE, "dhcpstart", err);
    if (result < 0)
        return result;
    if (options->host.s_addr == options->dns.s_addr || options->host.s_addr == options->dhcp_start.s_addr ||
        options->dns.s_addr == options->dhcp_start.s_addr)
        return error_set(err, -EINVAL, "network options host=, dns= and dhcpstart= must be three different addresses");

    for (unsigned i = 0; i < options->forward_count; i++) {
        struct in_addr *guest = &options->forward[i].guest;
        if (guest->s_addr == 0)
            *guest = options->dhcp_start;
        if ((guest->s_addr & options->mask.s_addr) != options->network.s_addr)
            return error_set(err, -EINVAL, "network option 'forward': guest address %s is not in the guest's network; see net=",
                             inet_ntoa(*guest));
    }
    return 0;
}
