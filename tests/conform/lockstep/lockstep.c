/*
 * Two engines run the same guest, event by event: see lockstep.h, and --help.
 *
 * The parent makes both sides by fork, compares their events as they come, and never waits for a side longer than its patience lasts. Exit status: 0 nothing differs, 1 something does, 2 trouble,
 * 77 the translator cannot run on this host.
 * Threading: the parent has one thread, and so has each side.
 */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "lockstep.h"

#define SILENCE_SECONDS 60.0

static const char *const kind_names[EVENT_KINDS] = {
    [EVENT_PORT_READ] = "IN",    [EVENT_PORT_WRITE] = "OUT",    [EVENT_MMIO_READ] = "MMIO read", [EVENT_MMIO_WRITE] = "MMIO write",
    [EVENT_MSR_READ] = "RDMSR",  [EVENT_MSR_WRITE] = "WRMSR",   [EVENT_CR8_READ] = "CR8 read",   [EVENT_CR8_WRITE] = "CR8 write",
    [EVENT_TSC] = "TSC",         [EVENT_HALT] = "HLT",          [EVENT_INTERRUPT] = "interrupt", [EVENT_ASYNC] = "time",
    [EVENT_END] = "end",
};

static const char *const end_names[] = {
    [MACHINE_SHUTDOWN] = "the guest powered off", [MACHINE_RESET] = "the guest reset", [MACHINE_CRASH] = "the guest crashed", [MACHINE_STOPPED] = "stopped",
    [MACHINE_ERROR] = "trouble on the host", [END_HALTED] = "the guest halted for ever", [END_FAILED] = "the side failed", [END_LIMIT] = "as many events as asked for",
};

void lockstep_print_record(const struct record *r)
{
    if (r->kind == EVENT_END) {
        printf("end: %s\n", r->where <= END_LIMIT && end_names[r->where] ? end_names[r->where] : "?");
        return;
    }
    printf("%-10s %llx.%u = %llx, rip %llx, state %016llx", kind_names[r->kind], (unsigned long long)r->where, r->size, (unsigned long long)r->value,
           (unsigned long long)r->rip, (unsigned long long)r->state);
    if (r->ram)
        printf(", memory %016llx", (unsigned long long)r->ram);
    printf(", %.6f s\n", (double)r->time_ns / 1e9);
}

/* ---- one run ---- */

static double seconds_now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static pid_t side_start(struct lockstep *l, unsigned n)
{
    struct plan plan = l->plan;
    struct channel *channel = l->channel[n];
    atomic_store(&channel->produced, 0);
    atomic_store(&channel->consumed, 0);
    atomic_store(&channel->steps, 0);
    plan.engine = l->engine[n];
    plan.verbose = plan.verbose && n == 0;
    plan.error = plan.error && n == 1;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0)
        side_main(&plan, channel, plan.anywhere && n == 0 ? l->channel[1] : NULL);
    return pid;
}

static bool has_ended(pid_t pid)
{
    siginfo_t info = {0};
    return waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) || info.si_pid;
}

/* False: it does not come. */
static bool record_await(struct channel *channel, uint64_t number, pid_t pid, double silence_seconds)
{
    double end = 0;
    for (unsigned n = 0; atomic_load(&channel->produced) <= number; n++) {
        if (n < 200) {
            __builtin_ia32_pause();
            continue;
        }
        usleep(200);
        if (n % 64 == 0 && has_ended(pid) && atomic_load(&channel->produced) <= number)
            return false;
        if (end == 0)
            end = seconds_now() + silence_seconds;
        else if (n % 64 == 0 && seconds_now() > end)
            return false;
    }
    return true;
}

static bool records_differ(const struct record *a, const struct record *b)
{
    return a->kind != b->kind || a->size != b->size || a->where != b->where || a->value != b->value || a->rip != b->rip || a->state != b->state || a->time_ns != b->time_ns;
}

static bool compare_one(struct lockstep *l, struct run_result *result)
{
    uint64_t n = result->number;
    for (unsigned k = 0; k < 2; k++) {
        result->last[k] = l->channel[k]->ring[n % RING];
        atomic_store(&l->channel[k]->consumed, n + 1);
        l->tail[n % 16][k] = result->last[k];
    }
    l->tail_number = n;
    if (records_differ(&result->last[0], &result->last[1]))
        result->end = RUN_DIFFERS;
    else if (result->last[0].ram != result->last[1].ram)
        result->end = RUN_MEMORY_DIFFERS;
    else if (result->last[0].ram)
        result->ram_equal = n;
    return result->end == RUN_SAME && result->last[0].kind != EVENT_END;
}

