/* doppel top: what virtual machines use, again and again, drawn by ncurses or printed (--batch). Keys: q ends it, c m d n sort, space looks at once. */
#include <locale.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/curses_library.h"
#include "cli/report.h"
#include "cli/usage.h"

#define DELAY_SECONDS 2ul
#define DELAY_SECONDS_MAX 3600ul

struct row {
    const struct usage *usage;
    struct rates rates;
};

struct top {
    struct arguments arguments;
    unsigned long delay_s, count; /* count 0: for ever */
    bool batch;
    int order; /* a key of orders[] */
    struct usages before, now;
    struct row *row;
};

/* ---- order ---- */

static double by_cpu(const struct row *row)
{
    return row->rates.cpu;
}

static double by_memory(const struct row *row)
{
    return (double)row->usage->resident_bytes;
}

static double by_disk(const struct row *row)
{
    return row->rates.disk_read + row->rates.disk_write;
}

static double by_net(const struct row *row)
{
    return row->rates.net_rx + row->rates.net_tx;
}

static const struct {
    int key;
    const char *name;
    double (*value)(const struct row *row);
} orders[] = {{'c', "CPU", by_cpu}, {'m', "memory", by_memory}, {'d', "disk", by_disk}, {'n', "network", by_net}};
#define ORDERS (sizeof orders / sizeof *orders)

static int compare(const void *a, const void *b, void *order)
{
    double (*value)(const struct row *row) = orders[*(const int *)order].value;
    double x = value(a), y = value(b);
    return x < y ? 1 : x > y ? -1 : strcmp(((const struct row *)a)->usage->name, ((const struct row *)b)->usage->name);
}

/* ---- one look ---- */

static int look(struct top *top)
{
    usages_free(&top->before);
    top->before = top->now;
    int r = usages_take(&top->arguments, &top->now);
    free(top->row);
    top->row = calloc(top->now.count + 1, sizeof *top->row);
    for (unsigned i = 0; top->row && i < top->now.count; i++)
        top->row[i] = (struct row){&top->now.list[i], usage_rates(usages_find(&top->before, &top->now.list[i]), &top->now.list[i])};
    if (top->row)
        qsort_r(top->row, top->now.count, sizeof *top->row, compare, &top->order);
    return r;
}

static void format_row(const struct row *row, char text[256])
{
    char memory[16], resident[16], read[16], written[16], received[16], sent[16];
    const struct rates *rates = &row->rates;
    print_bytes((double)row->usage->guest_used_bytes, memory);
    print_bytes((double)row->usage->resident_bytes, resident);
    print_bytes(rates->disk_read, read);
    print_bytes(rates->disk_write, written);
    print_bytes(rates->net_rx, received);
    print_bytes(rates->net_tx, sent);
    int n = snprintf(text, 256, "%-16.16s %-9.9s %6.1f %6s %6s %6s %6s %6s %6s %8.0f ", row->usage->name, row->usage->answered ? row->usage->state : "silent", 100 * rates->cpu,
                     memory, resident, read, written, received, sent, rates->exits);
    for (unsigned i = 0; i < 3 && rates->top[i].count; i++)
        n += snprintf(text + n, 256 - (size_t)n, " %s %llu", rates->top[i].name, (unsigned long long)rates->top[i].count);
}

static void format_head(char text[256])
{
    snprintf(text, 256, "%-16s %-9s %6s %6s %6s %6s %6s %6s %6s %8s  %s", "NAME", "STATE", "CPU %", "GUEST", "RESID.", "READ/s", "WRIT/s", "RECV/s", "SENT/s", "EXITS/s",
             "MOST FREQUENT, a second");
}

static void print_look(const struct top *top)
{
    char text[256];
    if (report_is_json()) {
        report_line(usages_json(&top->now));
        return;
    }
    format_head(text);
    printf("%s\n", text);
    for (unsigned i = 0; top->row && i < top->now.count; i++) {
        format_row(&top->row[i], text);
        printf("%s\n", text);
    }
    fflush(stdout);
}

static void draw_look(const struct top *top, WINDOW *screen)
{
    char text[256];
    int rows = getmaxy(screen), columns = getmaxx(screen);
    double cpu = 0;
    werase(screen);
    for (unsigned i = 0; top->row && i < top->now.count; i++)
        cpu += top->row[i].rates.cpu;
    mvwprintw(screen, 0, 0, "doppel: %u virtual machine%s, %.1f %% of a processor; by %s", top->now.count, top->now.count == 1 ? "" : "s", 100 * cpu, orders[top->order].name);
    mvwprintw(screen, 1, 0, "c CPU, m memory, d disk, n network, q quit");
    format_head(text);
    wattr_on(screen, A_REVERSE, NULL);
    mvwprintw(screen, 3, 0, "%-*.*s", columns, columns, text);
    wattr_off(screen, A_REVERSE, NULL);
    for (unsigned i = 0; top->row && i < top->now.count && (int)i < rows - 4; i++) {
        format_row(&top->row[i], text);
        mvwprintw(screen, 4 + (int)i, 0, "%.*s", columns, text);
    }
    wrefresh(screen);
}

/* ---- again and again ---- */

/* False: the end. */
static bool take_key(struct top *top, WINDOW *screen)
{
    int key = wgetch(screen);
    for (unsigned i = 0; i < ORDERS; i++)
        if (orders[i].key == key)
            top->order = (int)i;
    return key != 'q' && key != 3;
}

static int draw(struct top *top)
{
    struct error err = {0};
    if (library_load(&curses_library_file, &err))
        return complain(STATUS_ERROR, "%s; --batch does without", err.text);
    setlocale(LC_ALL, "");
    WINDOW *screen = initscr();
    cbreak();
    noecho();
    curs_set(0);
    wtimeout(screen, (int)top->delay_s * 1000);
    for (unsigned long n = 0; !top->count || n < top->count; n++) {
        look(top);
        draw_look(top, screen);
        if (!take_key(top, screen))
            break;
    }
    endwin();
    return 0;
}

static int print(struct top *top)
{
    int r = 0;
    for (unsigned long n = 0; !top->count || n < top->count; n++) {
        if (n)
            poll(NULL, 0, (int)top->delay_s * 1000);
        r = look(top);
        print_look(top);
        if (ferror(stdout))
            return STATUS_ERROR;
    }
    return r;
}

int top_main(int argc, char **argv)
{
    struct top top = {.delay_s = DELAY_SECONDS};
    int r = parse_arguments(argc, argv, &top.arguments);
    if (r)
        return r < 0 ? 0 : r;
    top.batch = top.arguments.value[TOP_BATCH] || report_is_json();
    r = parse_number(argv[0], "--delay", top.arguments.value[TOP_DELAY], DELAY_SECONDS_MAX, &top.delay_s);
    if (r == 0)
        r = parse_number(argv[0], "--count", top.arguments.value[TOP_COUNT], 1000000000, &top.count);
    if (r)
        return r;
    if (!top.batch && !(isatty(STDIN_FILENO) && isatty(STDOUT_FILENO)))
        return complain(STATUS_USAGE, "top: this is no terminal; use --batch");
    if (!top.batch && top.delay_s == 0)
        top.delay_s = 1;
    if (top.batch)
        r = print(&top);
    else
        r = draw(&top);
    usages_free(&top.before);
    usages_free(&top.now);
    free(top.row);
    return r;
}
