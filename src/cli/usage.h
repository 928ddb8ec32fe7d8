/* What virtual machines use, from their statistics: for stats and top. Single-threaded. */
#ifndef DOPPEL_CLI_USAGE_H
#define DOPPEL_CLI_USAGE_H

#include "cli/arguments.h"

#define USAGE_EXITS_MAX 24u

struct usage_exit {
    char name[24];
    uint64_t count;
};

/* Sums since the machine's start, but for what it has now. */
struct usage {
    char name[INSTANCE_NAME_BYTES], state[24];
    bool answered; /* else all below is 0 */
    uint64_t when_ns; /* of the host's monotonic clock */
    uint64_t cpu_ns, disk_read_bytes, disk_write_bytes, net_rx_bytes, net_tx_bytes;
    uint64_t resident_bytes, guest_used_bytes, guest_bytes; /* now */
    struct usage_exit exit[USAGE_EXITS_MAX]; /* why guest code was left */
    unsigned exit_count;
    json_t *statistics; /* all of it; NULL: none */
};

struct usages {
    struct usage *list;
    unsigned count;
};

/* Of the machines that are asked for and live. An exit status. */
int usages_take(const struct arguments *arguments, struct usages *usages);
/* Those of an earlier look that still are there. */
void usages_take_again(const struct usages *before, struct usages *now);
/* An array of all that each tells; the caller's. NULL: no memory. */
json_t *usages_json(const struct usages *usages);
void usages_free(struct usages *usages);
/* The same machine's usage in an earlier look; NULL: it was not there. */
const struct usage *usages_find(const struct usages *usages, const struct usage *usage);

/* Between two looks; 0 without an earlier one. */
struct rates {
    double cpu; /* processors */
    double disk_read, disk_write, net_rx, net_tx, exits; /* a second */
    struct usage_exit top[3]; /* most frequent reasons; counts are a second's */
};
struct rates usage_rates(const struct usage *before, const struct usage *now);

/* "12.3 M": a number of bytes. */
void print_bytes(double bytes, char text[16]);

#endif
