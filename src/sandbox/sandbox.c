/*
 * Giving up what a thread does not need (sandbox.h): the order is namespaces, root directory, user, capabilities, paths, system calls, because each step needs what a
 * later one takes away.
 *
 * All of it is the calling thread's: Linux keeps credentials, Landlock domains and filters by thread, and root directories, too, once they are not shared (CLONE_FS).
 * Raw system calls on purpose: the C library's setresuid() would change all threads.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/mount.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sandbox/broker.h"
#include "sandbox/sandbox_priv.h"
#include "util/log.h"

/* Threads that an API thread makes shut themselves in further. */
SANDBOX_ALLOW(IN_API, capget);
SANDBOX_ALLOW(IN_API, landlock_restrict_self);
SANDBOX_ALLOW_IF(IN_API, prctl, ARG_IS(0, PR_GET_NO_NEW_PRIVS));
SANDBOX_ALLOW_IF(IN_API, seccomp, ARG_IS(0, SECCOMP_SET_MODE_FILTER));

#define NOBODY 65534u
#define BROKER_KIND (SANDBOX_KINDS - 1)
_Static_assert(IN_BROKER == 1u << BROKER_KIND, "the last kind");
#define REFER (1ull << 13) /* LANDLOCK_ACCESS_FS_REFER; not in all headers */
#define COPY_BYTES_MAX 65536

struct sandbox {
    struct sock_fprog filter[SANDBOX_KINDS];
    /* What the filters are made for, aside until joined. */
    unsigned needs;
    const char *omit;
    bool with_broker;
    int filter_error;
    bool compiles;
    pthread_t compiler;
    int landlock[SANDBOX_KINDS]; /* rule sets; -1: the kernel has none */
    int empty_root, network;     /* descriptors; -1: not available or not wanted */
    int broker;                  /* -1: none */
    bool drop_user, filters;
    unsigned outside; /* kinds that stay in the host's root directory, as who they are: they use the user's files or sockets */
};

static long landlock_version(void)
{
    return syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
}

/* root: the empty one, for a thread that goes there; -1: none. */
static int landlock_add(int rules, const struct sandbox_path *path, int root, uint64_t rights)
{
    const uint64_t of_files = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE | 1ull << 14;
    struct stat st;
    uint64_t wanted = path->writable ? rights & ~(uint64_t)LANDLOCK_ACCESS_FS_EXECUTE : LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR;
    int fd = root >= 0 ? openat(root, path->path + strspn(path->path, "/"), O_PATH | O_CLOEXEC) : open(path->path, O_PATH | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0) {
        int r = -errno;
        if (fd >= 0)
            close(fd);
        return r == -ENOENT ? 0 : r; /* what is not there needs no leave */
    }
    if (!S_ISDIR(st.st_mode))
        wanted &= of_files & rights;
    struct landlock_path_beneath_attr rule = {.allowed_access = wanted, .parent_fd = fd};
    long r = syscall(SYS_landlock_add_rule, rules, LANDLOCK_RULE_PATH_BENEATH, &rule, 0);
    r = r < 0 ? -errno : 0;
    close(fd);
    return (int)r;
}

/* ---- namespaces ---- */

static bool write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool written = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0)
        close(fd);
    return written;
}

/* The user stays who they are, and may do in their own namespaces what root may elsewhere. */
static bool enter_user_namespace(uid_t uid, gid_t gid)
{
    char line[64];
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWIPC))
        return false;
    snprintf(line, sizeof line, "%u %u 1", uid, uid);
    bool mapped = write_file("/proc/self/setgroups", "deny") && write_file("/proc/self/uid_map", line);
    snprintf(line, sizeof line, "%u %u 1", gid, gid);
    return mapped && write_file("/proc/self/gid_map", line);
}

/*
 * Signals go to this process and those it makes, no others. One domain for all threads: they kick each other's processes.
 * Every rule set refuses to move files between directories (REFER) unless it says otherwise; this one is not about files.
 */
static void scope_signals(void)
{
    struct {
        uint64_t fs, net, scoped;
    } attr = {.fs = REFER, .scoped = 2 /* LANDLOCK_SCOPE_SIGNAL */};
    const struct sandbox_path everywhere = {.path = "/", .writable = true};
    int rules = landlock_version() >= 6 ? (int)syscall(SYS_landlock_create_ruleset, &attr, sizeof attr, 0) : -1;
    if (rules < 0)
        return;
    (void)landlock_add(rules, &everywhere, -1, REFER); /* a layer that does not say so forbids links and moves between directories */
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)
        (void)!syscall(SYS_landlock_restrict_self, rules, 0);
    close(rules);
}

