/* doppel stats: what virtual machines use, once: a table from two looks half a second apart, or all counters as JSON. */
#include <time.h>

#include "cli/report.h"
#include "cli/usage.h"

#define BETWEEN_NS 500000000l

static void print_row(const struct usage *before, const struct usage *now)
{
    char used[16], all[16], resident[16], read[16], written[16], received[16], sent[16];
    struct rates rates = usage_rates(before, now);
    print_bytes((double)now->guest_used_bytes, used);
    print_bytes((double)now->guest_bytes, all);
    print_bytes((double)now->resident_bytes, resident);
    print_bytes((double)now->disk_read_bytes, read);
    print_bytes((double)now->disk_write_bytes, written);
    print_bytes((double)now->net_rx_bytes, received);
    print_bytes((double)now->net_tx_bytes, sent);
    printf("%-20s %-10s %6.1f %8s / %-6s %8s %8s / %-6s %8s / %-6s\n", now->name, now->answered ? now->state : "silent", 100 * rates.cpu, used, all, resident, read, written,
           received, sent);
}

int stats_main(int argc, char **argv)
{
    struct arguments arguments;
    struct usages before, now;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    r = usages_take(&arguments, &before);
    if (report_is_json()) {
        report_value(usages_json(&before));
        usages_free(&before);
        return r;
    }
    nanosleep(&(struct timespec){.tv_nsec = BETWEEN_NS}, NULL);
    usages_take_again(&before, &now);
    printf("%-20s %-10s %6s %17s %8s %17s %17s\n", "NAME", "STATE", "CPU %", "GUEST MEM / OF", "RESIDENT", "DISK READ / WRIT.", "NET RECV. / SENT");
    for (unsigned i = 0; i < now.count; i++)
        print_row(usages_find(&before, &now.list[i]), &now.list[i]);
    usages_free(&before);
    usages_free(&now);
    return r;
}