struct run_result lockstep_run(struct lockstep *l)
{
    struct run_result result = {.end = RUN_SAME};
    pid_t pid[2];
    for (unsigned k = 0; k < 2; k++)
        pid[k] = side_start(l, k);
    for (;; result.number++) {
        bool there[2];
        for (unsigned k = 0; k < 2; k++)
            there[k] = pid[k] > 0 && record_await(l->channel[k], result.number, pid[k], l->silence_seconds);
        if (!there[0] || !there[1]) {
            result.end = there[0] || there[1] ? RUN_SILENT : RUN_FAILED;
            memset(result.last, 0, sizeof result.last);
            for (unsigned k = 0; k < 2; k++)
                if (there[k])
                    result.last[k] = l->channel[k]->ring[result.number % RING];
            for (unsigned k = 0; k < 2; k++)
                result.last[k].size = there[k]; /* who came */
            break;
        }
        if (!compare_one(l, &result))
            break;
    }
    if (result.end == RUN_SAME && result.last[0].where == END_FAILED)
        result.end = RUN_FAILED;
    for (unsigned k = 0; k < 2; k++) {
        /* What is asked for at the last event is there before the record is; a trace goes on until the event after. */
        if (pid[k] > 0) {
            kill(pid[k], SIGKILL);
            waitpid(pid[k], NULL, 0);
        }
    }
    return result;
}

/* ---- the program ---- */

static const char usage[] =
    "usage: conform_lockstep --kernel FILE [options]\n"
    "Runs the guest under both engines with the same events and compares all state at each of them.\n"
    "  --initrd FILE, --append LINE, --memory SIZE   as for doppel run; 128M\n"
    "  --type TEXT         lines typed at the shell's prompt (\\n between them)\n"
    "  --prompt TEXT       type after each line of output that begins so instead\n"
    "  --events N          end after so many events\n"
    "  --ram N             events between two comparisons of all memory; 20000\n"
    "  --seed S            of the guest's time; with --disturb also of what happens to the translator\n"
    "  --disturb           the translator flushes, drops, retranslates and changes its limits at random\n"
    "  --anywhere          interrupts also between events, wherever the translator is left (interp,bt only)\n"
    "  --engines A,B       interp,bt\n"
    "  --error N[:REG|:@GPA]  flips a bit of a register (number; default 3, RBX) or of a byte of memory on the second side after event N, to see it found\n"
    "  --expect-error      exit status 0 when a difference was found, 1 when none\n"
    "  --silence SECONDS   between two events, at most; 60\n"
    "  --verbose           the guest's output\n";

enum { OPTION_CONFIG = 1, OPTION_TYPE, OPTION_PROMPT, OPTION_EVENTS, OPTION_RAM, OPTION_SEED, OPTION_DISTURB, OPTION_ANYWHERE, OPTION_ENGINES, OPTION_ERROR, OPTION_EXPECT, OPTION_SILENCE, OPTION_VERBOSE };

static const struct option options[] = {
    {"kernel", required_argument, NULL, OPTION_CONFIG},  {"initrd", required_argument, NULL, OPTION_CONFIG}, {"append", required_argument, NULL, OPTION_CONFIG},
    {"memory", required_argument, NULL, OPTION_CONFIG},  {"type", required_argument, NULL, OPTION_TYPE}, {"prompt", required_argument, NULL, OPTION_PROMPT},    {"events", required_argument, NULL, OPTION_EVENTS},
    {"ram", required_argument, NULL, OPTION_RAM},        {"seed", required_argument, NULL, OPTION_SEED},     {"disturb", no_argument, NULL, OPTION_DISTURB}, {"anywhere", no_argument, NULL, OPTION_ANYWHERE},
    {"engines", required_argument, NULL, OPTION_ENGINES}, {"error", required_argument, NULL, OPTION_ERROR},   {"expect-error", no_argument, NULL, OPTION_EXPECT},
    {"silence", required_argument, NULL, OPTION_SILENCE}, {"verbose", no_argument, NULL, OPTION_VERBOSE},     {0}};

static void error_parse(struct plan *plan, const char *text)
{
    char *end;
    plan->error = true;
    plan->error_event = strtoull(text, &end, 0);
    plan->error_register = GPR_RBX;
    if (*end == ':' && end[1] == '@') {
        plan->error_register = GPR_RIP;
        plan->error_gpa = strtoull(end + 2, NULL, 0);
    } else if (*end == ':') {
        plan->error_register = (unsigned)strtoul(end + 1, NULL, 0) & 15;
    }
}