void sandbox_begin(void)
{
    uid_t uid = geteuid();
    gid_t gid = getegid();
    bool entered = uid == 0 ? unshare(CLONE_NEWNS | CLONE_NEWIPC) == 0 : enter_user_namespace(uid, gid);
    if (entered) /* what is mounted outside still appears here, but not the other way round */
        (void)syscall(SYS_mount, NULL, "/", NULL, MS_REC | MS_SLAVE, NULL);
    scope_signals();
}

/* Puts a copy of a small file where it would be, if it is there. */
static void copy_file(int root, const char *path)
{
    char relative[4096], data[COPY_BYTES_MAX];
    int from = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    ssize_t size = from < 0 ? -1 : read(from, data, sizeof data);
    if (from >= 0)
        close(from);
    if (size < 0 || (size_t)snprintf(relative, sizeof relative, "%s", path + strspn(path, "/")) >= sizeof relative)
        return;
    for (char *slash = relative; (slash = strchr(slash, '/')); *slash++ = '/') {
        *slash = '\0';
        (void)mkdirat(root, relative, 0755);
    }
    int to = openat(root, relative, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
    if (to < 0)
        return;
    (void)!write(to, data, (size_t)size);
    close(to);
}

/* A directory with next to nothing in it, on a file system of its own that no path leads to: copies of the files that threads serving the guest read. */
static int make_empty_root(const struct sandbox_config *config)
{
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC};
    int fd = -1, fs = (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC);
    if (fs >= 0 && syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
        fd = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0);
    if (fs >= 0)
        close(fs);
    for (unsigned n = 0; fd >= 0 && n < config->path_count; n++)
        if (config->paths[n].threads & IN_GUEST && !config->paths[n].writable)
            copy_file(fd, config->paths[n].path);
    if (fd >= 0 && syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH, &attr, sizeof attr)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* A network namespace with nothing in it, made in passing: this thread goes back to its own. */
static int make_empty_network(void)
{
    int own = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC), made = -1;
    if (own >= 0 && unshare(CLONE_NEWNET) == 0) {
        made = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
        if (setns(own, CLONE_NEWNET)) { /* then it stays there, like all others will */
            close(own);
            return made;
        }
    }
    if (own >= 0)
        close(own);
    return made;
}

/* ---- paths ---- */

/* What a rule set of this version takes away: everything it knows. */
static uint64_t landlock_rights(long version)
{
    uint64_t rights = (LANDLOCK_ACCESS_FS_MAKE_SYM << 1) - 1;
    if (version >= 2)
        rights |= REFER;
    if (version >= 3)
        rights |= 1ull << 14; /* TRUNCATE */
    if (version >= 5)
        rights |= 1ull << 15; /* IOCTL_DEV */
    return rights;
}

/* A rule set for one kind of thread, -1 where the kernel has no Landlock. */
static int landlock_make(unsigned kind, const struct sandbox_config *config, int root, int *rules, struct error *err)
{
    long version = landlock_version();
    *rules = -1;
    if (version < 1)
        return 0;
    struct {
        uint64_t fs, net, scoped;
    } attr = {.fs = landlock_rights(version)};
    size_t size = version >= 6 ? 24 : version >= 4 ? 16 : 8;
    if (version >= 6)
        attr.scoped = 1; /* LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET */
    *rules = (int)syscall(SYS_landlock_create_ruleset, &attr, size, 0);
    if (*rules < 0)
        return error_set(err, -errno, "sandbox: cannot restrict paths: %s", strerror(errno));
    for (unsigned n = 0; n < config->path_count; n++) {
        int r = config->paths[n].threads & kind ? landlock_add(*rules, &config->paths[n], config->needs & SANDBOX_VSOCK || !(kind & IN_GUEST) ? -1 : root, attr.fs) : 0;
        if (r)
            return error_set(err, r, "sandbox: cannot leave %s open: %s", config->paths[n].path, strerror(-r));
    }
    return 0;
}

/* ---- creation ---- */

static bool has_capability(unsigned capability)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0}};
    return syscall(SYS_capget, &header, data) == 0 && data[capability / 32].effective >> capability % 32 & 1;
}

