/*
 * doppel clone: machines that go on from one moment of a running one, or from a snapshot. What they begin with is made by the machine (POST /doppel/v1/clone) in the directory of snapshots;
 * each clone then maps the same memory. A clone's generation ID is drawn here, and its network cards' addresses follow from it, so that the guest's agent can be told of them.
 * Each clone is started by a process of its own, several at a time.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cli/agent_client.h"
#include "cli/arguments.h"
#include "cli/report.h"
#include "cli/snapshot.h"

#define COUNT_MAX 1000ul
#define AT_ONCE 8u
#define AGENT_ANSWER_S_FIRST 2u
#define AGENT_ANSWER_S_LAST 16u
#define AGENT_TRIES 4u
#define AGENT_PAUSE_NS 50000000l

struct clone {
    const char *source;
    struct agent_identity identity;
    struct vmgenid_guid generation;
    bool has_vsock;
};

struct clones {
    struct instance_info vm;
    const char *base; /* names are this, or with -N behind it */
    unsigned long count, first;
    bool plain; /* one, with just that name */
    struct stored_snapshot *list;
    unsigned list_count;
    struct snapshot_chain *chain;
    struct chunk_secret secret;
    int lock;
};

/* ---- one clone ---- */

/* What belongs to the source alone: ports of the host, and addresses that it was given. */
static int change_card(char **spec)
{
    static const char *const own[] = {"forward=", "mac="};
    char *old = *spec, *at = old, *saved = NULL, *out = calloc(1, strlen(old) + 1);
    if (!out)
        return complain(STATUS_ERROR, "out of memory");
    for (char *part = strtok_r(at, ",", &saved); part; part = strtok_r(NULL, ",", &saved)) {
        bool keep = true;
        for (size_t i = 0; i < sizeof own / sizeof *own; i++)
            keep = keep && strncmp(part, own[i], strlen(own[i])) != 0;
        if (keep && *out)
            strcat(out, ",");
        if (keep)
            strcat(out, part);
    }
    free(old);
    *spec = out;
    return 0;
}

static int change(struct machine_config *config, void *ctx)
{
    struct clone *clone = ctx;
    struct agent_identity *identity = &clone->identity;
    int r = 0;
    config->is_clone = config->has_generation_id = true;
    config->generation_id = clone->generation;
    clone->has_vsock = config->vsock.present;
    for (unsigned i = 0; r == 0 && i < config->net_count; i++) {
        identity->card[i].slot = (uint8_t)config->net_card[i].slot;
        machine_clone_mac(&clone->generation, i, identity->card[i].mac);
        r = change_card(&config->net[i]);
    }
    identity->card_count = config->transport == TRANSPORT_MMIO ? 0 : config->net_count;
    return r;
}