/* "\n" in a command line stands for a new line. */
static char *lines_of(const char *text)
{
    char *copy = strdup(text), *to = copy;
    for (const char *from = text; copy && *from; from++) {
        if (from[0] == '\\' && from[1] == 'n') {
            *to++ = '\n';
            from++;
        } else {
            *to++ = *from;
        }
    }
    if (copy)
        *to = 0;
    return copy;
}

static bool engines_parse(struct lockstep *l, char *text)
{
    char *comma = strchr(text, ',');
    if (!comma)
        return false;
    *comma = 0;
    l->engine[0] = text;
    l->engine[1] = comma + 1;
    return true;
}

static int option_take(struct lockstep *l, int o, int index, bool *expect_error)
{
    struct error err = {0};
    struct plan *plan = &l->plan;
    switch (o) {
    case OPTION_CONFIG:
        if (machine_config_set(plan->config, options[index].name, optarg, &err))
            return fprintf(stderr, "%s\n", err.text), -1;
        break;
    case OPTION_TYPE:
        plan->type = lines_of(optarg);
        break;
    case OPTION_PROMPT:
        plan->prompt = optarg;
        break;
    case OPTION_EVENTS:
        plan->events = strtoull(optarg, NULL, 0);
        break;
    case OPTION_RAM:
        plan->ram_interval = strtoull(optarg, NULL, 0);
        break;
    case OPTION_SEED:
        plan->seed = strtoull(optarg, NULL, 0);
        break;
    case OPTION_DISTURB:
        plan->disturb = true;
        break;
    case OPTION_ANYWHERE:
        plan->anywhere = true;
        break;
    case OPTION_ENGINES:
        return engines_parse(l, optarg) ? 0 : -1;
    case OPTION_ERROR:
        error_parse(plan, optarg);
        break;
    case OPTION_EXPECT:
        *expect_error = true;
        break;
    case OPTION_SILENCE:
        l->silence_seconds = strtod(optarg, NULL);
        break;
    case OPTION_VERBOSE:
        plan->verbose = true;
        break;
    default:
        return -1;
    }
    return 0;
}

static int channels_create(struct lockstep *l)
{
    l->channel_bytes = sizeof(struct channel) + l->plan.config->memory_bytes / PAGE_SIZE_BYTES * 8;
    for (unsigned k = 0; k < 2; k++) {
        l->channel[k] = mmap(NULL, l->channel_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (l->channel[k] == MAP_FAILED)
            return -errno;
    }
    return 0;
}

static int config_prepare(struct machine_config *config)
{
    struct error err = {0};
    static const char *const fixed[][2] = {{"memory", "128M"}, {"cpus", "1"}, {"net", "none"}, {"console", "none"}, {"on-reset", "exit"}, {"on-panic", "exit"}};
    machine_config_init(config);
    for (unsigned n = 0; n < sizeof fixed / sizeof *fixed; n++)
        if (machine_config_set(config, fixed[n][0], fixed[n][1], &err))
            return fprintf(stderr, "%s\n", err.text), -1;
    return 0;
}

int main(int argc, char **argv)
{
    struct machine_config config;
    struct lockstep l = {.plan = {.config = &config, .events = ~0ull, .ram_interval = 20000, .trace_word = ~0ull}, .engine = {"interp", "bt"}, .silence_seconds = SILENCE_SECONDS};
    struct error err = {0};
    bool expect_error = false;
    int index;
    if (config_prepare(&config))
        return 2;
    for (int o; (o = getopt_long(argc, argv, "", options, &index)) != -1;)
        if (option_take(&l, o, index, &expect_error) < 0)
            return fputs(usage, stderr), 2;
    if (!config.kernel || optind != argc)
        return fputs(usage, stderr), 2;
    if ((!strcmp(l.engine[0], "bt") || !strcmp(l.engine[1], "bt")) && bt_engine_ops.probe(&err)) {
        printf("this host cannot run the translator: %s\n", err.text);
        return 77;
    }
    if (l.plan.anywhere && (strcmp(l.engine[0], "interp") || strcmp(l.engine[1], "bt")))
        return fputs(usage, stderr), 2;
    if (channels_create(&l))
        return fprintf(stderr, "no memory\n"), 2;
    double start = seconds_now();
    struct run_result result = lockstep_run(&l);
    printf("\n%llu events in %.1f s, memory last compared at event %llu: ", (unsigned long long)result.number, seconds_now() - start, (unsigned long long)result.ram_equal);
    if (result.end == RUN_FAILED)
        return printf("neither side goes on\n"), 2;
    if (result.end == RUN_SAME) {
        lockstep_print_record(&result.last[0]);
        return expect_error;
    }
    printf("different\n");
    investigate(&l, &result);
    return !expect_error;
}