static void tell_missing(const struct sandbox *sandbox, const struct sandbox_config *config)
{
    char text[160] = "";
    if (sandbox->empty_root < 0)
        strcat(text, " an empty root directory,");
    if (sandbox->network < 0 && !config->host_network)
        strcat(text, " its own network,");
    if (sandbox->landlock[0] < 0)
        strcat(text, " Landlock,");
    if (sandbox->broker < 0 && config->broker >= 0)
        strcat(text, " a broker for files,");
    if (!sandbox->filters)
        strcat(text, " filters of system calls,");
    if (*text) {
        text[strlen(text) - 1] = '\0';
        log_info("sandbox: this host does not let the program have%s; the rest of the sandbox is in place", text);
    }
}

/* It reads the program's memory. Once threads of it have become somebody else, that takes a capability. */
static int choose_broker(const struct sandbox *sandbox, const struct sandbox_config *config)
{
    bool works = sandbox->filters && broker_close_doors(config->broker, &sandbox->filter[BROKER_KIND], landlock_version() >= 1);
    return works && (!sandbox->drop_user || has_capability(CAP_SYS_PTRACE)) ? config->broker : -1;
}

/* ---- filters ---- */

static void free_filters(struct sandbox *sandbox)
{
    for (unsigned n = 0; n < SANDBOX_KINDS; n++)
        filter_free(&sandbox->filter[n]);
}

static void *make_filters(void *arg)
{
    struct sandbox *sandbox = arg;
    int r = 0;
    for (unsigned n = 0; n < SANDBOX_KINDS && r == 0; n++)
        r = filter_make(&sandbox->filter[n], 1u << n, sandbox->needs, sandbox->omit, 1u << n == IN_API && sandbox->with_broker);
    sandbox->filter_error = r;
    return NULL;
}

static struct sandbox *allocate(unsigned needs, const char *omit, bool broker)
{
    struct sandbox *sandbox = calloc(1, sizeof *sandbox);
    if (!sandbox)
        return NULL;
    for (unsigned n = 0; n < SANDBOX_KINDS; n++)
        sandbox->landlock[n] = -1;
    sandbox->empty_root = sandbox->network = sandbox->broker = -1;
    sandbox->needs = needs;
    sandbox->omit = omit;
    sandbox->with_broker = broker;
    return sandbox;
}

struct sandbox *sandbox_compile(unsigned needs, const char *omit, bool broker)
{
    struct sandbox *sandbox = allocate(needs, omit, broker);
    if (sandbox && !(sandbox->compiles = pthread_create(&sandbox->compiler, NULL, make_filters, sandbox) == 0)) {
        free(sandbox);
        return NULL;
    }
    return sandbox;
}

static void join_compiler(struct sandbox *sandbox)
{
    if (sandbox->compiles)
        pthread_join(sandbox->compiler, NULL);
    sandbox->compiles = false;
}

/* With what was begun aside, when that is what it takes. */
static int finish_filters(struct sandbox *sandbox, unsigned needs, bool broker)
{
    join_compiler(sandbox);
    if (!sandbox->filter[0].filter || sandbox->needs != needs || sandbox->with_broker != broker) {
        free_filters(sandbox);
        sandbox->needs = needs;
        sandbox->with_broker = broker;
        make_filters(sandbox);
    }
    return sandbox->filter_error;
}

int sandbox_create(struct sandbox **out, const struct sandbox_config *config, struct error *err)
{
    struct sandbox *sandbox = *out ? *out : allocate(config->needs, config->omit, false);
    *out = NULL;
    if (!sandbox)
        return error_set(err, -ENOMEM, "out of memory");
    sandbox->outside = ~IN_GUEST | (config->needs & SANDBOX_VSOCK ? IN_LOOP : 0);
    sandbox->drop_user = geteuid() == 0 && has_capability(CAP_SETUID) && has_capability(CAP_SETGID);
    /* Each thread gets a root directory of its own by unshare, which containers' filters may refuse whatever the capabilities. */
    bool unshares = has_capability(CAP_SYS_ADMIN) && has_capability(CAP_SYS_CHROOT) && unshare(CLONE_FS) == 0;
    sandbox->empty_root = unshares ? make_empty_root(config) : -1;
    sandbox->network = !config->host_network && has_capability(CAP_SYS_ADMIN) ? make_empty_network() : -1;
    sandbox->filters = filter_possible();
    int r = finish_filters(sandbox, config->needs, config->broker >= 0 && sandbox->filters);
    sandbox->broker = r ? -1 : choose_broker(sandbox, config);
    if (sandbox->broker < 0) /* filters that wait for one cannot be made everywhere */
        r = finish_filters(sandbox, config->needs, false);
    if (r)
        error_set(err, r, "sandbox: cannot make the filters of system calls: %s; --sandbox off does without", strerror(-r));
    for (unsigned n = 0; n < SANDBOX_KINDS && r == 0; n++)
        if (1u << n != IN_BROKER && !(1u << n == IN_API && config->broker >= 0 && sandbox->broker < 0))
            r = landlock_make(1u << n, config, sandbox->empty_root, &sandbox->landlock[n], err);
    if (r == 0)
        r = filter_catch();
    if (r) {
        sandbox_destroy(sandbox);
        return r;
    }
    tell_missing(sandbox, config);
    *out = sandbox;
    return 0;
}