/* Once. NULL: it has answered that it did all of it. */
static const char *tell_once(const struct clone *clone, const struct agent_address *address, unsigned answer_s, bool *again)
{
    struct agent_client client;
    struct agent_frame frame;
    uint8_t body[AGENT_IDENTITY_BYTES_MAX];
    const struct timeval limit = {.tv_sec = answer_s};
    const struct timespec pause = {.tv_nsec = AGENT_PAUSE_NS};
    bool there = agent_client_try(&client, address);
    for (unsigned i = 1; !there && i < AGENT_TRIES; i++) { /* the guest may have to be told first that its connections are gone */
        nanosleep(&pause, NULL);
        there = agent_client_try(&client, address);
    }
    *again = there;
    if (!there)
        return "no agent answers in the guest";
    setsockopt(client.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    size_t size = agent_identity_format(&clone->identity, body);
    bool answered = agent_client_send(&client, AGENT_IDENTITY, body, size) && agent_client_receive(&client, &frame);
    *again = !answered;
    agent_client_close(&client);
    explicit_bzero(body, sizeof body);
    return !answered ? "the guest's agent does not answer" : frame.type != AGENT_DONE ? "the guest's agent could not do all of it" : NULL;
}

/*
 * The agent of just this machine, never of one whose name only begins so. A connection that the guest took before it was told that all of them are gone ends without an answer, so
 * it is told once more, which does no harm; each time it has longer, as many clones may share few processors.
 */
static const char *tell_agent(const struct clone *clone, const char *name)
{
    const struct agent_address address = {.vm = name, .port = AGENT_PORT, .whole_name = true};
    const char *trouble = "no agent answers in the guest";
    bool again = clone->has_vsock;
    for (unsigned answer_s = AGENT_ANSWER_S_FIRST; again && answer_s <= AGENT_ANSWER_S_LAST; answer_s *= 2)
        trouble = tell_once(clone, &address, answer_s, &again);
    return trouble;
}

static int start_one(const struct clones *clones, const struct stored_snapshot *snapshot, const char *name)
{
    struct clone clone = {.source = clones->vm.name};
    struct instance_info old;
    int r;
    if (getrandom(clone.identity.seed, sizeof clone.identity.seed, 0) != (ssize_t)sizeof clone.identity.seed || vmgenid_draw(&clone.generation))
        return complain(STATUS_ERROR, "there are no random numbers: %s", strerror(errno));
    memcpy(clone.identity.machine_id, clone.generation.bytes, sizeof clone.identity.machine_id);
    snprintf(clone.identity.name, sizeof clone.identity.name, "%s", name);
    if (instance_read(name, &old, NULL) == 0) {
        bool alive = old.life == INSTANCE_ALIVE;
        instance_info_clear(&old);
        if (alive)
            return complain(STATUS_ERROR, "a virtual machine named %s is running", name);
    }
    r = snapshot_start(snapshot, clones->chain, name, clones->lock, change, &clone);
    const char *trouble = r ? NULL : tell_agent(&clone, name);
    if (trouble)
        complain(0, "%s: %s: it keeps the host name and network addresses of %s until it restarts", name, trouble, clone.source);
    return r;
}

/* ---- all ---- */

static void name_of(const struct clones *clones, unsigned long number, char name[INSTANCE_NAME_BYTES + 24])
{
    if (clones->plain)
        snprintf(name, INSTANCE_NAME_BYTES + 24, "%s", clones->base);
    else
        snprintf(name, INSTANCE_NAME_BYTES + 24, "%s-%lu", clones->base, number);
}

/* A process that starts one. */
struct starter {
    pid_t pid; /* 0: none */
    char name[INSTANCE_NAME_BYTES + 24];
};

static struct starter *find_starter(struct starter starter[AT_ONCE], pid_t pid)
{
    for (unsigned i = 0; i < AT_ONCE; i++)
        if (starter[i].pid == pid)
            return &starter[i];
    return NULL;
}

static int wait_for_one(struct starter starter[AT_ONCE])
{
    int status;
    pid_t pid = wait(&status);
    struct starter *ended = pid > 0 ? find_starter(starter, pid) : NULL;
    if (!ended)
        return STATUS_ERROR;
    ended->pid = 0;
    if (!WIFEXITED(status) || WEXITSTATUS(status))
        return WIFEXITED(status) ? WEXITSTATUS(status) : STATUS_ERROR;
    report_machine(ended->name);
    fflush(stdout);
    return 0;
}

static int start_all(const struct clones *clones, const struct stored_snapshot *snapshot)
{
    struct starter starter[AT_ONCE] = {0};
    unsigned running = 0;
    int worst = 0, status;
    for (unsigned long i = 0; i < clones->count; i++) {
        if (running == AT_ONCE && (running--, status = wait_for_one(starter)))
            worst = status;
        fflush(NULL);
        struct starter *next = find_starter(starter, 0);
        name_of(clones, clones->first + i, next->name);
        next->pid = fork();
        if (next->pid == 0)
            exit(start_one(clones, snapshot, next->name));
        if (next->pid > 0)
            running++;
        else
            worst = complain(STATUS_ERROR, "cannot start a process: %s", strerror(errno));
        next->pid = next->pid > 0 ? next->pid : 0;
    }
    while (running--)
        if ((status = wait_for_one(starter)))
            worst = status;
    return worst;
}

static int start_the_one(const struct clones *clones, const struct stored_snapshot *snapshot)
{
    char name[INSTANCE_NAME_BYTES + 24];
    name_of(clones, clones->first, name);
    int r = start_one(clones, snapshot, name);
    if (r == 0)
        report_machine(name);
    return r;
}

/* The first number from which on no machine that lives has these names. */
static int choose_names(struct clones *clones)
{
    struct instance_info *list;
    unsigned count;
    struct error err = {0};
    char longest[INSTANCE_NAME_BYTES + 24];
    size_t length = strlen(clones->base);
    clones->first = 1;
    if (instance_list(&list, &count, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    for (unsigned i = 0; !clones->plain && i < count; i++) {
        char *end;
        const char *name = list[i].name;
        unsigned long number = strncmp(name, clones->base, length) == 0 && name[length] == '-' ? strtoul(name + length + 1, &end, 10) : 0;
        if (number && !*end && list[i].life == INSTANCE_ALIVE && number >= clones->first)
            clones->first = number + 1;
    }
    instance_list_free(list, count);
    name_of(clones, clones->first + clones->count - 1, longest);
    return instance_name_valid(longest) ? 0 : complain(STATUS_USAGE, "clone: \"%s\" is no name for a virtual machine", longest);
}

/* The snapshot by its name, or one made now; *lock is shared then. */
static int find_snapshot(struct clones *clones, const char *vm, const char *name, const struct stored_snapshot **snapshot)
{
    struct error err = {0};
    char made[STORE_NAME_BYTES];
    int r = 0;
    clones->lock = snapshot_store_lock(vm, !name, &err);
    if (clones->lock < 0)
        return complain(STATUS_ERROR, "%s", err.text);
    if (!name)
        r = snapshot_create_for_clones(&clones->vm, clones->lock, made);
    if (r == 0 && snapshot_store_list(vm, &clones->list, &clones->list_count, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    *snapshot = r ? NULL : snapshot_store_by_name(clones->list, clones->list_count, name ? name : made);
    if (r == 0 && !*snapshot)
        return complain(STATUS_ERROR, "%s has no snapshot named %s", vm, name ? name : made);
    if (r == 0 && snapshot_store_chain(clones->list, clones->list_count, *snapshot, clones->chain, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    return r;
}

static int clone_from(struct clones *clones, const struct arguments *arguments)
{
    char text[2 * INSTANCE_NAME_BYTES + STORE_NAME_BYTES];
    struct error err = {0};
    const struct stored_snapshot *snapshot = NULL;
    if (snprintf(text, sizeof text, "%s", arguments->names[0]) >= (int)sizeof text)
        return complain(STATUS_USAGE, "clone: no virtual machine has a name so long");
    char *slash = strchr(text, '/'), base[INSTANCE_NAME_BYTES + 8];
    if (slash)
        *slash++ = '\0';
    if (!slash && instance_find(text, &clones->vm, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    if (!slash && clones->vm.life != INSTANCE_ALIVE)
        return complain(STATUS_ERROR, "%s is not running: there is nothing to clone (a snapshot of it can be: %s/NAME)", clones->vm.name, clones->vm.name);
    if (slash && !instance_name_valid(text))
        return complain(STATUS_USAGE, "clone: \"%s\" is no name of a virtual machine", text);
    if (slash)
        strcpy(clones->vm.name, text);
    snprintf(base, sizeof base, "%s-clone", clones->vm.name);
    clones->base = arguments->value[CLONE_NAME] ? arguments->value[CLONE_NAME] : base;
    clones->plain = arguments->value[CLONE_NAME] && clones->count == 1;
    int r = choose_names(clones);
    if (r == 0)
        r = find_snapshot(clones, clones->vm.name, slash, &snapshot);
    clones->chain->files.secret = &clones->secret;
    if (r)
        return r;
    report_list();
    return clones->count == 1 ? start_the_one(clones, snapshot) : start_all(clones, snapshot);
}

int clone_main(int argc, char **argv)
{
    struct arguments arguments;
    struct clones clones = {.count = 1, .lock = -1};
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    r = parse_number("clone", "--count", arguments.value[CLONE_COUNT], COUNT_MAX, &clones.count);
    if (r == 0 && !clones.count)
        r = complain(STATUS_USAGE, "clone: --count is 1 to %lu", COUNT_MAX);
    if (r == 0)
        r = snapshot_secret_from(arguments.value[CLONE_KEY_FILE], arguments.value[CLONE_KEY_COMMAND], &clones.secret);
    if (r == 0 && !(clones.chain = calloc(1, sizeof *clones.chain)))
        r = complain(STATUS_ERROR, "out of memory");
    if (r == 0)
        r = clone_from(&clones, &arguments);
    if (clones.lock >= 0)
        close(clones.lock);
    explicit_bzero(&clones.secret, sizeof clones.secret);
    snapshot_store_free(clones.list, clones.list_count);
    instance_info_clear(&clones.vm);
    free(clones.chain);
    return r;
}