bool sandbox_has_broker(const struct sandbox *sandbox)
{
    return sandbox->broker >= 0;
}

void sandbox_destroy(struct sandbox *sandbox)
{
    if (!sandbox)
        return;
    join_compiler(sandbox);
    free_filters(sandbox);
    for (unsigned n = 0; n < SANDBOX_KINDS; n++)
        if (sandbox->landlock[n] >= 0)
            close(sandbox->landlock[n]);
    if (sandbox->empty_root >= 0)
        close(sandbox->empty_root);
    if (sandbox->network >= 0)
        close(sandbox->network);
    free(sandbox);
}

/* ---- entering ---- */

static bool leave_root(const struct sandbox *sandbox)
{
    return sandbox->empty_root < 0 || (unshare(CLONE_FS) == 0 && fchdir(sandbox->empty_root) == 0 && chroot(".") == 0 && chdir("/") == 0);
}

static bool leave_network(const struct sandbox *sandbox)
{
    return sandbox->network < 0 || setns(sandbox->network, CLONE_NEWNET) == 0;
}

/* Those who clean up, or work on a user's files, stay who they are. */
static bool leave_user(const struct sandbox *sandbox)
{
    return !sandbox->drop_user || (syscall(SYS_setgroups, 0, NULL) == 0 && syscall(SYS_setresgid, NOBODY, NOBODY, NOBODY) == 0 &&
                                   syscall(SYS_setresuid, NOBODY, NOBODY, NOBODY) == 0);
}

static bool leave_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {{0}};
    for (unsigned long n = 0; prctl(PR_CAPBSET_READ, n, 0, 0, 0) == 1; n++)
        (void)prctl(PR_CAPBSET_DROP, n, 0, 0, 0); /* needs a capability itself; without it there is none to gain either, see no_new_privs */
    (void)prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    return syscall(SYS_capset, &header, none) == 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
}

/* Made by a thread that is. */
static bool is_inside(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0}};
    return syscall(SYS_capget, &header, data) == 0 && !data[0].effective && !data[1].effective && prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1;
}

int sandbox_enter(const struct sandbox *sandbox, unsigned kind, struct error *err)
{
    unsigned number = (unsigned)__builtin_ctz(kind);
    const char *what = NULL;
    int listener = kind == IN_API && sandbox->broker >= 0 ? 1 : 0;
    filter_note_kind(kind);
    if (is_inside())
        what = NULL; /* all that is left is to give up more */
    else if (!leave_network(sandbox))
        what = "its own network";
    else if (!(kind & sandbox->outside) && !leave_root(sandbox))
        what = "an empty root directory";
    else if (!(kind & sandbox->outside) && !leave_user(sandbox))
        what = "another user";
    else if (!leave_capabilities())
        what = "no capabilities";
    if (!what && sandbox->landlock[number] >= 0 && syscall(SYS_landlock_restrict_self, sandbox->landlock[number], 0))
        what = "restricted paths";
    if (!what && sandbox->filters && (listener = filter_load(&sandbox->filter[number], listener)) < 0)
        what = "a filter of system calls";
    if (!what && listener > 0 && broker_serve(sandbox->broker, listener) < 0)
        what = "a broker for files";
    return what ? error_set(err, -errno, "sandbox: a thread (%s) cannot have %s: %s", sandbox_kind_name(kind), what, strerror(errno)) : 0;
}
